"""Shards put together by hand are in tests/data."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "data"))
