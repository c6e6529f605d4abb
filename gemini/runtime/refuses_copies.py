"""What hooks hold of an engine refuses to be copied with the model that they are on."""

from __future__ import annotations

from gemini.errors import ModelError

__all__ = ["RefusesCopies"]


class RefusesCopies:
    """Base of what belongs to one engine only."""

    def __getstate__(self) -> object:
        raise ModelError(
            "a model wrapped by GeminiDDP cannot be copied or pickled: its weights live in memory and files of their "
            "own; load engine.state_dict() into a plain copy of the model instead"
        )
