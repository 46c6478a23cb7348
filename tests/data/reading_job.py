"""One rank of a made-up job: reads batches, notes what it consumed, and can be killed at any time.

    reading_job.py FOLDER RANK WORLD_SIZE STEPS CONFIG_JSON

Like a trainer it notes a step only when it is done, and begins after the last step that it noted.
Each line of FOLDER/rank-R.jsonl is one step: the keys and a digest of every number.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from dist_decoder.batch import Batch
from dist_decoder.config.sources import SourcesConfig
from dist_decoder.data.loader import Loader


def digest(batch: Batch) -> list[str]:
    """Return one hash per position."""
    parts = [hashlib.sha256() for _ in range(batch.size)]
    for name, rows in batch.rows.items():
        for place, position in enumerate(rows.tolist()):
            parts[position].update(batch.voxels[name][place].numpy().tobytes())
    for target in (batch.pooled_BE, batch.tokens_BTD):
        for position in range(batch.size if target is not None else 0):
            parts[position].update(target[position].numpy().tobytes())
    return [part.hexdigest()[:16] for part in parts]


def noted(path: Path) -> list[dict]:
    """Return the steps noted so far; the last line of a killed process may be cut."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def main() -> None:
    folder, rank, world_size, steps, config = sys.argv[1:6]
    path = Path(folder) / f"rank-{rank}.jsonl"
    done = noted(path)
    path.write_text("".join(json.dumps(one) + "\n" for one in done))
    config = SourcesConfig.model_validate_json(config)
    pause_s = float(os.environ.get("PAUSE_S", "0"))
    with (
        Loader(config, 3, int(rank), int(world_size), start_step=len(done)) as loader,
        path.open("a") as file,
    ):
        while loader.step < int(steps):
            batch = next(loader)
            time.sleep(pause_s)
            file.write(json.dumps({"keys": batch.keys, "digests": digest(batch)}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
