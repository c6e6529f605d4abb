"""Steps that survive the process."""

__all__: list[str] = []
