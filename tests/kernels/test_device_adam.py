"""The device kernels against the native ones, bit for bit.

The Triton kernels run through Triton's interpreter, in a process of their own: this file run as a program. There the
environment must say so before Triton is imported.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device_tiles import HYPERS, assert_bits_equal, copy_chunk, copy_tile, make_tile, make_values, parts_of

from gemini.kernels import device as device_module
from gemini.kernels.cpu import AdamSegment, GradMode, adam_update, store_gradient
from gemini.kernels.device import (
    TORCH_KERNELS,
    DeviceKernels,
    device_adam_update,
    device_store_gradient,
    select_device_kernels,
    update_tiles,
)
from gemini.kernels.device_tile import RecordOffsets, fold_halves

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 37, 1024, 5001)
LARGE = (1 << 20) + 12345  # more than a slice of the torch kernels
TILE_NUMELS = (1024, 4096, 1 << 20)
# Division flushes subnormal numbers in Triton 3.4; the interpreter of 3.6 does not get on with NumPy 2.4.
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or [int(part) for part in importlib.metadata.version("triton").split(".")[:2]] < [3, 7],
    reason="triton is not installed or older than 3.7",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def check_adam(kernels: DeviceKernels, device: torch.device, case: tuple[torch.dtype, torch.dtype, int]) -> None:
    """Compare one update, with tiles of several lengths, with the native kernel's."""
    for tile_numel in TILE_NUMELS:
        expected = make_tile(*case)
        actual = copy_chunk(expected, device, tile_numel)
        adam_update(expected)
        kernels.adam_update(actual)
        for name, part in parts_of(actual).items():
            assert_bits_equal(part, getattr(expected, name), f"{name} of {case} in tiles of {tile_numel}")


def check_gradient(kernels: DeviceKernels, device: torch.device, case: tuple[torch.dtype, str, int]) -> None:
    """Compare one gradient store and its sum of squares with the native kernel's."""
    dtype, way, numel = case
    generator = torch.Generator().manual_seed(numel)
    src = make_values(numel, generator).clamp(-6e4, 6e4).to(dtype)
    dst = {
        "store": torch.empty(numel, dtype=dtype),
        "widen": torch.empty(numel),
        "add": make_values(numel, generator),
        "sum": None,
    }[way]
    mode = GradMode.ADD if way == "add" else GradMode.STORE
    device_dst = None if dst is None else dst.to(device, copy=True)
    expected = store_gradient(dst, src, mode=mode)
    actual = kernels.store_gradient(device_dst, src.to(device), mode=mode)
    assert actual.shape == ()
    assert_bits_equal(actual.reshape(1), torch.tensor([expected], dtype=torch.float64), f"sum of {case}")
    if dst is not None and device_dst is not None:
        assert_bits_equal(device_dst, dst, f"dst of {case}")


def adam_cases(sizes: tuple[int, ...]) -> Iterator[tuple[torch.dtype, torch.dtype, int]]:
    return ((working, grad, numel) for working in DTYPES for grad in DTYPES for numel in sizes)


def gradient_cases(sizes: tuple[int, ...]) -> Iterator[tuple[torch.dtype, str, int]]:
    ways = ("store", "widen", "add", "sum")
    return ((dtype, way, numel) for dtype in DTYPES for way in ways for numel in sizes)


