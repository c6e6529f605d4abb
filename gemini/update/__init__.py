"""The optimizer's arithmetic, tile by tile, and when it runs."""

__all__: list[str] = []
