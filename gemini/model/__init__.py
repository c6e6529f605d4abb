"""Describes the user's model and makes decisions about it; knows no chunks."""

__all__: list[str] = []
