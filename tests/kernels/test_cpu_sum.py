"""Sums of several ranks' parts: in float32, in the order given, divided and rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.kernels.cpu import Isa, sum_parts, supported_isas
from gemini.kernels.pool import WorkerPool

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (0, 1, 5, 17, 4097, 70_001)


@pytest.fixture(params=supported_isas(), ids=lambda isa: isa.name.lower())
def isa(request):
    return request.param


def random_parts(num_parts, numel, dtype, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 3, (num_parts, numel), generator=generator)
    return list((torch.randn(num_parts, numel, generator=generator) * scale).to(dtype))


def reference(parts, divisor, dtype):
    """Add as plain torch does, one after another."""
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total = total + part.to(torch.float32)
    return (total / divisor).to(dtype)


def same_bits(one, other):
    return one.dtype is other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_a_sum_is_plain_torchs_in_the_order_of_parts(num_parts, dtype, numel, isa):
    parts = random_parts(num_parts, numel, dtype)
    for dst_dtype, divisor in ((dtype, num_parts), (torch.float32, 1)):
        dst = torch.full((numel + 2,), 7.0, dtype=dst_dtype)
        sum_parts(dst[1 : numel + 1], parts, divisor=divisor, isa=isa)
        assert same_bits(dst[1 : numel + 1].clone(), reference(parts, divisor, dst_dtype))
        assert dst[0] == dst[numel + 1] == 7.0


def test_the_order_matters_so_it_is_really_tested():
    parts = random_parts(3, 4097, torch.float32)
    assert not same_bits(reference(parts, 3, torch.float32), reference(parts[::-1], 3, torch.float32))


def test_a_sum_may_take_the_place_of_a_part(isa):
    parts = random_parts(3, 5000, torch.bfloat16)
    expected = reference(parts, 3, torch.bfloat16)
    sum_parts(parts[1], parts, divisor=3, isa=isa)
    assert same_bits(parts[1], expected)


@settings(max_examples=30, deadline=None)
@given(num_parts=st.integers(1, 9), numel=st.integers(0, 300_000), seed=st.integers(0, 1000))
def test_threads_change_no_bit(num_parts, numel, seed):
    parts = random_parts(num_parts, numel, torch.float16, seed=seed)
    dst = torch.empty(numel, dtype=torch.float16)
    with WorkerPool(3) as pool:
        pool.submit_sum(dst, parts, divisor=num_parts).wait()
    assert same_bits(dst, reference(parts, num_parts, torch.float16))


def test_halves_are_added_in_float32_so_they_do_not_overflow(isa):
    parts = list(torch.full((4, 3), 60_000.0, dtype=torch.float16))
    dst = torch.empty(3, dtype=torch.float16)
    sum_parts(dst, parts, divisor=4, isa=isa)
    assert dst.tolist() == [60_000.0] * 3


def test_what_is_not_finite_stays_so(isa):
    parts = [torch.tensor([float("inf"), float("nan"), float("inf")] * 9), torch.tensor([1.0, 1.0, -float("inf")] * 9)]
    dst = torch.empty(27)
    sum_parts(dst, parts, divisor=2, isa=isa)
    assert torch.equal(dst.isnan(), torch.tensor([False, True, True] * 9))
    assert dst[0] == float("inf")


@pytest.mark.parametrize(
    ("dst", "parts", "message"),
    [
        (torch.empty(3), [], "expected at least one tensor"),
        (torch.empty(3), [torch.empty(3), torch.empty(4)], "part: expected 3 elements, got 4"),
        (torch.empty(3), [torch.empty(3), torch.empty(3).half()], "part: expected torch.float32, got torch.float16"),
        (torch.empty(3).half(), [torch.empty(3)], "dst: expected torch.float32"),
        (torch.empty(3), [torch.empty(6)[::2]], "expected a contiguous 1D tensor"),
    ],
)
def test_what_cannot_be_added_is_refused(dst, parts, message):
    with pytest.raises(ValueError, match=message):
        sum_parts(dst, parts, isa=Isa.AUTO)
