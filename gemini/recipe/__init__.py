"""Fine-tuning from a file: the settings of `python -m gemini train`, and the way from text to batches."""

__all__: list[str] = []
