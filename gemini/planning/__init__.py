"""What a run needs, computed without running it."""

__all__: list[str] = []
