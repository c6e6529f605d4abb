"""Reading and writing weights and state in any tier: for users' code, state dicts and checkpoints."""

__all__: list[str] = []
