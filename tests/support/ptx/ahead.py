"""Compiles Triton kernels for chips that are not there, and asks ptxas what they take."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

__all__ = ["Assembled", "assemble", "compile_ahead", "find_ptxas"]

WARP = 32


@dataclass(frozen=True)
class Assembled:
    """What a kernel takes on a chip."""

    num_registers: int
    """Registers of each thread."""
    num_spilled_nbytes: int
    """Bytes of each thread that do not fit in registers."""


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, int],
    *,
    multiples: Collection[str],
    capability: int,
    num_warps: int,
) -> str:
    """Return a kernel's PTX.

    Args:
        kernel: a function of triton.jit.
        signature: type of each parameter that is not in `constants`, such as "*fp32".
        constants: values of the parameters that are tl.constexpr.
        multiples: parameters that are multiples of 16, as the addresses of whole tensors are.
        capability: compute capability, such as 89.
        num_warps: warps of a program.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    order = list(types)
    source = ASTSource(
        kernel,
        types,
        {(order.index(name),): value for name, value in constants.items()},
        {(order.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    text: str = compiled.asm["ptx"]
    return text


def find_ptxas(capability: int) -> str | None:
    """Return the path of the ptxas that Triton uses for a chip, or else of the one that is installed."""
    try:
        own: str = get_ptxas(capability).path
    except RuntimeError:
        return shutil.which("ptxas")
    return own


def assemble(ptx: str, directory: Path) -> Assembled:
    """Let ptxas make machine code of PTX, and return what that takes."""
    match = re.search(r"\.target (sm_\w+)", ptx)
    assert match is not None
    (directory / "kernel.ptx").write_text(ptx)
    ptxas = find_ptxas(int(re.sub(r"\D", "", match[1])))
    assert ptxas is not None
    command = [ptxas, "-v", f"--gpu-name={match[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    spilled = sum(int(nbytes) for nbytes in re.findall(r"(\d+) bytes spill", said))
    return Assembled(num_registers=int(registers[1]), num_spilled_nbytes=spilled)
