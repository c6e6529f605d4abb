"""peft's adapters: which weights are theirs, and the files that describe them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemini.errors import ConfigError, naming_file
from gemini.pretrained.conversions import Conversion
from gemini.pretrained.files import ADAPTER_FILE

__all__ = ["adapter_files", "write_adapter_configs"]


def adapter_files(model: Any, state: Mapping[str, torch.Tensor]) -> list[tuple[str, tuple[Conversion, ...]]]:
    """Find out what peft saves of a model.

    Args:
        model: with adapters.
        state: the model's weights by name, on the meta device.

    Returns:
        The files, one for each adapter, and what goes into them under which name.

    Raises:
        ConfigError: peft computes what it saves from the weights, which is not supported.
    """
    from peft import get_peft_model_state_dict

    name_of = {id(tensor): name for name, tensor in state.items()}
    files = []
    for adapter in model.peft_config:
        saved = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=adapter)
        computed = [name for name, tensor in saved.items() if id(tensor) not in name_of]
        if computed:
            raise ConfigError(
                f"save_pretrained: adapter {adapter}: peft computes {computed[0]} when it saves, which only "
                "engine.module.save_pretrained(...) can do, in memory"
            )
        conversions = tuple(Conversion((name_of[id(tensor)],), (name,)) for name, tensor in saved.items())
        files.append((ADAPTER_FILE if adapter == "default" else f"{adapter}/{ADAPTER_FILE}", conversions))
    return files


def write_adapter_configs(model: Any, state: Mapping[str, torch.Tensor], place: Path) -> None:
    """Let peft write everything but the weights.

    Args:
        model: with adapters.
        state: the model's weights, by name.
        place: an empty directory.

    Raises:
        OffloadIOError: something cannot be written.
    """
    with naming_file("write", place):
        model.save_pretrained(str(place), state_dict={name: torch.empty(0) for name in state})
        for file in place.rglob(ADAPTER_FILE):
            file.unlink()
