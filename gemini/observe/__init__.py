"""Reports on an engine: memory, recordings, ranges for profilers."""

__all__: list[str] = []
