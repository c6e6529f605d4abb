"""Records the events of a step, reads them back and shows them. Knows no tensors."""

from gemini.profile.recording import Recording, read_recording

__all__ = ["Recording", "read_recording"]
