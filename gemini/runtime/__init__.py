"""A run: its state, what happens in a pass and what happens in a step."""

__all__: list[str] = []