@pytest.mark.parametrize("working_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_torch_adam_equals_native_bit_for_bit(working_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for numel in (*SIZES, LARGE):
        check_adam(TORCH_KERNELS, torch.device("cpu"), (working_dtype, grad_dtype, numel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["store", "widen", "add", "sum"])
def test_torch_gradient_equals_native_bit_for_bit(dtype: torch.dtype, way: str) -> None:
    for numel in (*SIZES, 4096, 3 * 4096, LARGE):
        check_gradient(TORCH_KERNELS, torch.device("cpu"), (dtype, way, numel))


@needs_triton
def test_triton_kernels_equal_native_bit_for_bit_in_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{root / 'tests' / 'support'}"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["58", "cases", "equal"]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile_to_separately_rounded_operations(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from gemini.kernels.triton_adam import adam_kernel
    from gemini.kernels.triton_gradient import fold_kernel, gradient_kernel

    others = {"state": "*fp32", "grad": "*i16", "bounds": "*i64", "factors": "*fp32", "grad_scale": "fp32"}
    for state_format, (working, masters) in enumerate([("*i16", "*i16"), ("*fp16", "*fp32"), ("*fp32", "*fp32")]):
        constants = {"FORMAT": state_format, "BLOCK_NUMEL": 1024}
        signature = dict.fromkeys(adam_kernel.arg_names, "i32") | {"working": working, "masters": masters} | others
        operations = compile_to_ptx(adam_kernel, signature, constants, capability)
        assert {"div.rn.f32", "sqrt.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32"} <= operations
        assert [each for each in operations if "fma" in each or "ftz" in each or "approx" in each] == []
    signature = {"sums": "*fp64", "folded": "*fp64", "num_sums": "i32", "stride": "i32"}
    operations = compile_to_ptx(fold_kernel, signature, {"ROWS": 64, "COLUMNS": 1, "LOG2_ROWS": 6}, capability)
    assert {operation for operation in operations if operation.endswith("f64")} == {"add.rn.f64"}
    signature = {"dst": "*fp32", "src": "*i16", "block_sums": "*fp64", "numel": "i64"}
    constants = {"MODE": 1, "BLOCK_NUMEL": 4096, "LOG2_BLOCK_NUMEL": 12}
    operations = compile_to_ptx(gradient_kernel, signature, constants, capability)
    assert {"add.rn.f32", "mul.rn.f64", "add.rn.f64"} <= operations
    assert [each for each in operations if "fma" in each or "ftz" in each] == []


def compile_to_ptx(kernel: Any, signature: dict[str, str], constants: dict[str, int], capability: int) -> set[str]:
    """Compile a kernel for an NVIDIA GPU, which need not be there, and return the PTX operations it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    words = [line.split() for line in compiled.asm["ptx"].splitlines()]
    return {operation.rstrip(";") for line in words for operation in line[:2] if "." in operation}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_cuda_kernels_equal_native_bit_for_bit(name: str) -> None:
    device = torch.device("cuda")
    kernels = select_device_kernels(device) if name == "triton" else TORCH_KERNELS
    assert kernels.name == name
    for adam_case in adam_cases((*SIZES, LARGE)):
        check_adam(kernels, device, adam_case)
    for gradient_case in gradient_cases((*SIZES, LARGE)):
        check_gradient(kernels, device, gradient_case)


def test_adam_leaves_elements_outside_segments_untouched() -> None:
    before = make_tile(torch.bfloat16, torch.float32, 37)
    segment = AdamSegment(begin=3, end=5, hyper=HYPERS[0], step=1)
    tile = dataclasses.replace(copy_tile(before, torch.device("cpu")), segments=(segment,))
    device_adam_update(tile)
    changed = (tile.momentum != before.momentum).nonzero().flatten().tolist()
    assert changed == [3, 4]
    assert_bits_equal(tile.working[5:], before.working[5:], "working behind the segment")


def test_sum_of_squares_is_not_finite_exactly_if_an_element_is_not() -> None:
    src = torch.full((5000,), 3e38)
    assert device_store_gradient(None, src, mode=GradMode.STORE).item() == pytest.approx(4.5e80)
    src[4999] = float("inf")
    assert device_store_gradient(None, src, mode=GradMode.STORE).item() == float("inf")


def test_gradient_may_be_stored_onto_itself() -> None:
    src = torch.ones(5000, dtype=torch.bfloat16)
    assert device_store_gradient(src, src, mode=GradMode.STORE).item() == 5000.0


def test_selection_falls_back_to_torch_off_cuda() -> None:
    assert select_device_kernels(torch.device("cpu")).name == "torch"


def test_probe_tells_flushed_subnormal_numbers_from_exact_ones() -> None:
    exact, flushed = (device_module._make_probe(torch.device("cpu"), torch.float32) for _ in range(2))
    update_tiles(exact)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        update_tiles(flushed)
    finally:
        torch.set_flush_denormal(False)
    assert exact.working.isfinite().all()
    assert not torch.equal(exact.working, flushed.working)


def test_selection_falls_back_to_torch_and_says_why_if_triton_fails(caplog: pytest.LogCaptureFixture) -> None:
    # A CUDA device that is not there fails as a broken Triton does.
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with caplog.at_level("INFO", logger="gemini.kernels.device"):
        kernels = select_device_kernels(torch.device("cuda"))
    assert kernels.name == "torch"
    assert "not Triton's but slower ones of torch: " in caplog.messages[0]
    assert caplog.messages[1] == "optimizer kernels on cuda: torch"


def test_tile_rejects_overlapping_segments() -> None:
    tile = copy_tile(make_tile(torch.float32, torch.float32, 37), torch.device("cpu"))
    segments = tuple(AdamSegment(begin=begin, end=begin + 4, hyper=HYPERS[0], step=1) for begin in (0, 3))
    with pytest.raises(ValueError, match=r"DeviceTile.segments: expected sorted, .* got \[3, 7\) after 4"):
        dataclasses.replace(tile, segments=segments)


def test_tile_rejects_a_master_that_does_not_fit_the_format() -> None:
    tile = copy_tile(make_tile(torch.bfloat16, torch.float32, 37), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"DeviceTile.master: expected torch.int16 .* got None"):
        dataclasses.replace(tile, master=None)
    with pytest.raises(ValueError, match=r"DeviceTile.master: expected torch.int16, got torch.float32"):
        dataclasses.replace(tile, master=tile.momentum)


def test_a_chunk_rejects_records_that_do_not_fit_its_tiles() -> None:
    chunk = copy_chunk(make_tile(torch.bfloat16, torch.float32, 5001), torch.device("cpu"), 1024)
    with pytest.raises(ValueError, match=r"DeviceChunk.records: expected \d+ bytes \(uint8\) for 5 tiles, got"):
        dataclasses.replace(chunk, records=chunk.records[4:])
    with pytest.raises(ValueError, match=r"DeviceChunk.tile_numel: expected a multiple of 1024 elements, got 1000"):
        dataclasses.replace(chunk, tile_numel=1000)
    with pytest.raises(ValueError, match=r"RecordOffsets.variance: expected a multiple of 4 bytes, got 6"):
        RecordOffsets(momentum=0, variance=6, nbytes=12)


def test_gradient_rejects_adding_to_half_precision() -> None:
    src = torch.ones(4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dst: expected torch.float32, got torch.float16"):
        device_store_gradient(src.clone(), src, mode=GradMode.ADD)


def check_folds(num_sums: int) -> None:
    """Compare the launches that fold sums with fold_halves."""
    from gemini.kernels.triton_gradient import fold_sums

    sums = make_values(num_sums, torch.Generator().manual_seed(num_sums)).abs().to(torch.float64)
    padded = torch.zeros(1 << max(num_sums - 1, 0).bit_length(), dtype=torch.float64)
    padded[:num_sums] = sums
    assert_bits_equal(fold_sums(sums).view(1), fold_halves(padded).view(1), f"fold of {num_sums}")


def main() -> None:
    """Check the Triton kernels through the interpreter."""
    cpu = torch.device("cpu")
    kernels = device_module._triton_kernels(cpu)
    num_cases = 0
    for adam_case in adam_cases((0, 37, 5001)):
        check_adam(kernels, cpu, adam_case)
        num_cases += 1
    for gradient_case in gradient_cases((0, 5001)):
        check_gradient(kernels, cpu, gradient_case)
        num_cases += 1
    for num_sums in (1, 3, 64, 65, 4096, 4097, 40_000):
        check_folds(num_sums)
        num_cases += 1
    sys.stdout.write(f"{num_cases} cases equal\n")


if __name__ == "__main__":
    main()
