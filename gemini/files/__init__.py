"""Files that are whole or not there."""

__all__: list[str] = []
