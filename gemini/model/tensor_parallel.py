"""Parameters that torch.distributed.tensor has divided among ranks: this rank's part, and the memory that shows it.

A chunk holds the local part of each DTensor. The DTensor itself remains the model's parameter, and its local tensor
shows the chunk. Nothing here imports torch.distributed.tensor, so a process without DTensors does not load it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemini.errors import ModelError

__all__ = [
    "TensorSplit",
    "is_dtensor",
    "local_part",
    "show_values",
    "split_of",
    "placeholder_like",
    "take_local_gradient",
    "with_local_part",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSplit:
    """The division of a parameter among a tensor-parallel group: equal parts of one dimension."""

    dim: int
    rank: int
    """This rank's place in the group, from 0."""
    num_ranks: int

    def full_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the whole parameter, given that of a part."""
        return (*shape[: self.dim], shape[self.dim] * self.num_ranks, *shape[self.dim + 1 :])

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a whole parameter, a view."""
        return whole.chunk(self.num_ranks, self.dim)[self.rank]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the whole parameter, given the parts of all ranks in their order."""
        return torch.cat(list(parts), self.dim)


def is_dtensor(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor: the local tensor of a DTensor, otherwise the tensor itself."""
    local: torch.Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local


def show_values(param: torch.Tensor, values: torch.Tensor) -> None:
    """Make a parameter show other memory.

    Args:
        param: a parameter or tensor, or a DTensor of the same dtype.
        values: tensor with the shape of what this rank holds of the parameter.
    """
    if is_dtensor(param):
        param._local_tensor = values.data  # type: ignore[attr-defined]
    else:
        param.data = values


def split_of(name: str, param: torch.Tensor) -> TensorSplit | None:
    """Return the division of a parameter.

    Args:
        name: the parameter's name, for messages.
        param: any parameter.

    Returns:
        The division; None if this rank holds all of the parameter.

    Raises:
        ModelError: it is a DTensor divided in a way that chunks cannot hold.
    """
    if not is_dtensor(param):
        return None
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1:
        raise ModelError(
            f"parameter {name} is a DTensor on a mesh of {mesh.ndim} dimensions: expected one, that of tensor "
            'parallelism; call parallelize_module with mesh["tp"], and give mesh["dp"] to zero.shard'
        )
    (placement,) = placements
    if placement.is_replicate():
        return None
    if type(placement).__name__ != "Shard":
        raise ModelError(f"parameter {name} has placement {placement}: expected Shard or Replicate")
    extent, num_ranks = param.shape[placement.dim], mesh.size()
    if extent % num_ranks:
        raise ModelError(
            f"parameter {name} has {extent} elements in dimension {placement.dim}, which {num_ranks} ranks cannot "
            "share equally: choose sizes that they divide, or leave the module out of the parallelize plan"
        )
    return TensorSplit(dim=placement.dim, rank=mesh.get_local_rank(), num_ranks=num_ranks)


def take_local_gradient(param: torch.Tensor) -> torch.Tensor:
    """Take the gradient of this rank's part of a parameter out of `param.grad`.

    A DTensor's gradient may be partial sums, or divided in another way; then all ranks of its mesh exchange.

    Args:
        param: the parameter; left without a gradient.

    Returns:
        The gradient, of the local part's shape.
    """
    grad, param.grad = param.grad, None
    assert grad is not None
    if not is_dtensor(param):
        return grad
    with torch.no_grad():
        local: torch.Tensor = grad.redistribute(placements=param.placements).to_local()  # type: ignore[attr-defined]
        return local.wait() if hasattr(local, "wait") else local


def placeholder_like(param: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Return a tensor without values that is divided like a parameter and has another dtype or device.

    Args:
        param: a parameter.
        missing: a scalar of that dtype and device, which every element shows.

    Returns:
        A DTensor if the parameter is one.
    """
    shown = missing.expand(local_part(param).shape)
    if not is_dtensor(param):
        return shown
    return type(param).from_local(  # type: ignore[attr-defined,no-any-return]
        shown,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def with_local_part(tensor_type: type[torch.Tensor], local: torch.Tensor, spec: Any) -> torch.Tensor:
    """Return a DTensor made of its local part.

    Args:
        tensor_type: DTensor.
        local: the part.
        spec: mesh, placements and shape of the whole, in DTensor's form.

    Returns:
        The DTensor, which is not a leaf of any graph.
    """
    make: Callable[..., torch.Tensor] = tensor_type
    return make(local, spec, requires_grad=False)
