"""The commands of `python -m gemini`, one module each; `gemini.__main__` lists them."""

__all__: list[str] = []
