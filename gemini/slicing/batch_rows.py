"""The arguments and results of a block that have rows of the batch, and how to divide and join them.

[Note: Rows of a batch]
A block is assumed to treat the rows of its batch independently of each other. The batch is dimension 0 of the first
tensor among its arguments that the user does not declare shared. A tensor whose dimension 0 has another length
(position embeddings [1, ...], a mask for all rows) is shared by all slices. A tensor of the same length may be either:
a bias per head is shared, but it looks like rows where a batch has as many rows as there are heads. Lengths alone never
decide: such a tensor has rows if its argument's name and its number of dimensions say so in transformers (`ROW_DIMS`)
or in torch's own blocks (`TORCH_ROW_DIMS`), or if the user says so. It is shared if the user says so, and refused
otherwise. Every tensor that a block returns has a row for each row it was given.
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from gemini.errors import ModelError

__all__ = ["ROW_DIMS", "TORCH_ROW_DIMS", "ArgumentRules", "BlockCall", "JoinedOutputs", "slice_bounds", "take_apart"]

ROW_DIMS: Mapping[str, tuple[int, ...]] = {
    "attention_mask": (2, 4),
    "encoder_attention_mask": (2, 4),
    "encoder_decoder_position_bias": (4,),
    "encoder_hidden_states": (3,),
    "position_bias": (4,),
    "position_embeddings": (3,),
    "position_ids": (2,),
}
"""Number of dimensions that an argument of transformers' blocks has if dimension 0 is the batch; in a shared argument
that dimension is missing or 1."""
TORCH_ROW_DIMS: Mapping[str, tuple[int, ...]] = {
    "key": (3,),
    "key_padding_mask": (2,),
    "memory": (3,),
    "memory_key_padding_mask": (2,),
    "src_key_padding_mask": (2,),
    "tgt_key_padding_mask": (2,),
    "value": (3,),
}
"""Number of dimensions for `_TORCH_BLOCKS`. Other blocks may use these names with another meaning."""
_TORCH_BLOCKS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

_PLAIN_TYPES = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, type),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)
"""Arguments that mean the same to every slice. Others may hold tensors or be written to, as caches are."""


def slice_bounds(num_rows: int, num_slices: int) -> tuple[tuple[int, int], ...]:
    """Divide rows into slices whose lengths differ by at most one row.

    Args:
        num_rows: number of rows, at least one.
        num_slices: number of slices, at least one; there are never more slices than rows.

    Returns:
        First row, and one past the last row, of each slice.
    """
    count = min(num_rows, num_slices)
    edges = [num_rows * index // count for index in range(count + 1)]
    return tuple(pairwise(edges))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentRules:
    """Knowledge about a block's arguments by name, see [Note: Rows of a batch]."""

    positional_names: tuple[str, ...] = ()
    """Names of the block's parameters; a further positional argument goes by its index, for example "1"."""
    row_dims: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: ROW_DIMS)
    batch_names: Collection[str] = ()
    """Names that the user gave: arguments whose tensors have rows."""
    shared_names: Collection[str] = ()
    """Names that the user gave: arguments whose tensors are shared."""

    @staticmethod
    def of(
        module: nn.Module, *, batch_names: Collection[str] = (), shared_names: Collection[str] = ()
    ) -> ArgumentRules:
        """Read the rules from a block's class and the parameters of its forward."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        params = inspect.signature(module.forward).parameters.values()
        return ArgumentRules(
            positional_names=tuple(param.name for param in params if param.kind in positional),
            row_dims={**ROW_DIMS, **TORCH_ROW_DIMS} if isinstance(module, _TORCH_BLOCKS) else ROW_DIMS,
            batch_names=batch_names,
            shared_names=shared_names,
        )

    def name_of(self, position: int) -> str:
        """Return the name of a positional argument."""
        return self.positional_names[position] if position < len(self.positional_names) else str(position)

    def has_rows(self, name: str, shape: Sequence[int], batch_shape: Sequence[int]) -> bool | None:
        """Return whether a tensor has a row for each row of the batch.

        Args:
            name: name of the argument that the tensor is, or is part of.
            shape: the tensor's shape.
            batch_shape: shape of the batch, [num_rows, ...].

        Returns:
            Whether the tensor has rows; None if that is not known.
        """
        num_rows, *others = batch_shape
        if not shape or shape[0] != num_rows or name in self.shared_names:
            return False
        if num_rows == 1 or name in self.batch_names:
            return True
        # A mask [queries, keys] for all rows looks like one [rows, keys] if there are as many positions as rows.
        is_row_shape = len(shape) in self.row_dims.get(name, ()) and not (
            num_rows in others and len(shape) < len(batch_shape)
        )
        return True if is_row_shape else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCall:
    """The arguments of one call of a block, without their tensors."""

    leaves: tuple[Any, ...]
    """Arguments in order, with containers taken apart; None in the place of a tensor."""
    structure: TreeSpec
    places: tuple[int, ...]
    """Indices of the tensors among the leaves."""
    batch_index: int
    """Index of the batch among the tensors."""
    is_sliced: tuple[bool, ...]
    """Whether each tensor has rows of the batch."""
    num_rows: int

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments with the given tensors, one per place."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs

    def rows_of(self, tensors: Sequence[torch.Tensor], begin: int, end: int) -> list[torch.Tensor]:
        """Return the tensors of a slice: views of its rows, and shared tensors whole."""
        return [
            tensor[begin:end] if is_sliced else tensor
            for tensor, is_sliced in zip(tensors, self.is_sliced, strict=True)
        ]


def take_apart(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, block_name: str, rules: ArgumentRules
) -> tuple[BlockCall, list[torch.Tensor]] | None:
    """Separate a call's tensors from everything else.

    Args:
        args: positional arguments; tuples, lists and dictionaries in them are searched.
        kwargs: keyword arguments, searched in the same way.
        block_name: the block's name, for messages.
        rules: rules by argument name.

    Returns:
        The call and its tensors; None if no tensor can be the batch.

    Raises:
        ModelError: an argument may hold tensors that cannot be divided (a cache), or may or may not have rows.
    """
    leaves, structure = tree_flatten((args, kwargs), is_leaf=_is_leaf)
    places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    for place, leaf in enumerate(leaves):
        if place not in places and not isinstance(leaf, _PLAIN_TYPES):
            raise ModelError(
                f"argument {_path_of(place, args, kwargs)} of {block_name} is a {type(leaf).__name__}, which cannot be "
                "divided into slices: train without caches (use_cache=False in the model's configuration), or set "
                "GeminiConfig(num_batch_slices=1)"
            )
    tensors: list[torch.Tensor] = [leaves[place] for place in places]
    names = _names_of(args, kwargs, rules)
    batch_index = next((i for i, place in enumerate(places) if names[place] not in rules.shared_names), None)
    if batch_index is None:
        return None
    batch, batch_place = tensors[batch_index], places[batch_index]
    if batch.dim() == 0:
        raise ModelError(
            f"the first tensor among the arguments of {block_name} is a scalar, expected [rows, ...]; pass the batch "
            "first, or set GeminiConfig(num_batch_slices=1)"
        )
    kinds = []
    for place, tensor in zip(places, tensors, strict=True):
        kind = rules.has_rows(names[place], tensor.shape, batch.shape)
        if kind is None and tensor is batch:
            kind = True
        if kind is None:
            raise ModelError(
                f"argument {_path_of(place, args, kwargs)} of {block_name} has shape {tuple(tensor.shape)}, as many in "
                f"dimension 0 as the batch {tuple(batch.shape)} has rows: it may have one row per row of the "
                f'batch, or be shared by all rows; name "{names[place]}" in GeminiConfig.batch_arguments or in '
                f"GeminiConfig.shared_arguments; if {_path_of(batch_place, args, kwargs)}, the first tensor, is not "
                "the batch, name its argument in shared_arguments"
            )
        kinds.append(kind)
    call = BlockCall(
        leaves=tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves),
        structure=structure,
        places=places,
        batch_index=batch_index,
        is_sliced=tuple(kinds),
        num_rows=batch.shape[0],
    )
    return call, tensors


def _is_leaf(node: Any) -> bool:
    """Treat anything else that torch can take apart (for example a registered cache) as one argument."""
    return not isinstance(node, (tuple, list, dict))


def _names_of(args: tuple[Any, ...], kwargs: dict[str, Any], rules: ArgumentRules) -> list[str]:
    """Return for each leaf the name of the argument that it is part of."""
    names = [*map(rules.name_of, range(len(args))), *kwargs]
    values = [*args, *kwargs.values()]
    return [name for name, value in zip(names, values, strict=True) for _ in tree_leaves(value, is_leaf=_is_leaf)]


def _path_of(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    paths = [path for path, _ in tree_flatten_with_path((args, kwargs), is_leaf=_is_leaf)[0]]
    return keystr(paths[place][1:])


class JoinedOutputs:
    """Joins what the slices of one call return.

    Args:
        num_rows: number of rows in the whole batch.
        block_name: the block's name, for messages.
    """

    def __init__(self, num_rows: int, *, block_name: str) -> None:
        self.leaves: list[Any] = []
        """Results with containers taken apart; tensors have all rows, and the rows added so far are filled in."""
        self._structure: TreeSpec | None = None
        self._num_rows = num_rows
        self._block_name = block_name

    def add(self, output: Any, begin: int, end: int) -> None:
        """Add a copy of one slice's result.

        Args:
            output: the block's output.
            begin: first row of the slice.
            end: one past the slice's last row.

        Raises:
            ModelError: a tensor lacks rows of the slice, or a value that is not a tensor differs between slices.
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
        """Return the block's result, made of leaves in the order of `self.leaves`."""
        assert self._structure is not None
        return tree_unflatten(list(leaves), self._structure)

    def _error(self, found: str) -> ModelError:
        return ModelError(
            f"{self._block_name} returned {found}; a batch can pass through a block in slices only if every result has "
            "its rows in dimension 0; set GeminiConfig(num_batch_slices=1) for this model"
        )
