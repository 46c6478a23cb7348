"""One real cluster for all tests marked ``slurm``, tiny shards, and a finished run to compare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "data"))

from cluster import Cluster, missing_programs
from workplace import Workplace, environment, write_inputs


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Start SLURM; only with ``-m slurm``, as root, with the packages of ``install.sh``."""
    if "slurm" not in request.config.option.markexpr:
        pytest.skip("runs with -m slurm only: minutes on a real SLURM")
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and tests/slurm/install.sh (missing: {', '.join(missing)})")
    # Whoever ends the tests by SIGTERM must not leave daemons and namespaces behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Paths of sockets may not be longer than about 100 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        running = Cluster(Path(folder)).start()
        try:
            yield running
        finally:
            running.stop()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two ranks on this machine, without SLURM and without interruption."""
    folder = tmp_path_factory.mktemp("reference")
    write_inputs(folder)
    subprocess.run(
        [sys.executable, "-m", "launchers", "local", "ranks=2", "--", "dist-decoder", "train",
         "train.yaml"],
        cwd=folder, env=environment({}), check=True, capture_output=True,
    )  # fmt: skip
    assert json.loads((folder / "run" / "summary.json").read_text())["step"] > 0
    return folder / "run"


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path) -> Iterator[Workplace]:
    """Return a folder with inputs; its jobs are cancelled and the nodes are mended afterwards."""
    write_inputs(tmp_path)
    workplace = Workplace(tmp_path, cluster)
    yield workplace
    workplace.close()
