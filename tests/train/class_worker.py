"""One rank that writes the losses of a few steps: ``class_worker.py FILE``.

Of steps in one piece, and in micro-batches of three.
"""

import json
import sys
from pathlib import Path

import torch
from made_terms import losses_by_step

from dist_decoder import dist

if __name__ == "__main__":
    torch.set_num_threads(1)
    world = dist.start("cpu", timeout_s=60)
    try:
        found = [losses_by_step(world, micro_batch_size=size) for size in (None, 3)]
        if world.is_first:
            Path(sys.argv[1]).write_text(json.dumps(found))
    finally:
        dist.stop()
