"""Files that are either complete or absent."""

__all__: list[str] = []
