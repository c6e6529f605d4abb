"""When and in which order the optimizer's arithmetic runs: tile by tile, in a thread, before or after the step."""

__all__: list[str] = []
