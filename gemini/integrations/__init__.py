"""Training loops of other libraries over a GeminiDDP, with their code unchanged.

Each module needs its own library and is imported by name: `gemini.integrations.transformers` (Trainer, and TRL's
trainers), `.accelerate`, `.lightning`. Importing `gemini` imports none of them.
"""

__all__: list[str] = []
