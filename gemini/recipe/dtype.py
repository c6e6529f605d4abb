"""Chooses the working dtype in which this machine computes fastest."""

from __future__ import annotations

import time

import torch

__all__ = ["DTYPES", "choose_dtype"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dtypes by the names in settings."""


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the working dtype and the reason.

    Processors without bfloat16 instructions emulate them, up to a hundred times slower than float32; others run
    bfloat16 several times faster. So "auto" on the CPU measures a small matrix product in both, in well under a second.

    Args:
        name: "bf16", "fp16", "fp32" or "auto".
        device: the compute device.

    Returns:
        The dtype, and a phrase that explains it to users.
    """
    if name in DTYPES:
        return DTYPES[name], f"{name}, as asked for"
    if device.type != "cpu":
        return torch.bfloat16, "bf16"
    rates = {key: _matmul_gflops(DTYPES[key]) for key in ("bf16", "fp32")}
    fastest = "bf16" if rates["bf16"] >= rates["fp32"] else "fp32"
    shown = ", ".join(f"{rate:.3g} in {key}" for key, rate in rates.items())
    return DTYPES[fastest], f"{fastest} (GFLOP/s of a matrix product: {shown})"


def _matmul_gflops(dtype: torch.dtype) -> float:
    left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(8):  # the first run warms up
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * 128 * 512 * 512 / min(seconds) / 1e9
