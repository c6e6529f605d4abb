"""How long tests wait for what must come: so long that only what hangs is given up, on any machine and beside any load.

Whether a test passes must not depend on how fast the machine is. So what is waited for is something that can be seen (a
line, a message, a file, a state), and this is only the end of patience.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

PATIENCE_S = 100.0 * int(os.environ.get("GEMINI_TEST_SLOWER", "1"))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; an AssertionError if it never does."""
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, "it has not become so"
        time.sleep(0.01)
