"""Other people's training loops over a GeminiDDP, with their code left as it is.

Each module needs its own library and is imported by name: `gemini.integrations.transformers` (Trainer, and TRL's
trainers), `.accelerate`, `.lightning`. Importing `gemini` imports none of them.
"""

__all__: list[str] = []
