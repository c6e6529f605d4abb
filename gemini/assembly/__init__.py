"""From a model and a configuration to a run."""

__all__: list[str] = []
