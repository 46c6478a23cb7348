"""The command as it was typed, for reports."""

from __future__ import annotations

import shlex
import sys


def typed_command() -> str:
    """Return ``dist-decoder VERB ...`` with the arguments of this process."""
    return shlex.join(["dist-decoder", *sys.argv[1:]])
