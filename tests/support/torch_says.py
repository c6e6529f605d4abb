"""What torch says when it refuses something: asked of the torch that is installed, whose words change."""

from __future__ import annotations

import re
from collections.abc import Callable


def refusal_of(action: Callable[[], object]) -> str:
    """Return a pattern of the RuntimeError that an action of plain torch ends in, without sizes and names."""
    try:
        action()
    except RuntimeError as error:
        return re.escape(re.split(r"[:\[(]", str(error))[0])
    raise AssertionError("torch refuses nothing")
