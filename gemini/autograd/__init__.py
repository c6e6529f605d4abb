"""Where torch's functions and graph are touched: what reads and writes the parameters that chunks hold."""

__all__: list[str] = []
