"""Print the table of docs/estimate.md: which run fits which GPU.

python benchmarks/fit_table.py > table.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from dist_decoder.config.base import load_config
from dist_decoder.config.estimate import EstimateConfig
from dist_decoder.estimate.estimate import estimate

CONFIGS = Path(__file__).parents[1] / "configs"
GPUS_GB = (24, 40, 80, 141)
MARGIN = 0.9
"""Share of a GPU that a run may take: the CUDA context and fragmentation need the rest."""

MINDEYE2 = CONFIGS / "model" / "mindeye2.yaml"
DUALA = CONFIGS / "adapt" / "duala_reference.yaml"
ROWS = (
    ("MindEye2, 24 samples", MINDEYE2, ("batch_size=24",)),
    ("MindEye2, 24 samples on each of 8 GPUs", MINDEYE2, ("batch_size=192", "ranks=8")),
    ("MindEye2 with 1024 latents, 24 samples", MINDEYE2, ("model.latent_dim=1024",)),
    ("Duala's adapters, 10 samples", DUALA, ()),
)


def main() -> None:
    header = ["run", "precision", *(f"ZeRO {stage}" for stage in range(4))]
    header += [f"{size} GB" for size in GPUS_GB]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, path, overrides in ROWS:
        for precision in ("fp32", "bf16"):
            settings = [*overrides, f"engine.precision={precision}"]
            found = estimate(load_config(EstimateConfig, path, settings))
            sizes = {k: v / 1e9 for k, v in found["memory_bytes_per_rank"].items()}
            cells = [name, precision, *(f"{size:.1f}" for size in sizes.values())]
            for gpu in GPUS_GB:
                stages = [stage for stage, size in sizes.items() if size <= MARGIN * gpu]
                cells.append(f"stage {', '.join(stages)}" if stages else "no")
            lines.append("| " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
