"""The Triton kernels as PTX: compiled ahead for chips of five generations, and executed, bit for bit as on the CPU.

No GPU is needed. What a chip makes of the PTX is ptxas's and NVIDIA's; the operations and their roundings are there.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from device_tiles import copy_tile, make_tile, make_values
from torch import Tensor

from gemini.kernels.adam_tile import AdamTile, StateFormat, state_format_of
from gemini.kernels.cpu import GradMode, adam_update, store_gradient
from gemini.kernels.device_tile import SUM_BLOCK_NUMEL, fold_halves, new_block_sums

triton = pytest.importorskip("triton", minversion="3.7", reason="triton 3.7 or newer is not installed")

from ptx import machine  # noqa: E402
from ptx.ahead import assemble, compile_ahead, find_ptxas  # noqa: E402
from ptx.program import Program, parse  # noqa: E402

from gemini.kernels import triton_adam, triton_gradient  # noqa: E402

CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""A100; RTX 3090; RTX 4090; H100; B200; RTX 5090."""
POINTERS = {torch.bfloat16: "*i16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int16: "*i16"}
ADAM = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
]
"""Dtypes of working weights and gradients."""
GRADIENTS = [
    (torch.bfloat16, torch.bfloat16, GradMode.STORE),
    (torch.float32, torch.bfloat16, GradMode.STORE),
    (torch.float32, torch.bfloat16, GradMode.ADD),
    (torch.float32, torch.float32, GradMode.ADD),
    (torch.float16, torch.float16, GradMode.STORE),
    (None, torch.bfloat16, GradMode.STORE),
]
"""Dtypes of destination and source; without a destination the gradient is only summed."""
REGISTERS_OF_A_CORE = 1 << 16
MOST_SPILLED_NBYTES = 16
"""Bytes that a thread may write to and read from its stack: ptxas chooses 48 registers for one kernel on sm_120."""
LEAST_WARPS = 32
"""Warps that must fit the registers of a multiprocessor at once, to have enough loads under way."""


@functools.cache
def adam_ptx(working: torch.dtype, grad: torch.dtype, capability: int) -> str:
    state_format = state_format_of(working)
    pointers = {
        "working": POINTERS[working],
        "master": POINTERS[state_format.master_dtype or working],
        "momentum": "*fp32",
        "variance": "*fp32",
        "grad": POINTERS[grad],
        "bounds": "*i64",
        "factors": "*fp32",
        "overlaps": "*i32",
        "grad_scale": "fp32",
    }
    constants = {"FORMAT": state_format.value, "BLOCK_NUMEL": triton_adam.BLOCK_NUMEL}
    return compile_ahead(
        triton_adam.adam_kernel, pointers, constants, capability=capability, num_warps=triton_adam.NUM_WARPS
    )


@functools.cache
def gradient_ptx(dst: torch.dtype | None, src: torch.dtype, mode: GradMode, capability: int) -> str:
    pointers = {"dst": POINTERS[dst or src], "src": POINTERS[src], "block_sums": "*fp64", "numel": "i32"}
    constants = {
        "MODE": 2 if dst is None else mode.value,
        "BLOCK_NUMEL": SUM_BLOCK_NUMEL,
        "LOG2_BLOCK_NUMEL": SUM_BLOCK_NUMEL.bit_length() - 1,
    }
    return compile_ahead(
        triton_gradient.gradient_kernel, pointers, constants, capability=capability, num_warps=triton_gradient.NUM_WARPS
    )


def bits_of(tensor: Tensor) -> np.ndarray:
    """Return a view of a tensor's memory."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Return whether tensors have the same bits; NaN is NaN, whichever it is."""
    integers = {2: torch.int16, 4: torch.int32}[found.element_size()]
    are_both_nan = found.isnan() & expected.isnan()
    return bool(((found.view(integers) == expected.view(integers)) | are_both_nan).all())


def clone(tile: AdamTile) -> AdamTile:
    fields = ("working", "master", "momentum", "variance")
    copies = {name: getattr(tile, name) for name in fields}
    return dataclasses.replace(tile, **{name: None if t is None else t.clone() for name, t in copies.items()})


def launch_adam(program: Program, tile: AdamTile) -> None:
    table = triton_adam.make_segment_table(copy_tile(tile, torch.device("cpu")))
    memory = machine.Memory()
    tensors = [tile.working, tile.master if tile.master is not None else tile.working, tile.momentum, tile.variance]
    tensors += [tile.grad, table.bounds.contiguous(), table.factors.contiguous(), table.overlaps.contiguous()]
    addresses: dict[int, int] = {}
    for tensor in tensors:
        if tensor.data_ptr() not in addresses:
            addresses[tensor.data_ptr()] = memory.add(bits_of(tensor))
    scale = struct.unpack("<I", struct.pack("<f", tile.grad_scale))[0]
    arguments = [addresses[tensor.data_ptr()] for tensor in tensors] + [scale]
    machine.launch(program, table.overlaps.shape[0], memory, arguments)


