"""Lets these tests use the shards that tests/data puts together by hand."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "data"))
