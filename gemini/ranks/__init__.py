"""The ranks of a job, independent of the library that connects them; `zero` implements it."""

__all__: list[str] = []
