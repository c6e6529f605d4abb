"""Predicts the needs of a run without running it."""

__all__: list[str] = []
