"""The state dict of a wrapped model, read from and written to any tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gemini.chunk.layout import ParamPlace
from gemini.errors import CheckpointMismatchError
from gemini.model.extra_states import compare_extra_states, load_extra_states
from gemini.model.names import canonical_buffers, canonical_names, named_buffers, persistent_buffers
from gemini.model.tensor_parallel import local_part
from gemini.ranks.agreement import agree_on_loading
from gemini.runtime.runtime import Runtime
from gemini.weights.values import load_masters

__all__ = ["INSIDE_OF_MODULE", "ReadValue", "load_model_state", "named_values"]

ReadValue = Callable[[Runtime, ParamPlace], torch.Tensor]
"""Function that returns a parameter's values as a CPU copy in its shape: `read_working` or `read_master`."""


class _InsideOfModule(dict[str, str]):
    """Maps every name except that of the wrapped model itself to "module"."""

    def get(self, key: str, default: Any = None) -> Any:
        return default if key in self.values() else "module"


INSIDE_OF_MODULE = _InsideOfModule({"": "module"})
"""Mapping that torch.distributed.checkpoint.state_dict reads where state dicts leave out a child's name."""


def named_values(runtime: Runtime, model: torch.nn.Module, read: ReadValue) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield CPU copies of all parameters and persistent buffers; tied names share one.

    With several ranks all must take all of them.

    Args:
        runtime: the engine's runtime.
        model: the wrapped model.
        read: reads the values.

    Yields:
        Name and values.
    """
    runtime.finish_updates()
    values: dict[str, torch.Tensor] = {}
    places = runtime.layout.place_by_name
    for name, canonical in canonical_names(model).items():
        if canonical not in values:
            values[canonical] = read(runtime, places[canonical])
        yield name, values[canonical]
    buffers = {name: local_part(buffer).detach().cpu().clone() for name, buffer in persistent_buffers(model).items()}
    for name, canonical in canonical_buffers(model).items():
        yield name, buffers[canonical]


def load_model_state(
    runtime: Runtime, model: torch.nn.Module, state_dict: Mapping[str, Any], *, strict: bool
) -> tuple[list[str], list[str]]:
    """Load weights, buffers and modules' extra state; see GeminiDDP.load_state_dict.

    Args:
        runtime: the engine's runtime.
        model: the wrapped model.
        state_dict: a state dict of this model, plain or wrapped.
        strict: whether names must match exactly.

    Returns:
        Missing and unexpected names.

    Raises:
        CheckpointMismatchError: names or shapes do not match, here or on another rank; nothing has been loaded.
    """
    places = runtime.layout.place_by_name
    missing, unexpected, mismatch = _compare_names(model, places, state_dict, strict=strict)
    agree_on_loading(runtime.sharding, mismatch, state_dict)
    params, buffers = canonical_names(model), dict(named_buffers(model))
    runtime.finish_updates()
    load_masters(runtime, ((places[params[name]], value) for name, value in state_dict.items() if name in params))
    for name, value in state_dict.items():
        if name not in params and name in buffers:
            local_part(buffers[name]).copy_(value)
    load_extra_states(model, state_dict)
    return missing, unexpected


def _compare_names(
    model: torch.nn.Module, places: Mapping[str, ParamPlace], state_dict: Mapping[str, Any], *, strict: bool
) -> tuple[list[str], list[str], CheckpointMismatchError | None]:
    """Compare a state dict with what a model's engine holds.

    Args:
        model: the wrapped model.
        places: places of its parameters, by name.
        state_dict: the state dict to be loaded.
        strict: whether names must match exactly.

    Returns:
        Missing names, unexpected names, and the error that prevents loading the rest, if there is one.
    """
    params = canonical_names(model)
    buffers = dict(named_buffers(model))
    canonical = params | canonical_buffers(model)
    given = {canonical.get(name, name) for name in state_dict}
    expected = dict.fromkeys(canonical.values())
    extra = compare_extra_states(model, state_dict)
    missing = [name for name in expected if name not in given] + extra.missing
    unexpected = [
        name for name in state_dict if name not in params and name not in buffers and name not in extra.loadable
    ]
    if strict and (missing or unexpected):
        what = f"load_state_dict: missing {missing}, unexpected {unexpected}"
        return missing, unexpected, CheckpointMismatchError(what)
    for name, value in state_dict.items():
        if name in unexpected or name in extra.loadable:
            continue
        shape = places[params[name]].spec.full_shape if name in params else buffers[name].shape
        if not isinstance(value, torch.Tensor):
            what = f"load_state_dict: {name} is a {type(value).__name__}, expected a tensor of shape {tuple(shape)}"
            return missing, unexpected, CheckpointMismatchError(what)
        if tuple(value.shape) != tuple(shape):
            what = f"load_state_dict: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}"
            return missing, unexpected, CheckpointMismatchError(what)
    return missing, unexpected, None
