"""Checkpoint directories and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from model_zoo import HF_CASES
from safetensors.torch import load_file, save_file
from torch import nn
from training_harness import Case

SEED = 3


def plain_model(name: str) -> Any:
    """Return a tiny transformers model with random values everywhere, in evaluation mode."""
    model = HF_CASES[name].model(seed=SEED).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for param in model.parameters():  # norms and biases begin as ones and zeros, which would hide a mix-up
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.02)
    return model


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a directory's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rewrite(directory: Path, change: Any) -> None:
    """Let a function change the tensors of a directory's only safetensors file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def config_of(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return fields


@torch.no_grad()
def outputs(model: nn.Module, case: Case) -> list[torch.Tensor]:
    """Return all tensors that a model in evaluation mode gives for a batch."""
    return [value for value in model(**case.batches(1)[0]).to_tuple() if isinstance(value, torch.Tensor)]


def same_outputs(model: nn.Module, expected: nn.Module, case: Case) -> bool:
    """Return whether two models give the same bits for a batch."""
    pairs = zip(outputs(model, case), outputs(expected, case), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)
