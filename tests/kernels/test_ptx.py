"""The Triton kernels as PTX: compiled ahead for chips of five generations, and executed, bit for bit as on the CPU.

No GPU is needed. What a chip makes of the PTX is ptxas's and NVIDIA's; the operations and their roundings are there.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from device_tiles import copy_chunk, make_tile, make_values, parts_of
from torch import Tensor

from gemini.kernels.adam_tile import StateFormat, state_format_of
from gemini.kernels.cpu import GradMode, adam_update, store_gradient
from gemini.kernels.device_tile import SUM_BLOCK_NUMEL, DeviceChunk, fold_halves

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
LEAST_WARPS = 32
"""Warps that must fit the registers of a multiprocessor at once, to have enough loads under way."""


@functools.cache
def adam_ptx(working: torch.dtype, grad: torch.dtype, capability: int) -> str:
    state_format = state_format_of(working)
    kernel = triton_adam.adam_kernel
    constants = {"FORMAT": state_format.value, "BLOCK_NUMEL": triton_adam.BLOCK_NUMEL}
    signature = dict.fromkeys(set(kernel.arg_names) - set(constants), "i32") | {
        "working": POINTERS[working],
        "masters": POINTERS[state_format.master_dtype or working],
        "state": "*fp32",
        "grad": POINTERS[grad],
        "bounds": "*i64",
        "factors": "*fp32",
        "grad_scale": "fp32",
    }
    multiples = set(signature) - {"grad_scale", "num_segments", "blocks_per_tile", "last_tile"}
    return compile_ahead(
        kernel, signature, constants, multiples=multiples, capability=capability, num_warps=triton_adam.NUM_WARPS
    )


@functools.cache
def gradient_ptx(
    dst: torch.dtype | None, src: torch.dtype, mode: GradMode, capability: int, *, is_aligned: bool = True
) -> str:
    signature = {"dst": POINTERS[dst or src], "src": POINTERS[src], "block_sums": "*fp64", "numel": "i32"}
    constants = {
        "MODE": 2 if dst is None else mode.value,
        "BLOCK_NUMEL": SUM_BLOCK_NUMEL,
        "LOG2_BLOCK_NUMEL": SUM_BLOCK_NUMEL.bit_length() - 1,
    }
    return compile_ahead(
        triton_gradient.gradient_kernel,
        signature,
        constants,
        multiples=("dst", "src", "block_sums") if is_aligned else ("block_sums",),
        capability=capability,
        num_warps=triton_gradient.NUM_WARPS,
    )


@functools.cache
def fold_ptx(rows: int, columns: int, capability: int) -> str:
    signature = {"sums": "*fp64", "folded": "*fp64", "num_sums": "i32", "stride": "i32"}
    constants = {"ROWS": rows, "COLUMNS": columns, "LOG2_ROWS": rows.bit_length() - 1}
    return compile_ahead(
        triton_gradient.fold_kernel,
        signature,
        constants,
        multiples=("sums", "folded"),
        capability=capability,
        num_warps=triton_gradient.NUM_WARPS,
    )


def bits_of(tensor: Tensor) -> np.ndarray:
    """Return a view of a tensor's memory."""
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Return whether tensors have the same bits; NaN is NaN, whichever it is."""
    integers = {2: torch.int16, 4: torch.int32}[found.element_size()]
    are_both_nan = found.isnan() & expected.isnan()
    return bool(((found.view(integers) == expected.view(integers)) | are_both_nan).all())


def launch_adam(program: Program, chunk: DeviceChunk) -> None:
    memory = machine.Memory()
    addresses: dict[int, int] = {}
    arguments = []
    for argument in triton_adam.kernel_arguments(chunk):
        if isinstance(argument, Tensor):
            if argument.data_ptr() not in addresses:
                addresses[argument.data_ptr()] = memory.add(bits_of(argument))
            arguments.append(addresses[argument.data_ptr()])
        elif isinstance(argument, float):
            arguments.append(struct.unpack("<I", struct.pack("<f", argument))[0])
        else:
            arguments.append(argument % (1 << 32))
    machine.launch(program, -(-chunk.working.numel() // triton_adam.BLOCK_NUMEL), memory, arguments)


def launch_gradient(dst: Tensor | None, src: Tensor, mode: GradMode, capability: int, *, is_aligned: bool) -> float:
    """Store or add a gradient as triton_store_gradient does; return the sum of squares."""
    program = parse(
        gradient_ptx(None if dst is None else dst.dtype, src.dtype, mode, capability, is_aligned=is_aligned)
    )
    sums = torch.full((-(-src.numel() // SUM_BLOCK_NUMEL),), math.nan, dtype=torch.float64)
    memory = machine.Memory()
    source = address_of(src, memory)
    target = source if dst is None else address_of(dst, memory)
    machine.launch(program, sums.numel(), memory, [target, source, memory.add(bits_of(sums)), src.numel()])
    return float(launch_folds(sums, capability))


def address_of(tensor: Tensor, memory: machine.Memory) -> int:
    """Give the storage of a tensor, a slice perhaps, an address, and return the tensor's."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return memory.add(bits_of(storage)) + tensor.storage_offset() * tensor.element_size()


