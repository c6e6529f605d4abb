"""What `python -m gemini` can do, a module for each command; `gemini.__main__` lists them."""

__all__: list[str] = []