def launch_gradient(program: Program, dst: Tensor | None, src: Tensor) -> float:
    sums = new_block_sums(src)
    memory = machine.Memory()
    source = memory.add(bits_of(src))
    target = source if dst is None else memory.add(bits_of(dst))
    arguments = [target, source, memory.add(bits_of(sums)), src.numel()]
    machine.launch(program, -(-src.numel() // SUM_BLOCK_NUMEL), memory, arguments)
    return float(fold_halves(sums))


def differing_parts(program: Program, working: torch.dtype, grad: torch.dtype, numel: int) -> list[str]:
    """Return which tensors the PTX and the CPU's kernel make different."""
    tile = make_tile(working, grad, numel)
    expected, found = clone(tile), clone(tile)
    adam_update(expected)
    launch_adam(program, found)
    assert not torch.equal(expected.momentum, tile.momentum)
    names = ("working", "master", "momentum", "variance")
    pairs = {name: (getattr(found, name), getattr(expected, name)) for name in names}
    return [name for name, (one, other) in pairs.items() if one is not None and not same_bits(one, other)]


# ---------------------------------------------------------------- what is executed


@pytest.mark.parametrize(("working", "grad"), ADAM)
def test_adam_has_the_bits_of_the_native_kernel(working: torch.dtype, grad: torch.dtype) -> None:
    program = parse(adam_ptx(working, grad, 89))
    for numel in (37, 1024, 4096, 5001):
        assert differing_parts(program, working, grad, numel) == []


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_adam_has_these_bits_on_every_chip(capability: int) -> None:
    dtypes = (torch.bfloat16, torch.bfloat16)
    assert differing_parts(parse(adam_ptx(*dtypes, capability)), *dtypes, 2500) == []


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize(("dst", "src", "mode"), GRADIENTS)
def test_a_gradient_is_stored_and_summed_as_by_the_native_kernel(
    dst: torch.dtype | None, src: torch.dtype, mode: GradMode, capability: int
) -> None:
    program = parse(gradient_ptx(dst, src, mode, capability))
    for numel in (16, 4096, 4112, 9616):
        generator = torch.Generator().manual_seed(numel)
        values, before = (make_values(numel, generator).clamp(-6e4, 6e4) for _ in range(2))
        source = values.to(src)
        expected, found = (None if dst is None else before.to(dst, copy=True) for _ in range(2))
        total = store_gradient(expected, source, mode=mode)
        assert launch_gradient(program, found, source) == total
        assert found is None or expected is None or same_bits(found, expected)


def test_another_rounding_in_the_ptx_would_be_noticed() -> None:
    ptx = adam_ptx(torch.bfloat16, torch.bfloat16, 89)
    half = ", 32768;"  # what is added before the low half is cut off
    assert half in ptx
    spoiled = parse(ptx.replace(half, ", 32767;"))
    assert differing_parts(spoiled, torch.bfloat16, torch.bfloat16, 5001) == ["working"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("add.rn.f32", "add.rz.f32"), ("sqrt.rn.f32", "sqrt.approx.ftz.f32"), ("mul.rn.f32", "mul.f32")],
)
def test_what_does_not_round_to_the_nearest_is_not_executed(before: str, after: str) -> None:
    ptx = adam_ptx(torch.float32, torch.float32, 89)
    assert before in ptx
    with pytest.raises(machine.UnknownInstructionError):
        differing_parts(parse(ptx.replace(before, after)), torch.float32, torch.float32, 1024)


# ---------------------------------------------------------------- what is compiled


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_operation_is_rounded_on_its_own(capability: int) -> None:
    modules = [adam_ptx(working, grad, capability) for working, grad in ADAM]
    modules += [gradient_ptx(dst, src, mode, capability) for dst, src, mode in GRADIENTS]
    for ptx in modules:
        assert not re.search(r"\bfma\.|\.ftz\b|\.approx\b|\.full\b|\brcp\.|\brsqrt\.", ptx)
        rounded = re.findall(r"\b(?:add|sub|mul|div|sqrt)\.(\w+)\.f(?:16|32|64)", ptx)
        assert set(rounded) <= {"rn"}
        assert not re.search(r"\b(?:add|sub|mul|div|sqrt)\.f(?:16|32|64)", ptx)


@pytest.mark.skipif(find_ptxas(89) is None, reason="there is no ptxas")
@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_leave_room_for_many_warps(capability: int, tmp_path: Path) -> None:
    found = [assemble(adam_ptx(working, grad, capability), tmp_path) for working, grad in ADAM]
    assert max(each.num_spilled_nbytes for each in found) <= MOST_SPILLED_NBYTES
    for each in found:
        per_warp = -(-each.num_registers // 8) * 8 * 32
        blocks = REGISTERS_OF_A_CORE // (per_warp * triton_adam.NUM_WARPS)
        assert blocks * triton_adam.NUM_WARPS >= LEAST_WARPS, each
    gradient = assemble(gradient_ptx(torch.float32, torch.bfloat16, GradMode.ADD, capability), tmp_path)
    assert gradient.num_spilled_nbytes == 0


def test_every_format_is_tried() -> None:
    assert {state_format_of(working) for working, _ in ADAM} == set(StateFormat)
