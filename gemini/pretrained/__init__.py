"""Weights in Hugging Face's layout, streamed between a directory and wherever they live."""

from gemini.pretrained.saving import save_pretrained
from gemini.pretrained.source import LoadingReport, open_pretrained

__all__ = ["LoadingReport", "open_pretrained", "save_pretrained"]
