"""What ranks really hold and send is what ``estimate`` says; optimizer state falls as 1/N."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def measured(ranks: list[int], stages: list[int]) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "rank_memory.py"), "--ranks"]
    command += [*map(str, ranks), "--stages", *map(str, stages)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False,
                          capture_output=True, text=True, timeout=1500)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_shares(lines: list[dict[str, Any]]) -> None:
    alone = {line["stage"]: line for line in lines if line["ranks"] == 1}
    for line in lines:
        whole = alone[line["stage"]]
        share = whole["state_bytes_ends"] / line["ranks"]
        assert line["state_bytes_ends"] == pytest.approx(share, rel=0.02)
        share = whole["state_bytes_middle"] / (line["ranks"] if line["stage"] else 1)
        assert line["state_bytes_middle"] == pytest.approx(share, rel=0.02)


def test_two_ranks_hold_half_at_stage_3() -> None:
    (line,) = measured([2], [3])
    # Start values are drawn for this rank's part of the ends: 85 % of the parameters.
    whole = 2 * line["state_bytes_ends"] / 3
    assert line["start_peak_bytes"] < whole
    assert line["predicted_over_state_ends"] == pytest.approx(1, abs=0.02)
    assert line["estimate_over_sent"] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_state_falls_with_the_ranks_at_every_stage() -> None:
    check_shares(measured([1, 2, 4], [0, 1, 2, 3]))
