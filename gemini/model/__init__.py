"""The user's model as it was given, and decisions about it; knows no chunk."""

__all__: list[str] = []
