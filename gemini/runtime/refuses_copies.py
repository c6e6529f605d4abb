"""Objects of an engine that hooks refer to, and that must not be copied with the model."""

from __future__ import annotations

from gemini.errors import ModelError

__all__ = ["RefusesCopies"]


class RefusesCopies:
    """Base of objects that belong to one engine; copying or pickling them is an error."""

    def __getstate__(self) -> object:
        raise ModelError(
            "a model wrapped by GeminiDDP cannot be copied or pickled: its weights live in memory and files of their "
            "own; load engine.state_dict() into a plain copy of the model instead"
        )
