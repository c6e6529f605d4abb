"""The `.grad` attributes of parameters whose gradients wait elsewhere.

[Note: Gradients in .grad]
Autograd's accumulation hands each gradient to the engine at once and leaves `.grad` None. But other code may write
`.grad` by itself: a loop that calls torch.autograd.grad, a pipeline schedule that computes weight gradients apart from
input gradients. Such a gradient counts once, added to what has arrived. It is taken before the next forward, norm or
step, whichever comes first.

`zero_grad(set_to_none=False)` leaves zeros in `.grad` of all parameters that had a gradient, so the next step updates
them even if nothing uses them: the moments decay and weight decay applies. So the names of those parameters are kept,
and each that has no gradient by the time of the norm is given one of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from gemini.chunk.chunk import Chunk
from gemini.errors import ModelError
from gemini.model.tensor_parallel import local_part, take_local_gradient

__all__ = ["GivenGradient", "GradAttributes"]

GivenGradient = tuple[int, int, torch.Tensor]
"""Chunk, position in its layout, and the gradient of the parameter there."""


class GradientIntake(Protocol):
    """Object that keeps gradients until the update."""

    def add(self, gradients: Sequence[GivenGradient]) -> None:
        """Take gradients that no backward pass delivers."""

    def add_zeros(self, places: Sequence[tuple[int, int]], zeros: Callable[[int, int], torch.Tensor]) -> None:
        """Give gradients of zeros to parameters that have none."""

    def has(self, chunk_id: int, position: int) -> bool:
        """Return whether this process has had a gradient of a parameter since the last update."""

    def names(self) -> set[str]:
        """Return the parameters that have a gradient."""


class GradAttributes:
    """The `.grad` of all trainable parameters of one engine.

    Args:
        chunks: all of them.
        intake: where gradients wait.
        is_scaled: whether the gradients of backward passes carry a loss scale.
    """

    def __init__(self, chunks: Iterable[Chunk], intake: GradientIntake, *, is_scaled: bool) -> None:
        self._params = [
            (param, place.spec.name, (chunk.spec.chunk_id, position))
            for chunk in chunks
            if chunk.spec.is_trainable
            for position, (param, place) in enumerate(zip(chunk.params, chunk.spec.places, strict=True))
        ]
        self._intake = intake
        self._is_scaled = is_scaled
        self._held: set[str] = set()
        """Parameters whose `.grad` torch would not have set to None."""
        self._zeroed: set[str] = set()
        """Those of them that are to be updated with zeros if nothing else comes."""

    def collect(self, on_found: Callable[[], None]) -> None:
        """Take the gradients that other code has written to `.grad`.

        Args:
            on_found: called before, if there are any; may raise.

        Raises:
            ModelError: there are some, and nobody can know whether they carry the loss scale; or a second gradient of
                a parameter came before the update, and gradients are not kept as float32.
        """
        with torch._C.DisableTorchFunctionSubclass():
            found = [(param, name, place) for param, name, place in self._params if param.grad is not None]
            if found and self._is_scaled:
                raise ModelError(
                    f"a gradient was written to .grad of {found[0][1]}, and in float16 the engine cannot know "
                    "whether it includes the loss scale: let loss.backward() compute it, or train in bfloat16 or "
                    "float32; zero_grad() drops it"
                )
            if found:
                on_found()
                self._intake.add([(*place, take_local_gradient(param)) for param, _, place in found])

    def add_zeros(self) -> None:
        """Give zeros to the parameters that torch would update although nothing has come for them."""
        missing = {place: param for param, name, place in self._params if name in self._zeroed and not self._has(place)}

        def zeros(chunk_id: int, position: int) -> torch.Tensor:
            return torch.zeros_like(local_part(missing[chunk_id, position]), memory_format=torch.contiguous_format)

        if missing:
            self._intake.add_zeros(list(missing), zeros)

    def end_step(self) -> None:
        """Note which gradients a step has consumed; they are still there."""
        self._held |= self._intake.names()

    def clear(self, *, set_to_none: bool) -> None:
        """Drop what is in `.grad`, and note what torch would leave there.

        Args:
            set_to_none: whether that is nothing, rather than zeros for each parameter that has had a gradient.
        """
        if set_to_none:
            self._held.clear()
        else:
            self._held.update(self._at_hand())
        self._zeroed = set(self._held)
        with torch._C.DisableTorchFunctionSubclass():
            for param, _, _ in self._params:
                if param.grad is not None:
                    param.grad = None

    def _at_hand(self) -> Iterator[str]:
        with torch._C.DisableTorchFunctionSubclass():
            written = {place for param, _, place in self._params if param.grad is not None}
        return (name for _, name, place in self._params if place in written or self._has(place))

    def _has(self, place: tuple[int, int]) -> bool:
        return self._intake.has(*place)
