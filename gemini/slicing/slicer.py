"""Chooses the blocks through which a large batch passes in slices, so that weights and gradients move once per step.

gemini.slicing.sliced_call runs a block in slices, see [Note: Slices] there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gemini.errors import ConfigError, ModelError
from gemini.slicing.batch_rows import ArgumentRules, take_apart
from gemini.slicing.sliced_call import SlicedBlock, UnitScope, run_in_slices

__all__ = ["BatchSlicer", "KeepFn", "find_repeated"]

KeepFn = Callable[[torch.Tensor], AbstractContextManager[None]]
"""Function that chooses, while its context is open, where autograd keeps a block's batch until backward."""


def find_repeated(class_names: Mapping[str, str]) -> set[str]:
    """Choose the modules through which a batch passes in slices: repeated ones.

    Args:
        class_names: class name of each module, by fully qualified name.

    Returns:
        Names of the modules that differ from another one of their class only in numbers: "h.0" and "h.1".
    """
    rows = {
        name: (tuple("*" if part.isdecimal() else part for part in name.split(".")), class_name)
        for name, class_name in class_names.items()
    }
    num_alike = Counter(rows.values())
    return {name for name, row in rows.items() if num_alike[row] > 1}


class BatchSlicer:
    """The sliced blocks of one model; `remove` restores their own forward.

    Without gradients a block runs unsliced: nothing is kept then, and its caches and records are those of the batch.

    Args:
        model: the user's model; the forward of its repeated blocks is replaced, inside all hooks on them.
        unit_names: module name of each unit except the root's, by unit id.
        num_slices: number of slices per batch; fewer if the batch has fewer rows.
        scope: the engine.
        batch_arguments: names of blocks' arguments whose tensors have rows of the batch.
        shared_arguments: names of blocks' arguments whose tensors all rows share.
        keep: chooses where blocks' batches are kept; None: where they are.

    Raises:
        ConfigError: the model has no repeated blocks.
        ModelError: a block does not have the rows of its batch in dimension 0.
    """

    def __init__(
        self,
        model: nn.Module,
        unit_names: Mapping[int, str],
        *,
        num_slices: int,
        scope: UnitScope,
        batch_arguments: Collection[str] = (),
        shared_arguments: Collection[str] = (),
        keep: KeepFn | None = None,
    ) -> None:
        modules = {name: model.get_submodule(name) for name in unit_names.values()}
        repeated = find_repeated({name: type(module).__name__ for name, module in modules.items()})
        if not repeated:
            raise ConfigError(
                f"GeminiConfig.num_batch_slices: expected 1 for this {type(model).__name__}, got {num_slices}: it has "
                "no repeated blocks (modules of one class in a ModuleList or Sequential) to run in slices"
            )
        self._keep = keep or (lambda _: nullcontext())
        self._replaced: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        blocks = [
            _describe(modules[name], name, unit_id=unit_id, num_slices=num_slices, scope=scope)
            for unit_id, name in unit_names.items()
            if name in repeated
        ]
        for block in blocks:
            rules = ArgumentRules.of(block.module, batch_names=batch_arguments, shared_names=shared_arguments)
            self._replaced.append((block.module, vars(block.module).get("forward")))
            block.module.forward = self._sliced_forward(block, rules)

    def remove(self) -> None:
        """Restore unsliced forwards of all blocks."""
        for module, own_forward in self._replaced:
            del module.forward
            if own_forward is not None:
                module.forward = own_forward
        self._replaced.clear()

    def _sliced_forward(self, block: SlicedBlock, rules: ArgumentRules) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return block.forward(*args, **kwargs)
            apart = take_apart(args, kwargs, block_name=block.name, rules=rules)
            if apart is None or apart[0].num_rows == 0:
                return block.forward(*args, **kwargs)
            _refuse_what_mixes_rows(block, kwargs)
            call, tensors = apart
            with self._keep(tensors[call.batch_index]):
                return run_in_slices(block, call, tensors)

        return torch.compiler.disable(forward)  # type: ignore[no-any-return, no-untyped-call]


def _describe(module: nn.Module, name: str, *, unit_id: int, num_slices: int, scope: UnitScope) -> SlicedBlock:
    block_name = f"block {name} ({type(module).__name__})"
    for inner_name, inner in module.named_modules():
        has_other_states = inner is module and isinstance(inner, nn.RNNBase)
        if has_other_states or getattr(inner, "batch_first", True) is False:
            raise ModelError(
                f"{inner_name or 'all'} of {block_name} is a {type(inner).__name__} whose inputs and outputs do "
                "not all have the batch in dimension 0; build it with batch_first=True in a block that returns "
                "hidden states only, or set GeminiConfig(num_batch_slices=1)"
            )
    return SlicedBlock(
        name=block_name,
        module=module,
        forward=module.forward,
        params=tuple(param for param in module.parameters() if param.requires_grad),
        unit_id=unit_id,
        num_slices=num_slices,
        scope=scope,
    )


def _refuse_what_mixes_rows(block: SlicedBlock, kwargs: Mapping[str, Any]) -> None:
    """Raise ModelError for anything that would give other gradients in slices, as far as it can be seen in advance."""
    for name, module in block.module.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ModelError(
                f"{name or 'all'} of {block.name} is a {type(module).__name__}, whose statistics are those of the "
                "whole batch; put it into evaluation mode, or set GeminiConfig(num_batch_slices=1)"
            )
    for name, value in kwargs.items():
        if name.startswith("output_") and name != "output_hidden_states" and value:
            raise ModelError(
                f"{block.name} was called with {name}={value!r}: its modules would record values of single "
                "slices, without gradients; turn it off, or set GeminiConfig(num_batch_slices=1)"
            )
    for name, param in block.module.named_parameters():
        if param._backward_hooks:
            raise ModelError(
                f"{name} of {block.name} has a gradient hook, which would see the gradient of every slice and then "
                "their sum; remove it, or set GeminiConfig(num_batch_slices=1)"
            )
