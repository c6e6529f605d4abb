"""peft's adapters: their weights, and the files that describe them.

[Note: Adapters that peft computes]
Most adapters are parameters and buffers that are saved under other names. peft is run with tensors on the meta device
to learn these names, and the values are streamed. Some adapters are computed when they are saved: prompts by their
encoder, those of VB-LoRA and AdaLoRA from logits and ranks. For these, peft runs once more, with the adapters' own
weights in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from gemini.errors import ConfigError, naming_file
from gemini.pretrained.conversions import Conversion
from gemini.pretrained.files import ADAPTER_FILE
from gemini.pretrained.own_saving import showing
from gemini.pretrained.state_names import state_names

__all__ = ["Adapters", "find_adapters", "write_adapter_configs"]


class Weights(Protocol):
    """A model's weights and persistent buffers, as they will be saved."""

    state: dict[str, torch.Tensor]
    """Tensors on the meta device, by name."""
    canonical: dict[str, str]
    """First name of a parameter, by each of its names."""

    def read(self, name: str) -> torch.Tensor:
        """Return the values as CPU copies."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters that peft saves for a model."""

    files: list[tuple[str, tuple[Conversion, ...]]]
    """Path of each adapter, and the conversions that give its content by name."""
    values: dict[str, torch.Tensor]
    """All of the adapters' own weights if peft computes something from them; otherwise empty."""


def find_adapters(model: Any, weights: Weights) -> Adapters:
    """Find the adapters that peft saves for a model; see [Note: Adapters that peft computes]. All ranks call.

    Args:
        model: a model with adapters.
        weights: the model's weights.

    Returns:
        Files and values.

    Raises:
        ConfigError: peft computes saved values from the base model's weights.
    """
    files: list[tuple[str, tuple[Conversion, ...]]] = []
    values: dict[str, torch.Tensor] = {}
    for adapter in model.peft_config:
        file = ADAPTER_FILE if adapter == "default" else f"{adapter}/{ADAPTER_FILE}"
        try:
            conversions, is_computed = _conversions(model, adapter, weights.state)
        except Exception:  # errors of many types: computations that need values fail without them
            conversions, is_computed = [], True
        if is_computed:
            values = values or {name: weights.read(name) for name in _own_names(model, weights)}
            with _showing(model, values, weights.canonical):
                conversions, _ = _conversions(model, adapter, weights.state | values)
        for conversion in conversions:
            if conversion.convert is not None and conversion.convert({})[conversion.targets[0]].is_meta:
                raise ConfigError(
                    f"save_pretrained: adapter {adapter}: peft computes {conversion.targets[0]} from the base model's "
                    "weights when it saves: save with plain peft, after plain.load_state_dict(engine.state_dict())"
                )
        files.append((file, tuple(conversions)))
    return Adapters(files, values)


def _own_names(model: Any, weights: Weights) -> list[str]:
    """Return the names of what is an adapter's and not the base model's."""
    base = {place for places in state_names(model).values() for place in places}
    return [name for name in weights.state if name not in base]


def _showing(model: Any, values: Mapping[str, torch.Tensor], canonical: Mapping[str, str]) -> Any:
    return showing(model, {canonical[name]: value for name, value in values.items() if name in canonical})


def _conversions(model: Any, adapter: str, state: Mapping[str, torch.Tensor]) -> tuple[list[Conversion], bool]:
    """Return what peft makes of a state dict, and whether it has computed some of it."""
    from peft import get_peft_model_state_dict

    name_of = {id(tensor): name for name, tensor in state.items()}
    saved = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=adapter)
    conversions = []
    is_computed = False
    for target, tensor in saved.items():
        source = name_of.get(id(tensor))
        if source is not None:
            conversions.append(Conversion((source,), (target,)))
            continue
        is_computed = True
        value = tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)
        conversions.append(Conversion((), (target,), _Computed(target, value)))
    return conversions, is_computed


@dataclass(frozen=True, slots=True)
class _Computed:
    """Return a conversion without sources whose target is a given tensor."""

    target: str
    value: torch.Tensor

    def __call__(self, sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.target: self.value}


def write_adapter_configs(model: Any, weights: Weights, adapters: Adapters, place: Path) -> None:
    """Have peft write everything except the weights, on the first rank only.

    Args:
        model: a model with adapters.
        weights: the model's weights.
        adapters: the result of `find_adapters`.
        place: an empty directory.

    Raises:
        OffloadIOError: a file cannot be written.
    """
    state = {name: torch.empty(0) for name in weights.state} | adapters.values
    modes = [(config, config.inference_mode) for config in model.peft_config.values()]
    try:
        for config, _ in modes:
            config.inference_mode = True  # as saved; and no prompt encoder runs, whose weights all ranks gather
        with naming_file("write", place), _showing(model, adapters.values, weights.canonical):
            model.save_pretrained(str(place), state_dict=state)
            for file in place.rglob(ADAPTER_FILE):
                file.unlink()
    finally:
        for config, mode in modes:
            config.inference_mode = mode
