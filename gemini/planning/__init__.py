"""What a run would need, without running it."""

__all__: list[str] = []
