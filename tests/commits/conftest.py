"""What holds for tests of commits: helpers of this directory and of training tests can be imported."""

from __future__ import annotations

import sys
from pathlib import Path

for directory in (Path(__file__).parent, Path(__file__).parent.parent / "training"):
    sys.path.insert(0, str(directory))  # importmode=importlib leaves sys.path alone
