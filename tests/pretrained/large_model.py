"""Load and save a model of GPT-2 large's shape, the embedding of which is trained; say what that takes in memory."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers

from gemini import GeminiConfig, GeminiDDP, MemoryTier, NVMeConfig, StaticPlacement

HOST_BUDGET_NBYTES = 1 << 30


def resident_nbytes(key: str) -> int:
    """Return what the kernel counts now ("VmRSS") or counted at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def start_peak() -> int:
    """Let the peak be what is resident now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_nbytes("VmRSS:")


def main(stored: Path, saved: Path, swap: Path) -> dict[str, float]:
    """Return bytes and seconds."""
    config = GeminiConfig(
        device="cpu",
        host_budget=HOST_BUDGET_NBYTES,
        nvme=NVMeConfig(path=swap, budget="16GB"),
        placement=StaticPlacement(param_nvme=1, state_nvme=1, grad_nvme=1),
        gradient_accumulation=False,
        overlap="off",
        num_threads=2,
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(stored))
    for name, param in model.named_parameters():
        param.requires_grad_("wte" in name)  # of all others there is no state to fill the drive with
    before = start_peak()
    began = time.perf_counter()
    with GeminiDDP(model, config, weights=stored) as engine:
        loaded = time.perf_counter()
        loading_peak = resident_nbytes("VmHWM:") - before
        planned = engine.runtime.resources.ledger.peak_nbytes(MemoryTier.HOST)
        before_saving = start_peak()
        engine.save_pretrained(saved, max_shard_size="1GB")
        saving_peak = resident_nbytes("VmHWM:") - before_saving
        saving_s = time.perf_counter() - loaded
        before_checkpoint = start_peak()
        path = engine.save_checkpoint(saved / "checkpoint").wait()
        checkpoint_peak = resident_nbytes("VmHWM:") - before_checkpoint
        before_resuming = start_peak()
        engine.load_checkpoint(path)
        return {
            "planned": planned,
            "loading_peak": loading_peak,
            "saving_peak": saving_peak,
            "checkpoint_peak": checkpoint_peak,
            "resuming_peak": resident_nbytes("VmHWM:") - before_resuming,
            "loading_s": loaded - began,
            "saving_s": saving_s,
        }
