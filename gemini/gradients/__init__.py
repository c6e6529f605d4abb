"""Gradients, from autograd's hands to the update's."""

__all__: list[str] = []
