"""What happens in a step, moment by moment: recorded, read back, and shown. It knows no tensors."""

from gemini.profile.recording import Recording, read_recording

__all__ = ["Recording", "read_recording"]
