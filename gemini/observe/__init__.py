"""What an engine says about itself."""

__all__: list[str] = []
