"""The interface between backward and updates: objects that keep gradients, and listeners for their changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from gemini.autograd.backward_pass import BackwardPass
from gemini.autograd.gradient_sink import GradientPlace
from gemini.chunk.layout import ChunkSpec
from gemini.errors import ModelError
from gemini.gradients.accumulators import GradientAccumulators
from gemini.kernels.pool import GradTicket
from gemini.offload.home import TiledHome
from gemini.ranks.sharding import ChunkShard
from gemini.tiers import MemoryTier

__all__ = ["ArrivedGradients", "DirectGradients", "GradientListener", "Gradients", "second_gradient_error"]


@dataclass(frozen=True, slots=True)
class ArrivedGradients:
    """All gradients of a chunk, in host memory or on their way from there to disk."""

    tickets: tuple[GradTicket, ...]
    """Jobs that must be complete before the gradients may be read."""
    slot: torch.Tensor | None
    """Buffer to read them from while the slot is not needed by others; None: read them at home."""


class GradientListener(Protocol):
    """Listener that is called when gradients change."""

    def gradients_complete(self, chunk_id: int, arrived: ArrivedGradients) -> bool:
        """Handle that a backward pass has delivered all gradients of a chunk.

        Args:
            chunk_id: the chunk.
            arrived: where its gradients are.

        Returns:
            Whether they will be read from `arrived.slot`; then the slot is not reused before `leave_gradient_slot`.
        """

    def gradients_change(self, chunk_id: int) -> None:
        """Stop reading a chunk's gradients, which are about to change; what was made of them must not count."""

    def leave_gradient_slot(self, chunk_id: int) -> None:
        """Stop reading a chunk's gradients from a slot; they are at home too."""


class DirectGradients(Protocol):
    """Uses of a parameter that deliver their gradients by themselves, past autograd.

    =================  =================  ======  ===========================================================
    verb               called by          blocks  promises
    =================  =================  ======  ===========================================================
    takes_apart        forward hooks      no      the same answer throughout a pass
    expect             forward hooks      no      one more use will deliver
    use_delivers       backward of a use  no      one use less is expected
    autograd_delivers  backward hooks     no      no use is expected; the sum of all comes with `put`
    can_write          backward of a use  no      whether `writing` is possible
    writing            backward of a use  maybe   the memory is the use's own while the context is open
    finish_uses        backward hooks     no      all uses of this pass have delivered
    =================  =================  ======  ===========================================================

    A parameter is named by its chunk and its position in the chunk's layout.
    """

    def takes_apart(self, chunk_id: int, position: int, *, num_uses: int) -> bool:
        """Return whether the sum has autograd's bits if all of so many uses deliver by themselves."""

    def expect(self, chunk_id: int, position: int) -> None:
        """Expect that one more use of a parameter will deliver its gradient apart from the others'."""

    def use_delivers(self, chunk_id: int, position: int) -> None:
        """Expect one use less; its gradient comes with the next `put` or `writing`."""

    def autograd_delivers(self, chunk_id: int, position: int) -> None:
        """Expect no more uses; the sum of all their gradients comes with the next `put`."""

    def can_write(self, chunk_id: int) -> bool:
        """Return whether `writing` is possible."""

    def writing(self, chunk_id: int, position: int) -> AbstractContextManager[GradientPlace]:
        """Open the memory of a parameter's gradient to one of its uses, which adds its part."""

    def finish_uses(self, chunk_id: int, position: int) -> None:
        """Note that all uses of a parameter in this backward pass have delivered."""


class Gradients(Protocol):
    """Gradients that wait for the update: GradientStore with one rank, ShardedGradients with several.

    =================  ===============  ======  ==============================================================
    verb               called by        blocks  promises
    =================  ===============  ======  ==============================================================
    put                backward hooks   maybe   the gradient may be freed on return
    reach_unit         backward hooks   maybe   gradients of units reached before may leave
    end_backward       autograd         maybe   all of this pass is on its way home
    add, add_zeros     the step         maybe   as if a backward pass had delivered them
    finish             the step         yes     all gradients are at home
    sums_of_squares    the step         yes     exact, of all ranks
    clear              the step         maybe   there are none
    =================  ===============  ======  ==============================================================
    """

    num_backwards: int
    """Backward passes since gradients were last cleared, the one under way included."""
    expected_backwards: int
    """Backward passes of the last step that was taken; the coming one probably has as many."""
    hyper_fingerprint: int
    """Fingerprint of what the optimizer will do; all ranks must have the same."""
    backward_pass: BackwardPass

    @property
    def direct(self) -> DirectGradients | None:
        """Takes gradients that uses deliver by themselves; None if all come through autograd."""

    @property
    def accumulators(self) -> GradientAccumulators:
        """Sums over backward passes on the device."""

    def follow(self, listener: GradientListener) -> None:
        """Set the one listener for changes of gradients."""

    def add_chunk(
        self,
        spec: ChunkSpec,
        home: TiledHome,
        tier: MemoryTier,
        *,
        shard: ChunkShard | None = None,
        is_kept_whole: bool = False,
    ) -> None:
        """Take charge of a trainable chunk's gradients.

        Args:
            spec: layout of the whole chunk.
            home: where the gradients, or the shard's, wait.
            tier: the home's.
            shard: this rank's; None: there are no others.
            is_kept_whole: whether ranks exchange them only in the step.
        """

    def put(self, chunk_id: int, position: int, grad: torch.Tensor) -> None:
        """Take one parameter's gradient as autograd hands it over."""

    def reach_unit(self, chunk_ids: Sequence[int], distance: Callable[[int], int]) -> None:
        """Note that backward has reached the unit whose own these chunks are."""

    def end_backward(self) -> None:
        """Send off what waits; called by autograd when a backward pass has ended."""

    def add(self, gradients: Sequence[tuple[int, int, torch.Tensor]]) -> None:
        """Take gradients that no backward pass delivers: chunk, position and gradient."""

    def add_zeros(self, places: Sequence[tuple[int, int]], zeros: Callable[[int, int], torch.Tensor]) -> None:
        """Give gradients of zeros, which `zeros` makes, to parameters that have none."""

    def has(self, chunk_id: int, position: int) -> bool:
        """Return whether there has been a gradient of a parameter since gradients were last cleared."""

    def discard(self, chunk_id: int, position: int) -> None:
        """Forget one parameter's gradient."""

    def finish(self) -> None:
        """Block until every gradient has reached its home."""

    def names(self) -> set[str]:
        """Return the parameters that have a gradient, on any rank."""

    def sums_of_squares(self) -> dict[str, float]:
        """Return the sum of squares of each gradient, by parameter name; NaN or infinite where one is not finite."""

    def dtype_of(self, chunk_id: int) -> torch.dtype:
        """Return the dtype in which a chunk's gradients wait."""

    def home_of(self, chunk_id: int) -> TiledHome:
        """Return where a chunk's gradients, or the shard's, wait."""

    def clear(self) -> None:
        """Forget all gradients."""

    def close(self) -> None:
        """Give slots and homes back."""


def second_gradient_error(name: str, dtype: torch.dtype) -> ModelError:
    """Return the error for a parameter's gradient of a second backward pass where they wait in half precision."""
    return ModelError(
        f"a second gradient for {name} arrived before optimizer.step(): several backward passes per step need float32 "
        f"gradients, but they are kept as {dtype}; "
        "set GeminiConfig(gradient_accumulation=True), or call optimizer.zero_grad() to drop the first"
    )
