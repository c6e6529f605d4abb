"""Which of a block's arguments and results have rows of the batch, and how these are taken apart and put together.

[Note: Rows of a batch]
A block is taken to treat the rows of its batch independently of each other. The batch is dimension 0 of the first
tensor among its arguments. A tensor whose dimension 0 is as long has a row for each row of the batch; any other tensor
(position embeddings [1, ...], a mask for all rows) is shared by all slices. Where another dimension of the first tensor
is as long as the batch, a tensor of fewer dimensions could be either, and is refused. Every tensor that a block returns
has a row for each row it was given.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from gemini.errors import ModelError

__all__ = ["BlockCall", "JoinedOutputs", "has_rows", "slice_bounds", "take_apart"]

_PLAIN_TYPES = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)
"""Arguments that mean the same to every slice. Anything else may hold tensors or be written to, as caches are."""


def slice_bounds(num_rows: int, num_slices: int) -> tuple[tuple[int, int], ...]:
    """Divide rows into slices that differ by one row at most.

    Args:
        num_rows: rows to divide, at least one.
        num_slices: slices wanted, at least one; there are no more slices than rows.

    Returns:
        First row and one past the last row of each slice.
    """
    count = min(num_rows, num_slices)
    edges = [num_rows * index // count for index in range(count + 1)]
    return tuple(pairwise(edges))


def has_rows(shape: Sequence[int], first_shape: Sequence[int]) -> bool | None:
    """Return whether a tensor has a row for each row of the batch, see [Note: Rows of a batch].

    Args:
        shape: the tensor's.
        first_shape: of the first tensor among the arguments, [num_rows, ...].

    Returns:
        None if it cannot be told.
    """
    num_rows, *others = first_shape
    if not shape or shape[0] != num_rows:
        return False
    return None if num_rows in others and len(shape) < len(first_shape) else True


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCall:
    """The arguments of one call of a block, without their tensors."""

    leaves: tuple[Any, ...]
    """All arguments in order, containers taken apart; None in the place of a tensor."""
    structure: TreeSpec
    places: tuple[int, ...]
    """Where among the leaves the tensors belong; the first one's rows are the batch."""
    is_sliced: tuple[bool, ...]
    """For each tensor whether it has rows of the batch."""
    num_rows: int

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments with these tensors, one for each place."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs

    def rows_of(self, tensors: Sequence[torch.Tensor], begin: int, end: int) -> list[torch.Tensor]:
        """Return the tensors that a slice works with: views of its rows, or the whole of what is shared."""
        return [
            tensor[begin:end] if is_sliced else tensor
            for tensor, is_sliced in zip(tensors, self.is_sliced, strict=True)
        ]


def take_apart(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, block_name: str
) -> tuple[BlockCall, list[torch.Tensor]] | None:
    """Separate a call's tensors from everything else.

    Args:
        args: positional arguments; tuples, lists and dictionaries in them are looked into.
        kwargs: keyword arguments.
        block_name: for messages.

    Returns:
        The call and its tensors; None if there are no tensors, and so no batch.

    Raises:
        ModelError: an argument may hold tensors that nobody can divide (a cache), or may or may not have rows.
    """
    leaves, structure = tree_flatten((args, kwargs), is_leaf=_is_leaf)
    places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    for place, leaf in enumerate(leaves):
        if place not in places and not isinstance(leaf, _PLAIN_TYPES):
            raise ModelError(
                f"argument {_name_of(place, args, kwargs)} of {block_name} is a {type(leaf).__name__}, which cannot be "
                "divided into slices: train without caches (use_cache=False in the model's configuration), or set "
                "GeminiConfig(num_batch_slices=1)"
            )
    if not places:
        return None
    tensors: list[torch.Tensor] = [leaves[place] for place in places]
    if tensors[0].dim() == 0:
        raise ModelError(
            f"the first tensor among the arguments of {block_name} is a scalar, expected [rows, ...]; pass the batch "
            "first, or set GeminiConfig(num_batch_slices=1)"
        )
    kinds = [True, *(has_rows(tensor.shape, tensors[0].shape) for tensor in tensors[1:])]
    if None in kinds:
        place = places[kinds.index(None)]
        raise ModelError(
            f"argument {_name_of(place, args, kwargs)} of {block_name} has shape {tuple(leaves[place].shape)}, and the "
            f"batch {tuple(tensors[0].shape)} is as long in another dimension: whether the argument belongs to rows of "
            "the batch cannot be told; use a batch of another length"
        )
    call = BlockCall(
        leaves=tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        structure=structure,
        places=places,
        is_sliced=tuple(map(bool, kinds)),
        num_rows=tensors[0].shape[0],
    )
    return call, tensors


def _is_leaf(node: Any) -> bool:
    """Whatever else torch can take apart (a registered cache, say) is one argument here."""
    return not isinstance(node, (tuple, list, dict))


def _name_of(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    paths = [path for path, _ in tree_flatten_with_path((args, kwargs), is_leaf=_is_leaf)[0]]
    return keystr(paths[place][1:])


class JoinedOutputs:
    """Puts together what the slices of one call return.

    Args:
        num_rows: rows of the whole batch.
        block_name: for messages.
    """

    def __init__(self, num_rows: int, *, block_name: str) -> None:
        self.leaves: list[Any] = []
        """Containers taken apart; tensors have all rows, of which those added so far are filled in."""
        self._structure: TreeSpec | None = None
        self._num_rows = num_rows
        self._block_name = block_name

    def add(self, output: Any, begin: int, end: int) -> None:
        """Take one slice's result, which is copied.

        Args:
            output: what the block returned.
            begin: the slice's first row.
            end: one past its last row.

        Raises:
            ModelError: a tensor lacks rows of the slice, or what is no tensor differs between slices.
        """
        leaves, structure = tree_flatten(output)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and (leaf.dim() == 0 or leaf.shape[0] != end - begin):
                raise self._error(f"a tensor of shape {tuple(leaf.shape)} for a slice of {end - begin} rows")
            if not isinstance(leaf, (torch.Tensor, *_PLAIN_TYPES)):
                raise self._error(f"a {type(leaf).__name__}")
        if self._structure is None:
            self._structure = structure
            self.leaves = [
                leaf.new_empty(self._num_rows, *leaf.shape[1:]) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in leaves
            ]
        elif structure != self._structure:
            raise self._error("another structure for one slice than for the next")
        for whole, leaf in zip(self.leaves, leaves, strict=True):
            if isinstance(whole, torch.Tensor) and isinstance(leaf, torch.Tensor) and whole.shape[1:] == leaf.shape[1:]:
                whole[begin:end].copy_(leaf)
            elif isinstance(whole, torch.Tensor) or whole != leaf:
                raise self._error("another value or shape for one slice than for the next")

    def build(self, leaves: Sequence[Any]) -> Any:
        """Return the block's result made of leaves in the order of `self.leaves`."""
        assert self._structure is not None
        return tree_unflatten(list(leaves), self._structure)

    def _error(self, found: str) -> ModelError:
        return ModelError(
            f"{self._block_name} returned {found}; a batch can pass through a block in slices only if every result has "
            "its rows in dimension 0; set GeminiConfig(num_batch_slices=1) for this model"
        )
