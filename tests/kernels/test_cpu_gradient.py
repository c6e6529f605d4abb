"""Gradients: what is stored, and the sum of squares in its fixed order."""

import math

import pytest
import torch
from gemini._native import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.kernels.cpu import GradMode, store_gradient, supported_isas

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (0, 1, 5, 17, 4095, 4096, 4097, 5 * 4096, 30_003)
EINVAL = -22


@pytest.fixture(params=supported_isas(), ids=lambda isa: isa.name.lower())
def isa(request):
    return request.param


def halving_sum(values):
    """Reduce float64 [power of two] by a[i] += a[i + h], h = half the length first."""
    while values.numel() > 1:
        half = values.numel() // 2
        values = values[:half] + values[half:]
    return values.item()


def reference_sumsq(values):
    """Follow gn_grad_store's comment word by word."""
    squares = values.to(torch.float64) ** 2
    block_sums = []
    for begin in range(0, squares.numel(), 4096):
        block = torch.zeros(4096, dtype=torch.float64)
        piece = squares[begin : begin + 4096]
        block[: piece.numel()] = piece
        block_sums.append(halving_sum(block))
    padded = torch.zeros(1 << max(0, math.ceil(math.log2(max(1, len(block_sums))))), dtype=torch.float64)
    padded[: len(block_sums)] = torch.tensor(block_sums, dtype=torch.float64)
    return halving_sum(padded)


def random_gradient(numel, dtype=torch.float32, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 3, (numel,), generator=generator)
    return (torch.randn(numel, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sumsq_follows_the_documented_tree(numel, dtype, isa):
    grad = random_gradient(numel + 1, dtype)[1:]
    assert store_gradient(None, grad, isa=isa) == reference_sumsq(grad)


@settings(max_examples=30)
@given(numel=st.integers(0, 20_000), seed=st.integers(0, 1000))
def test_sumsq_of_any_length_follows_the_tree_on_every_isa(numel, seed):
    grad = random_gradient(numel, seed=seed)
    expected = reference_sumsq(grad)
    assert [store_gradient(None, grad, isa=isa) for isa in supported_isas()] == [expected] * len(supported_isas())


def test_sumsq_depends_on_order_so_the_tree_is_really_tested():
    grad = random_gradient(30_003)
    assert reference_sumsq(grad) != (grad.to(torch.float64) ** 2).cumsum(0)[-1].item()


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("src_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("widen", [False, True])
def test_store_writes_the_converted_gradient_and_sums_it(numel, src_dtype, widen, isa):
    src = random_gradient(numel, src_dtype)
    dst_dtype = torch.float32 if widen else src_dtype
    whole = torch.full((numel + 2,), 7.0, dtype=dst_dtype)
    dst = whole[1 : numel + 1]
    sumsq = store_gradient(dst, src, isa=isa)
    assert torch.equal(dst, src.to(dst_dtype))
    assert sumsq == reference_sumsq(dst)
    assert whole[0].item() == 7.0
    assert whole[-1].item() == 7.0


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("src_dtype", FLOAT_DTYPES)
def test_add_accumulates_in_float32_and_sums_the_result(numel, src_dtype, isa):
    src = random_gradient(numel, src_dtype)
    dst = random_gradient(numel + 1, seed=1)[1:]
    expected = dst + src.to(torch.float32)
    assert store_gradient(dst, src, mode=GradMode.ADD, isa=isa) == reference_sumsq(expected)
    assert torch.equal(dst, expected)


def test_store_onto_itself_only_sums(isa):
    grad = random_gradient(10_000, torch.bfloat16)
    before = grad.clone()
    assert store_gradient(grad, grad, isa=isa) == reference_sumsq(before)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("index", [0, 4095, 4096, 9_998])
def test_sumsq_is_not_finite_when_one_element_is_not(value, dtype, index, isa):
    grad = torch.ones(9_999, dtype=dtype)
    grad[index] = value
    assert not math.isfinite(store_gradient(None, grad, isa=isa))


def test_sumsq_of_the_largest_float32_is_finite(isa):
    grad = torch.full((10_000,), torch.finfo(torch.float32).max)
    assert store_gradient(None, grad, isa=isa) == pytest.approx(10_000 * torch.finfo(torch.float32).max ** 2)


def test_sumsq_keeps_subnormals(isa):
    grad = torch.full((4096,), 2.0**-149)
    assert store_gradient(None, grad, isa=isa) == 4096 * 2.0**-298


def test_sumsq_may_be_left_out():
    src, dst = random_gradient(5000), torch.zeros(5000)
    args = ffi.new(
        "gn_grad_args *",
        {
            "src": ffi.cast("void *", src.data_ptr()),
            "dst": ffi.cast("void *", dst.data_ptr()),
            "numel": 5000,
        },
    )
    assert lib.gn_grad_store(args) == 0
    assert torch.equal(dst, src)


def test_store_gradient_rejects_what_the_kernel_cannot_do():
    half = torch.zeros(4, dtype=torch.float16)
    with pytest.raises(ValueError, match="dst: expected a float32 tensor to add to, got None"):
        store_gradient(None, half, mode=GradMode.ADD)
    with pytest.raises(ValueError, match="dst: expected torch.float32, got torch.float16"):
        store_gradient(half.clone(), half, mode=GradMode.ADD)
    with pytest.raises(ValueError, match="dst: expected torch.float16 or torch.float32, got torch.bfloat16"):
        store_gradient(half.to(torch.bfloat16), half)
    with pytest.raises(ValueError, match="dst: expected 4 elements, got 5"):
        store_gradient(torch.zeros(5), half)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": 2},
        {"src_dtype": 3},
        {"dst_dtype": 1},
        {"numel": -1},
        {"src": ffi.NULL},
        {"mode": 1, "dst": ffi.NULL},
        {"isa": 9},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_native_grad_store_answers_einval(changes):
    src, dst = torch.zeros(4), torch.zeros(4)
    fields = {
        "src": ffi.cast("void *", src.data_ptr()),
        "dst": ffi.cast("void *", dst.data_ptr()),
        "numel": 4,
        **changes,
    }
    assert lib.gn_grad_store(ffi.new("gn_grad_args *", fields)) == EINVAL
