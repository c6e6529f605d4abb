"""One call of a block, run in slices in forward, and again slice by slice in backward.

[Note: Slices]
In forward the slices of a block run one after another without a graph, and only the block's arguments are kept. In
backward the block is entered once more. Slice after slice runs again, with the random numbers it had, and is
differentiated; the gradients of the block's parameters are summed in float32 and leave autograd as one. So a block's
unit is entered once in forward and once in backward for any number of slices, and activations take what one slice of
one block takes. This is also activation checkpointing by block, and replaces the block's own if it has one.

Knows tensors and autograd, but not what entering a unit means or where kept arguments go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gemini.autograd.slice_sums import SliceSums, summand
from gemini.errors import ModelError
from gemini.offload.accelerator import random_states, set_random_states
from gemini.slicing.batch_rows import BlockCall, JoinedOutputs, slice_bounds

__all__ = ["SlicedBlock", "UnitScope", "run_in_slices"]


class UnitScope(Protocol):
    """The part of the engine that slicing uses."""

    slice_sums: SliceSums
    """Sums that take all gradients that arrive while they are open."""

    def recomputing(self, unit_id: int) -> AbstractContextManager[None]:
        """Keep a unit's weights usable in backward while the context is open."""

    def num_updates_of(self, unit_id: int) -> int:
        """Return how often the optimizer has changed a unit's weights."""

    def hand_over(self, param: nn.Parameter) -> None:
        """Give the engine the complete gradient in `param.grad`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedBlock:
    """A block through which batches pass in slices."""

    name: str
    """Name for messages."""
    module: nn.Module
    forward: Callable[..., Any]
    """Module's own forward, which runs anything it is given without slices."""
    params: tuple[nn.Parameter, ...]
    """Trained parameters."""
    unit_id: int
    num_slices: int
    scope: UnitScope


def run_in_slices(block: SlicedBlock, call: BlockCall, tensors: Sequence[torch.Tensor]) -> Any:
    """Run a block in slices as one node of the graph.

    Args:
        block: the block, whose unit is in use.
        call: its arguments without the tensors.
        tensors: the tensors among its arguments; autograd keeps them until backward.

    Returns:
        The block's result for the whole batch; its tensors are new.

    Raises:
        ModelError: the block wrote to an argument or a buffer, or its results cannot be joined.
    """
    sliced = _SlicedCall(block, call, tensors[0].device)
    outputs = _SlicedFunction.apply(sliced, len(tensors), *tensors, *block.params)  # type: ignore[no-untyped-call]
    return sliced.join(outputs)


