"""The user's model as it was found, and what is decided about it; knows no chunk."""

__all__: list[str] = []
