"""The ranks of a job, whoever connects them; `zero` implements it."""

__all__: list[str] = []
