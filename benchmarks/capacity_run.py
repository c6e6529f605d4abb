"""One attempt of capacity.py, in a process of its own: some steps of one shape; prints one JSON line.

Stops as soon as more memory than allowed has been resident.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from resident_memory import peak_resident_nbytes
from step_systems import DTYPES, LR, build_model, make_deepspeed, make_plain, shape_of
from training_step import Step, training_step

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig
from gemini.assembly.blueprint import draw_blueprint
from gemini.nn import use_sliced_loss
from gemini.tiers import MemoryTier

__all__ = ["NUM_STEPS", "SYSTEMS", "Attempt", "gemini_config", "meta_model"]

SYSTEMS = ("gemini", "plain", "deepspeed")
NUM_STEPS = 3
VOCABULARY = 50257
MAX_GRAD_NORM = 1.0
RUNTIME_NBYTES = 128 << 20
"""What the process takes beside imports, plan and tensors of a size with the model's: threads, code, small blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What is to be tried."""

    system: str
    layers: int
    tokens: int
    """In one sequence, the whole batch."""
    dtype: str
    """Of working weights: a key of DTYPES."""
    ram_nbytes: int
    """Resident memory allowed."""
    base_nbytes: int
    """Resident memory of a process that has imported everything."""
    disk_nbytes: int
    """Disk allowed."""
    swap: str
    """Directory on the disk."""

    @property
    def model(self) -> str:
        """The shape's name for step_systems."""
        return f"gpt-{self.layers}"

    @property
    def num_params(self) -> int:
        """Parameters of the model, output layer tied: 12 L w^2 + 13 L w in blocks, the embeddings, the last norm."""
        width = shape_of(self.model)["n_embd"]
        positions = max(self.tokens, 64)
        return 12 * self.layers * width**2 + (13 * self.layers + VOCABULARY + positions + 2) * width

    @property
    def transient_nbytes(self) -> int:
        """Bytes of the largest tensors that come and go beside what the engine plans.

        The embedding: in float32 while it is initialised; as a gradient in backward, in half precision once for each of
        its two uses. And the float32 product that a half-precision gradient of a block's largest matrix, [width, 4
        width], is rounded from.
        """
        width = shape_of(self.model)["n_embd"]
        return 4 * VOCABULARY * width + 4 * 4 * width**2

    def to_json(self) -> str:
        """Return the attempt as the child's argument."""
        return json.dumps(dataclasses.asdict(self))


def meta_model(attempt: Attempt) -> torch.nn.Module:
    """Build the model on the meta device; few tokens keep their activations, more of them have them recomputed."""
    model = build_model(attempt.model, attempt.tokens, "meta", checkpoints=attempt.tokens > 16)
    use_sliced_loss(model)
    return model


def gemini_config(attempt: Attempt) -> GeminiConfig:
    """Return the configuration that keeps the process within the attempt's memory, and as much as possible on disk."""
    host_nbytes = attempt.ram_nbytes - attempt.base_nbytes - RUNTIME_NBYTES - attempt.transient_nbytes
    return GeminiConfig(
        device="cpu",
        dtype=DTYPES[attempt.dtype],
        host_budget=max(host_nbytes, 1),
        nvme=NVMeConfig(path=attempt.swap, budget=attempt.disk_nbytes),
        gradient_accumulation=False,
        overlap="next-forward",  # needs no second place on disk
        tile_numel=1 << 19,
    )


def make_gemini(attempt: Attempt) -> tuple[Step, dict[str, Any]]:
    """Return a step of Gemini, updates included, and what its row says beside the measurements."""
    model, config = meta_model(attempt), gemini_config(attempt)
    memory = draw_blueprint(model, config).memory
    engine = GeminiDDP(model, config)
    optimizer = HybridAdam(engine.parameters(), lr=LR, max_grad_norm=MAX_GRAD_NORM)
    train = training_step(engine, optimizer)
    num_steps_left = NUM_STEPS

    def step(batch: torch.Tensor) -> torch.Tensor:
        nonlocal num_steps_left
        loss = train(batch)
        num_steps_left -= 1
        if not num_steps_left:
            engine.runtime.finish_updates()
        return loss

    return step, {
        "disk_bytes": memory.total(MemoryTier.NVME),
        "planned_host_bytes": memory.total(MemoryTier.HOST),
        "host_bytes_by_purpose": memory.by_purpose[MemoryTier.HOST],
    }


def make_peer(attempt: Attempt) -> tuple[Step, dict[str, Any]]:
    """Return a peer's step; plain PyTorch computes in float32, the faster dtype on processors without bfloat16."""
    options = argparse.Namespace(
        system="deepspeed-nvme",
        model=attempt.model,
        batch=1,
        seq=attempt.tokens,
        dtype=attempt.dtype if attempt.system == "deepspeed" else "fp32",
        clip="active",
        swap=attempt.swap,
    )
    step, _ = (make_plain if attempt.system == "plain" else make_deepspeed)(options)
    return step, {}


def main() -> None:
    """Make the attempt that the first argument describes."""
    attempt = Attempt(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    start = time.perf_counter()
    step, extra = (make_gemini if attempt.system == "gemini" else make_peer)(attempt)
    setup_s = time.perf_counter() - start
    generator = torch.Generator().manual_seed(1)
    seconds: list[float] = []
    losses: list[float] = []
    while len(seconds) < NUM_STEPS and peak_resident_nbytes() <= attempt.ram_nbytes:
        batch = torch.randint(0, VOCABULARY, (1, attempt.tokens), generator=generator)
        start = time.perf_counter()
        losses.append(float(step(batch)))
        seconds.append(time.perf_counter() - start)
    result = {
        "steps": len(seconds),
        "peak_rss_bytes": peak_resident_nbytes(),
        "step_s": statistics.median(seconds) if seconds else None,
        "all_step_s": seconds,
        "losses": losses,
        "setup_s": setup_s,
        **extra,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
