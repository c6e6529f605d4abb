"""Train one small model in every placement on a GPU and compare all bits: losses, masters and moments.

Prints a line of JSON for each placement. The first one, all on the device, is what the others are compared with. Called
by gpu.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_systems import LR, MAX_NORM, WEIGHT_DECAY, build_model
from training_step import training_step

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement

PLACEMENTS: dict[str, dict[str, Any]] = {
    "all on the device": {"placement": StaticPlacement(param_device=1, state_device=1)},
    "weights on the device": {"placement": StaticPlacement(param_device=1)},
    "all on the host": {"placement": StaticPlacement()},
    "all on disk": {"placement": StaticPlacement(param_nvme=1, state_nvme=1, grad_nvme=1)},
    "mixed": {
        "placement": StaticPlacement(param_device=0.3, state_device=0.2, param_nvme=0.3, state_nvme=0.4, grad_nvme=0.3)
    },
    "mixed, no prefetches": {
        "placement": StaticPlacement(param_device=0.3, state_device=0.1, param_nvme=0.2, state_nvme=0.2),
        "prefetch_depth": 0,
        "overlap": "off",
    },
    "auto": {"placement": "auto"},
}
NUM_STEPS = 4
SHAPES = {"cuda": ("llama-0.1b", 4, 512), "cpu": ("tiny", 2, 8)}
"""By device: the model, sequences in a step and tokens in a sequence."""


def train(place: str, device: str, swap: Path) -> str:
    """Return a digest of all bits that a training in one placement leaves."""
    model_name, batch, seq = SHAPES[device]
    torch.manual_seed(0)
    model = build_model(model_name, device="cpu", dtype=torch.float32, checkpoints=True)
    is_cuda = device == "cuda"
    config = GeminiConfig(
        dtype=torch.bfloat16,
        device="cuda" if is_cuda else "simulated",
        device_budget="8GiB" if is_cuda else "256MiB",
        host_budget="16GiB" if is_cuda else "256MiB",
        nvme=NVMeConfig(path=swap, budget="8GiB" if is_cuda else "256MiB"),
        tile_numel=1 << 20 if is_cuda else 4096,
        min_unit_nbytes=0,
        num_threads=None if is_cuda else 2,
        **PLACEMENTS[place],
    )
    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(1)
    vocab_size = model.config.vocab_size
    with GeminiDDP(model, config) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM)
        step = training_step(engine, optimizer)
        for _ in range(NUM_STEPS):
            ids = torch.randint(0, vocab_size, (batch, seq), generator=generator)
            digest.update(step(ids.to(device)).float().cpu().numpy().tobytes())
        for value in engine.master_state_dict().values():
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for state in optimizer.state_dict()["state"].values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def measure(device: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each placement."""
    first = None
    with tempfile.TemporaryDirectory() as swap:
        for place in PLACEMENTS:
            row = {"task": "placement", "system": f"gemini, {place}", "model": SHAPES[device][0]}
            try:
                found = train(place, device, Path(swap))
            except Exception as error:  # the others are still of interest
                yield {**row, "missing": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                continue
            first = first or found
            yield {**row, "same_bits": found == first}


def main() -> None:
    """Train in all placements and print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(SHAPES), default="cuda", help="cpu: only to see that it runs")
    device = parser.parse_args().device
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for with the next line
    torch.use_deterministic_algorithms(True, warn_only=True)  # kernels that differ from run to run would hide ours
    for row in measure(device):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
