"""Running a batch through a block some rows at a time."""

__all__: list[str] = []
