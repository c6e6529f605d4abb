"""Weights and state, read and written wherever they live: for users' code, state dicts and checkpoints."""

__all__: list[str] = []
