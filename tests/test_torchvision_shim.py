"""The shim, in fresh processes, since an import cannot be undone."""

import subprocess
import sys


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_torchvision_and_its_dependants_import_after_the_shim() -> None:
    done = run_python(
        "from dist_decoder.torchvision_shim import ensure_torchvision\n"
        "first = ensure_torchvision()\n"
        "import torchvision, torchvision.transforms\n"
        "assert ensure_torchvision() == first\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_shim_does_not_import_torch() -> None:
    done = run_python(
        "import sys, dist_decoder.torchvision_shim; assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_shim_declares_exactly_when_the_plain_import_fails() -> None:
    plain = run_python("import torchvision")
    shimmed = run_python(
        "from dist_decoder.torchvision_shim import ensure_torchvision\n"
        "import sys; sys.exit(3 if ensure_torchvision() else 0)"
    )
    assert (shimmed.returncode == 3) == (plain.returncode != 0), shimmed.stderr
