"""transformers' changes to names and shapes of weights between a checkpoint and a model, one conversion at a time.

Most tensors are at most renamed. Some models compute with weights in another form than the stored one, for example with
all experts of a layer in one tensor. A *conversion* then takes several tensors to several others, and needs them whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gemini.errors import CheckpointMismatchError, ConfigError

__all__ = [
    "Conversion",
    "ignored_names",
    "import_transformers",
    "is_transformers_model",
    "match_names",
    "save_conversions",
]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion of some tensors into others."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    """Function from all sources to all targets, by name, in memory or on the meta device; None if the only source is
    the only target, unchanged."""


def is_transformers_model(model: torch.nn.Module) -> bool:
    """Return whether a model is one of transformers' own."""
    return hasattr(model, "base_model_prefix") and callable(getattr(model, "save_pretrained", None))


def import_transformers(what: str) -> tuple[Any, Any]:
    """Import the needed modules of transformers.

    Args:
        what: the caller, for the message.

    Returns:
        The modules `transformers` and `transformers.core_model_loading`.

    Raises:
        ConfigError: transformers is not installed, or too old.
    """
    try:
        import transformers
        from transformers import core_model_loading
    except ImportError as error:
        raise ConfigError(f"{what} needs transformers 5 or later: pip install 'transformers>=5' ({error})") from error
    return transformers, core_model_loading


def _conversions_of(model: Any, *, with_legacy: bool) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, add_legacy=with_legacy))


def match_names(
    model: Any, state: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> tuple[list[Conversion], list[str]]:
    """Find out how a checkpoint's tensors become a model's, in the way of `from_pretrained`.

    Args:
        model: a model of transformers; it remembers the renamings that its checkpoint needed, and saving undoes them.
        state: the model's parameters and persistent buffers, by name; only shapes count.
        stored: the checkpoint's tensors, on the meta device.

    Returns:
        Conversions, whose targets are names in `state`, and the names without a place in the model.

    Raises:
        CheckpointMismatchError: tensors cannot be converted.
        ConfigError: transformers is missing or too old.
    """
    _, loading = import_transformers("loading a transformers model's checkpoint")
    transforms = _conversions_of(model, with_legacy=True)
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, list[tuple[str, str | None]]] = {}
    unexpected: list[str] = []
    for name in sorted(stored, key=loading.dot_natural_key):
        renamed, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # it already has its name
            renamed, pattern = loading.rename_source_key(name, [], [], prefix, state)
        if renamed in state:
            groups.setdefault(renamed, []).append((name, pattern))
        elif pattern is None:
            unexpected.append(renamed)
        else:
            targets = converter_of[pattern].target_patterns
            unexpected += [renamed.replace(targets[0], target) for target in targets]
    model._weight_conversions = [each for each in transforms if each.was_used()]
    conversions = []
    for target, sources in groups.items():
        name, pattern = sources[0]
        if pattern is None:
            conversions.append(Conversion((name,), (target,)))
        else:
            conversions.append(_loading_conversion(model, converter_of[pattern], target, sources, stored))
    return conversions, list(dict.fromkeys(unexpected))


def _loading_conversion(
    model: Any,
    converter: Any,
    target: str,
    sources: list[tuple[str, str | None]],
    stored: Mapping[str, torch.Tensor],
) -> Conversion:
    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        transform = copy.deepcopy(converter)
        for name, pattern in sources:
            transform.add_tensor(target, name, pattern, tensors.pop(name))
        converted = transform.convert(target, model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in converted.items()}

    names = tuple(name for name, _ in sources)
    try:
        targets = tuple(convert({name: stored[name] for name in names}))
    except Exception as error:  # transformers' operations raise errors of any type
        raise CheckpointMismatchError(
            f"{target}: cannot be made from the {len(names)} tensors of the checkpoint, such as {names[0]}: "
            f"{type(error).__name__}: {error}; is it complete, and of this model?"
        ) from error
    return Conversion(names, targets, convert)


def save_conversions(model: Any, state: Mapping[str, torch.Tensor]) -> list[Conversion]:
    """Find out how a model's tensors become a checkpoint's, in the way of transformers' `save_pretrained`.

    Args:
        model: a model of transformers.
        state: the tensors to be saved, by name in the model, on the meta device.

    Returns:
        Conversions, whose sources are names in `state`; together they use each name.

    Raises:
        ConfigError: transformers is missing or too old.
    """
    _, loading = import_transformers("saving a transformers model")

    def revert(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        reverted: dict[str, torch.Tensor] = loading.revert_weight_conversion(model, dict(tensors))
        return reverted

    name_of = {id(tensor): name for name, tensor in state.items()}
    target_of = {name_of[id(each)]: target for target, each in revert(state).items() if id(each) in name_of}
    conversions = [Conversion((name,), (target_of[name],)) for name in state if name in target_of]
    for sources in _groups_converted_together(model, [name for name in state if name not in target_of]):
        targets = tuple(revert({name: state[name] for name in sources}))
        conversions.append(Conversion(sources, targets, revert))
    return conversions


def _groups_converted_together(model: Any, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group tensors by the conversion that restores their stored form."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = _conversions_of(model, with_legacy=False)
    converters = [each.reverse_transform() for each in reversed(transforms) if hasattr(each, "operations")]
    groups: dict[str, list[str]] = {}
    for name in names:
        renamed = ((each, *each.rename_source_key(name)) for each in converters)
        number, target = next((id(each), target) for each, target, pattern in renamed if pattern is not None)
        groups.setdefault(f"{number} {target}", []).append(name)
    return [tuple(group) for group in groups.values()]


def ignored_names(model: Any, names: Iterable[str], *, attribute: str) -> set[str]:
    """Return the names that a transformers model declares irrelevant.

    Args:
        model: a model of transformers, or any other.
        names: names in its state dict or in a checkpoint.
        attribute: name of one of its lists of patterns, such as "_keys_to_ignore_on_load_missing".

    Returns:
        The declared ones among `names`.
    """
    patterns = [*(getattr(model, attribute, None) or ())]
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
