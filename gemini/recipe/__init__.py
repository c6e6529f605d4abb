"""Fine-tuning from a file: what `python -m gemini train` reads, and how text becomes batches."""

__all__: list[str] = []
