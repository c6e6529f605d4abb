"""The ranks among which torch.distributed.tensor.parallel has already divided a model's parameters."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gemini.errors import ConfigError, ModelError
from gemini.model.tensor_parallel import is_dtensor, split_of
from gemini.ranks.sharding import ShardGroup

__all__ = ["check_grid", "find_tensor_mesh"]

_REMEDY = 'make one mesh of ("dp", "tp"), call parallelize_module with mesh["tp"], and give mesh["dp"] to zero.shard'


def find_tensor_mesh(model: torch.nn.Module, mesh: DeviceMesh | None, device: torch.device) -> DeviceMesh | None:
    """Return the mesh of a model's tensor parallelism.

    Args:
        model: a model after parallelize_module.
        mesh: the mesh given to zero.shard.
        device: device on which the model computes.

    Returns:
        The mesh of its DTensors; None if there are none.

    Raises:
        ConfigError: the mesh and the other mesh do not form a grid.
        ModelError: DTensors have several meshes, or are divided in a way that chunks cannot hold.
    """
    first_name, found = "", None
    for name, param in model.named_parameters():
        if not is_dtensor(param):
            continue
        split_of(name, param)  # before a mesh of several dimensions is asked for its group
        own: DeviceMesh = param.device_mesh  # type: ignore[attr-defined]
        if found is None:
            first_name, found = name, own
        if own != found:
            raise ModelError(
                f"parameters {first_name} and {name} are DTensors on different meshes, {found} and {own}: divide "
                "all parameters over one mesh of one dimension"
            )
    if found is None:
        return None
    if mesh is None:
        raise ConfigError(
            f"zero.shard: mesh: parameter {first_name} is a DTensor on {found}, so not every rank trains on its "
            f"own batches: {_REMEDY}"
        )
    common = set(found.mesh.flatten().tolist()) & set(mesh.mesh.flatten().tolist())
    if common != {dist.get_rank()}:
        raise ConfigError(
            f"zero.shard: mesh: parameter {first_name} is a DTensor on {found}, which shares ranks {sorted(common)} "
            f"with {mesh}, expected rank {dist.get_rank()} alone: {_REMEDY}"
        )
    if found.device_type != device.type:
        raise ConfigError(
            f"zero.shard: parameter {first_name} is a DTensor on {found}, but the model computes on {device}: use one "
            "kind of device for both"
        )
    return found


def check_grid(group: ShardGroup) -> None:
    """Check that every rank has exactly one place in the grid.

    Args:
        group: the ranks.

    Raises:
        ConfigError: some ranks have none, or several.
    """
    if len(set(group.ranks)) != len(group.ranks):
        raise ConfigError(
            f"zero.shard: mesh: with tensor parallelism it gives the grid of ranks {list(group.ranks)}, in which "
            f"some ranks occur several times: {_REMEDY}"
        )
