"""Hooks into torch's functions and graph: everything that reads and writes the parameters that chunks hold."""

__all__: list[str] = []
