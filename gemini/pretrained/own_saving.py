"""Models with their own way of saving: they save with all weights in memory.

The files of transformers and peft are known and are streamed. What a subclass writes in addition, or under other names,
is not known. So its `save_pretrained` runs while the model's parameters are plain tensors, and may read anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gemini.errors import CheckpointError, GeminiError, naming_file
from gemini.model.names import named_params
from gemini.pretrained.state_names import has_adapters
from gemini.weights.ownership import SHOWN_ATTRIBUTE

__all__ = ["has_own_saving", "save_by_itself", "showing"]

_KNOWN_OWNERS = ("transformers.modeling_utils", "peft.peft_model")
"""Modules whose `save_pretrained` is streamed."""
_HARMLESS_HOOKS = ("gemini.", "torch.distributed.algorithms._checkpoint.")
"""Modules whose hooks leave state dicts unchanged: this package's, and torch's wrapper of activations."""


def has_own_saving(model: torch.nn.Module) -> bool:
    """Return whether a model saves in another way than transformers or peft, so that only it can do it.

    It does if its `save_pretrained` is not theirs, if a class or hook changes its state dict, or if it has adapters
    from `add_adapter`.
    """
    saver = _owner_of(model, "save_pretrained")
    if saver is None:
        return False
    if saver not in _KNOWN_OWNERS or getattr(model, "_hf_peft_config_loaded", False):
        return True
    return not has_adapters(model) and any(map(_changes_state_dict, model.modules()))


def _owner_of(module: torch.nn.Module, method: str) -> str | None:
    """Return the name of the Python module that defines a method; None if there is no such method."""
    if method in vars(module):
        return ""
    owner = next((kind for kind in type(module).__mro__ if method in vars(kind)), None)
    return None if owner is None else owner.__module__


def _changes_state_dict(module: torch.nn.Module) -> bool:
    plain = torch.nn.Module.__module__
    if any(_owner_of(module, method) != plain for method in ("state_dict", "_save_to_state_dict")):
        return True
    hooks = [*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()]
    return not all(str(getattr(_inner(hook), "__module__", "")).startswith(_HARMLESS_HOOKS) for hook in hooks)


def _inner(hook: Any) -> Any:
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return getattr(hook, "hook", hook)  # torch's wrapper in register_state_dict_pre_hook


@contextmanager
def showing(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Make a model's parameters plain tensors while the context is open; it must not run meanwhile.

    Args:
        model: a wrapped model.
        values: values of all or some of its parameters, by canonical name. Parameters without values stay unchanged.

    Yields:
        Nothing.
    """
    name_of = {id(param): name for name, param in named_params(model)}
    shown: dict[int, torch.nn.Parameter] = {}
    places: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    for module in model.modules():
        for key, param in module._parameters.items():
            if param is not None and name_of[id(param)] in values:
                places.append((module, key, param))
                if id(param) not in shown:
                    value = values[name_of[id(param)]]
                    shown[id(param)] = torch.nn.Parameter(value, requires_grad=param.requires_grad)
    object.__setattr__(model, SHOWN_ATTRIBUTE, True)
    try:
        for module, key, param in places:
            module._parameters[key] = shown[id(param)]
        yield
    finally:
        for module, key, param in places:
            module._parameters[key] = param
        model.__dict__.pop(SHOWN_ATTRIBUTE, None)


def save_by_itself(model: Any, place: Path, *, max_shard_size: int | str | None) -> None:
    """Call a model's own `save_pretrained`, inside `showing`.

    Args:
        model: a model with its own `save_pretrained`.
        place: an empty directory.
        max_shard_size: passed on if the method knows it; None: the method's default.

    Raises:
        OffloadIOError: a file cannot be written.
        CheckpointError: the method raised another error.
    """
    save: Callable[..., Any] = model.save_pretrained
    known = inspect.signature(save).parameters.values()
    takes_size = any(each.name == "max_shard_size" or each.kind is each.VAR_KEYWORD for each in known)
    fields = {"max_shard_size": max_shard_size} if takes_size and max_shard_size is not None else {}
    try:
        with naming_file("write", place), torch.no_grad():
            save(str(place), **fields)
    except GeminiError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise CheckpointError(
            f"save_pretrained: {type(model).__name__}.save_pretrained, the model's own method, cannot save the "
            f"model ({type(error).__name__}: {error}); correct it, or use engine.state_dict()"
        ) from error