def launch_folds(sums: Tensor, capability: int) -> Tensor:
    for fold in triton_gradient.plan_folds(sums.numel()):
        folded = torch.full((fold.grid * fold.columns,), math.nan, dtype=torch.float64)
        memory = machine.Memory()
        arguments = [memory.add(bits_of(sums)), memory.add(bits_of(folded)), sums.numel(), fold.stride]
        machine.launch(parse(fold_ptx(fold.rows, fold.columns, capability)), fold.grid, memory, arguments)
        sums = folded
    return sums.view(())


def differing_parts(
    program: Program, working: torch.dtype, grad: torch.dtype, numel: int, tile_numel: int = 4096
) -> list[str]:
    """Return which tensors the PTX and the CPU's kernel make different."""
    tile = make_tile(working, grad, numel)
    before = tile.momentum.clone()
    chunk = copy_chunk(tile, torch.device("cpu"), tile_numel)
    adam_update(tile)
    launch_adam(program, chunk)
    assert not torch.equal(tile.momentum, before)
    return [name for name, part in parts_of(chunk).items() if not same_bits(part, getattr(tile, name))]


# ---------------------------------------------------------------- what is executed


@pytest.mark.parametrize(("working", "grad"), ADAM)
def test_adam_has_the_bits_of_the_native_kernel(working: torch.dtype, grad: torch.dtype) -> None:
    program = parse(adam_ptx(working, grad, 89))
    for numel, tile_numel in ((37, 4096), (1024, 1024), (4096, 4096), (5001, 4096), (5001, 1024)):
        assert differing_parts(program, working, grad, numel, tile_numel) == []


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_adam_has_these_bits_on_every_chip(capability: int) -> None:
    dtypes = (torch.bfloat16, torch.bfloat16)
    assert differing_parts(parse(adam_ptx(*dtypes, capability)), *dtypes, 2500, 1024) == []


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize(("dst", "src", "mode"), GRADIENTS)
def test_a_gradient_is_stored_and_summed_as_by_the_native_kernel(
    dst: torch.dtype | None, src: torch.dtype, mode: GradMode, capability: int
) -> None:
    for numel in (16, 4096, 4112, 9616):
        source, found, expected = make_gradient(dst, src, numel)
        total = store_gradient(expected, source, mode=mode)
        assert launch_gradient(found, source, mode, capability, is_aligned=True) == total
        assert found is None or expected is None or same_bits(found, expected)


@pytest.mark.parametrize(("dst", "src", "mode"), GRADIENTS)
def test_a_gradient_may_begin_at_any_element(dst: torch.dtype | None, src: torch.dtype, mode: GradMode) -> None:
    """Slices of larger tensors, odd in place and length: Triton compiles another kernel for them."""
    for begin, numel in ((1, 37), (3, 4097), (7, 9001)):
        source, found, expected = (
            None if each is None else each[begin:] for each in make_gradient(dst, src, begin + numel)
        )
        assert source is not None
        total = store_gradient(expected, source, mode=mode)
        assert launch_gradient(found, source, mode, 89, is_aligned=False) == total
        assert found is None or expected is None or same_bits(found, expected)


def make_gradient(dst: torch.dtype | None, src: torch.dtype, numel: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a gradient and two equal destinations."""
    generator = torch.Generator().manual_seed(numel)
    values, before = (make_values(numel, generator).clamp(-6e4, 6e4) for _ in range(2))
    first, second = (None if dst is None else before.to(dst, copy=True) for _ in range(2))
    return values.to(src), first, second


@pytest.mark.parametrize("num_sums", [2, 64, 65, 5000, 20_000])
def test_sums_are_folded_in_the_order_of_the_native_kernel(num_sums: int) -> None:
    sums = make_values(num_sums, torch.Generator().manual_seed(num_sums)).abs().to(torch.float64)
    padded = torch.zeros(1 << (num_sums - 1).bit_length(), dtype=torch.float64)
    padded[:num_sums] = sums
    assert torch.equal(launch_folds(sums, 89), fold_halves(padded))


def test_launches_to_fold_take_every_sum_once() -> None:
    for num_sums in (1, 2, 64, 65, 4096, 4097, 16_384, 16_385, 1 << 18, (1 << 18) + 1, 1 << 22):
        left = num_sums
        for fold in triton_gradient.plan_folds(num_sums):
            assert fold.grid * fold.columns == fold.stride
            assert left <= fold.rows * fold.stride
            left = fold.stride
        assert left == 1
    with pytest.raises(ValueError, match="expected at most 17179869184 elements"):
        triton_gradient.plan_folds((1 << 22) + 1)


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
    modules += [fold_ptx(64, 1, capability), fold_ptx(16, 256, capability)]
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
    assert max(each.num_spilled_nbytes for each in found) == 0
    for each in found:
        per_warp = -(-each.num_registers // 8) * 8 * 32
        blocks = REGISTERS_OF_A_CORE // (per_warp * triton_adam.NUM_WARPS)
        assert blocks * triton_adam.NUM_WARPS >= LEAST_WARPS, each
    gradient = assemble(gradient_ptx(torch.float32, torch.bfloat16, GradMode.ADD, capability), tmp_path)
    fold = assemble(fold_ptx(4096, 1, capability), tmp_path)
    assert gradient.num_spilled_nbytes == fold.num_spilled_nbytes == 0


def test_every_format_is_tried() -> None:
    assert {state_format_of(working) for working, _ in ADAM} == set(StateFormat)