class _SlicedCall:
    """One call of a block, which runs in slices in forward and again in backward. Owns no tensors."""

    def __init__(self, block: SlicedBlock, call: BlockCall, device: torch.device) -> None:
        self._block = block
        self._call = call
        self._bounds = slice_bounds(call.num_rows, block.num_slices)
        self._device = device
        self._autocast = _autocast_state(device)
        self._random_states: list[tuple[torch.Tensor, ...]] = []
        self._num_updates = block.scope.num_updates_of(block.unit_id)
        self._joined: JoinedOutputs | None = None

    def forward(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run all slices and return the complete tensors of the results. Called without grad mode."""
        joined = self._joined = JoinedOutputs(self._call.num_rows, block_name=self._block.name)
        with self._running(), _refusing_writes(self._block, tensors):
            for begin, end in self._bounds:
                self._random_states.append(random_states(self._device))
                joined.add(self._run_slice(self._call.rows_of(tensors, begin, end)), begin, end)
        return tuple(leaf for leaf in joined.leaves if isinstance(leaf, torch.Tensor))

    def join(self, outputs: Sequence[torch.Tensor]) -> Any:
        """Return the block's result, made of the tensors that `forward` returned."""
        joined, self._joined = self._joined, None  # the outputs own the graph, which owns this object
        assert joined is not None
        remaining = iter(outputs)
        return joined.build([next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in joined.leaves])

    def backward(
        self, tensors: Sequence[torch.Tensor], needs_grad: Sequence[bool], grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Run all slices again and differentiate each.

        Args:
            tensors: the arguments, as in forward.
            needs_grad: whether a gradient is wanted, for each of them.
            grads: gradients of what `forward` returned.

        Returns:
            Gradients of the arguments, then of the block's parameters.
        """
        block, sums = self._block, self._block.scope.slice_sums
        if block.scope.num_updates_of(block.unit_id) != self._num_updates:
            raise ModelError(
                f"backward through a graph whose weights have changed since its forward: {block.name} was updated; "
                "call backward before optimizer.step(), or run the forward again"
            )
        totals: list[torch.Tensor | None] = [None] * len(tensors)
        with block.scope.recomputing(block.unit_id), sums.opened():
            with _random_states_kept(self._device), self._running():
                for (begin, end), random_state in zip(self._bounds, self._random_states, strict=True):
                    set_random_states(self._device, random_state)
                    leaves = self._differentiate(tensors, needs_grad, grads, begin, end)
                    for place, leaf in enumerate(leaves):
                        if leaf.grad is not None:
                            totals[place] = self._add_rows(totals[place], leaf.grad, place, begin, end)
            own = [sums.take(param) for param in block.params]
            others = sums.take_all()
        for param, grad in others:  # parameters of other modules, which this block uses without the graph's knowledge
            param.grad = grad
            block.scope.hand_over(param)
        return totals + own  # autograd rounds the totals to the arguments' dtypes

    def _differentiate(
        self,
        tensors: Sequence[torch.Tensor],
        needs_grad: Sequence[bool],
        grads: Sequence[torch.Tensor | None],
        begin: int,
        end: int,
    ) -> list[torch.Tensor]:
        """Run one slice with a graph and backward; return its arguments with their gradients."""
        rows = self._call.rows_of(tensors, begin, end)
        leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(rows, needs_grad, strict=True)]
        with torch.enable_grad():
            outputs = [leaf for leaf in tree_leaves(self._run_slice(leaves)) if isinstance(leaf, torch.Tensor)]
        roots = [
            (output, grad[begin:end])
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        if roots:
            torch.autograd.backward([output for output, _ in roots], [grad for _, grad in roots])
        return leaves

    def _add_rows(
        self, total: torch.Tensor | None, grad: torch.Tensor, place: int, begin: int, end: int
    ) -> torch.Tensor:
        """Add one slice's gradient of an argument to that of the whole argument."""
        if not self._call.is_sliced[place]:
            return summand(grad) if total is None else total.add_(grad)
        if total is None:
            total = grad.new_zeros(self._call.num_rows, *grad.shape[1:])
        total[begin:end] = grad
        return total

    def _run_slice(self, tensors: Sequence[torch.Tensor]) -> Any:
        args, kwargs = self._call.arguments(tensors)
        return self._block.forward(*args, **kwargs)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Set the block's environment: the autocast of its call, and no separate activation checkpointing."""
        flagged = [module for module in self._block.module.modules() if vars(module).get("gradient_checkpointing")]
        with ExitStack() as stack:
            for device_type, dtype, is_enabled in self._autocast:
                # Casts made without a graph must not be reused with one.
                stack.enter_context(torch.autocast(device_type, dtype, enabled=is_enabled, cache_enabled=False))
            for module in flagged:
                vars(module)["gradient_checkpointing"] = False
            try:
                yield
            finally:
                for module in flagged:
                    vars(module)["gradient_checkpointing"] = True


class _SlicedFunction(torch.autograd.Function):
    """A block's call as one node of the graph; parameters are arguments, so that each gets one gradient from it."""

    @staticmethod
    def forward(ctx: Any, sliced: _SlicedCall, num_tensors: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = inputs[:num_tensors]
        outputs = sliced.forward(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        ctx.save_for_backward(*tensors)
        ctx.sliced = sliced
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ModelError(
                "backward with create_graph=True cannot go through blocks that run in slices, because they keep no "
                "graph; set GeminiConfig(num_batch_slices=1) for gradients of gradients"
            )
        tensors = ctx.saved_tensors
        return (None, None, *ctx.sliced.backward(tensors, ctx.needs_input_grad[2 : 2 + len(tensors)], grads))


@contextmanager
def _refusing_writes(block: SlicedBlock, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Refuse a block that writes to its arguments or buffers, because backward runs it on them again."""
    named = [(f"argument {index}", tensor) for index, tensor in enumerate(tensors)]
    named += [(f"buffer {name}", buffer) for name, buffer in block.module.named_buffers()]
    versions = [(name, tensor, tensor._version) for name, tensor in named if not tensor.is_inference()]
    yield
    for name, tensor, version in versions:
        if tensor._version != version:
            raise ModelError(
                f"{block.name} wrote to its {name} in forward; code that runs in slices, and again in backward, "
                "must not change it; set GeminiConfig(num_batch_slices=1) for this model"
            )


def _autocast_state(device: torch.device) -> list[tuple[str, torch.dtype, bool]]:
    """Return device type, dtype and whether it is enabled, for each kind of autocast that may matter."""
    return [
        (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))
        for device_type in sorted({"cpu", device.type})
    ]


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Give the generators that operations on a device use their states back at the end."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(device, states)
