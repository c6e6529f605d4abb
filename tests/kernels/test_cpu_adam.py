"""The Adam kernels against separate torch operations, bit by bit, and against torch.optim."""

import dataclasses
import itertools
import math
import struct

import numpy as np
import pytest
import torch
from gemini._native import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.kernels.adam_tile import AdamSource
from gemini.kernels.cpu import (
    AdamHyper,
    AdamSegment,
    AdamTile,
    Isa,
    StateFormat,
    adam_update,
    join_master,
    segment_factors,
    split_master,
    state_format_of,
    supported_isas,
)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (0, 1, 3, 8, 17, 31, 4097, 20_011)
ADAMW = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
ADAM_L2 = dataclasses.replace(ADAMW, is_decoupled=False)


@pytest.fixture(params=supported_isas(), ids=lambda isa: isa.name.lower())
def isa(request):
    return request.param


def make_tile(numel, working_dtype, grad_dtype, segments, *, offset=0, grad_scale=0.37, seed=0):
    """Return a tile of random state; `offset` elements lie before each tensor's first."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        spread = 10.0 ** torch.randint(-5, 3, (numel + offset,), generator=generator)
        return (torch.randn(numel + offset, generator=generator) * scale * spread)[offset:]

    master = noise(0.1)
    working, residual = torch.empty(numel + offset, dtype=working_dtype)[offset:], None
    if working_dtype == torch.bfloat16:
        residual = torch.empty(numel + offset, dtype=torch.int16)[offset:]
        split_master(working, residual, master, isa=Isa.SCALAR)
    else:
        working.copy_(master)
    stored = {torch.bfloat16: residual, torch.float16: master, torch.float32: None}[working_dtype]
    grad = noise(1.0).to(grad_dtype)
    return AdamTile(working, stored, noise(0.01), noise(0.01).square_(), grad, grad_scale, segments)


def master_of(tile):
    if tile.state_format is StateFormat.SPLIT_BF16:
        master = torch.empty(tile.working.numel())
        join_master(master, tile.working, tile.master, isa=Isa.SCALAR)
        return master
    return (tile.working if tile.master is None else tile.master).clone()


def ieee_sqrt(values):
    """Return correctly rounded roots; torch.sqrt on the CPU comes from MKL and is an ulp off now and then."""
    return torch.from_numpy(np.sqrt(values.numpy()))


def reference_update(tile):
    """Return what the tile's (master, momentum, variance) become, each operation a torch call of its own."""
    master, momentum, variance = master_of(tile), tile.momentum.clone(), tile.variance.clone()
    for segment in tile.segments:
        f, cut = segment.factors, slice(segment.begin, segment.end)
        p, m, v = master[cut], momentum[cut], variance[cut]
        g = tile.grad[cut].to(torch.float32) * torch.tensor(tile.grad_scale)
        if f.l2 != 0.0:
            g = g + p * f.l2
        p = p * f.decay
        m = m + (g - m) * f.beta1_complement
        v = v * f.beta2 + (g * f.beta2_complement) * g
        p = p + (m * f.neg_step_size) / (ieee_sqrt(v) / f.bias2_sqrt + f.eps)
        master[cut], momentum[cut], variance[cut] = p, m, v
    return master, momentum, variance


def assert_same_bits(result, expected):
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32))


def assert_update_matches_reference(tile, isa):
    master, momentum, variance = reference_update(tile)
    adam_update(tile, isa=isa)
    assert_same_bits(master_of(tile), master)
    assert_same_bits(tile.momentum, momentum)
    assert_same_bits(tile.variance, variance)
    if tile.state_format is StateFormat.FP16_MASTER:
        assert torch.equal(tile.working, master.to(torch.float16))


@pytest.mark.parametrize("working_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("grad_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("numel", NUMELS)
def test_update_equals_separate_torch_operations(working_dtype, grad_dtype, numel, isa):
    for hyper, offset in ((ADAMW, 0), (ADAM_L2, 1)):
        segments = (AdamSegment(begin=0, end=numel, hyper=hyper, step=3),)
        assert_update_matches_reference(make_tile(numel, working_dtype, grad_dtype, segments, offset=offset), isa)


@pytest.mark.parametrize("working_dtype", FLOAT_DTYPES)
def test_segments_have_their_own_factors_and_gaps_stay_untouched(working_dtype, isa):
    other = AdamHyper(lr=3e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.0)
    segments = (
        AdamSegment(begin=5, end=38, hyper=ADAMW, step=1),
        AdamSegment(begin=38, end=38, hyper=other, step=2),
        AdamSegment(begin=38, end=70, hyper=other, step=9),
        AdamSegment(begin=111, end=200, hyper=ADAM_L2, step=1000),
    )
    tile = make_tile(203, working_dtype, torch.bfloat16, segments)
    before = [t.clone() for t in (tile.working, tile.momentum, tile.variance, master_of(tile))]
    assert_update_matches_reference(tile, isa)
    gaps = torch.ones(203, dtype=torch.bool)
    gaps[5:70] = gaps[111:200] = False
    after = [tile.working, tile.momentum, tile.variance, master_of(tile)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[gaps], new[gaps])
        assert not torch.equal(old[~gaps], new[~gaps])


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 300), max_size=8).map(sorted),
    dtypes=st.sampled_from(list(itertools.product(FLOAT_DTYPES, FLOAT_DTYPES))),
    step=st.integers(1, 10_000),
)
def test_any_segments_give_the_reference_on_every_isa(cuts, dtypes, step):
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    segments = tuple(AdamSegment(begin=a, end=b, hyper=ADAMW, step=step + i) for i, (a, b) in enumerate(pairs))
    for isa in supported_isas():
        assert_update_matches_reference(make_tile(300, *dtypes, segments, offset=1, seed=step), isa)


def test_update_keeps_subnormals(isa):
    tile = make_tile(64, torch.float32, torch.float32, (AdamSegment(begin=0, end=64, hyper=ADAMW, step=1),))
    tile.momentum.fill_(2.0**-140)
    tile.variance.fill_(2.0**-140)
    tile.grad.fill_(2.0**-138)
    assert_update_matches_reference(tile, isa)
    assert (tile.momentum > 0).all()
    assert (tile.variance > 0).all()


def test_update_ignores_flush_to_zero_of_the_calling_thread(isa):
    tile = make_tile(64, torch.float32, torch.float32, (AdamSegment(begin=0, end=64, hyper=ADAMW, step=1),))
    tile.variance.fill_(2.0**-140)
    tile.grad.fill_(0.0)
    _, _, variance = reference_update(tile)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        adam_update(tile, isa=isa)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(tile.variance, variance)


def test_infinite_and_nan_gradients_stay_in_their_elements(isa):
    tile = make_tile(64, torch.bfloat16, torch.float32, (AdamSegment(begin=0, end=64, hyper=ADAMW, step=1),))
    tile.grad[3], tile.grad[40] = math.inf, math.nan
    adam_update(tile, isa=isa)
    assert tile.momentum.isfinite().logical_not().nonzero().flatten().tolist() == [3, 40]
    assert tile.working.isnan().nonzero().flatten().tolist() == [3, 40]


@pytest.mark.parametrize("is_decoupled", [True, False])
def test_hundred_steps_agree_with_torch_optim(is_decoupled, isa):
    hyper = dataclasses.replace(ADAMW, is_decoupled=is_decoupled)
    torch.manual_seed(1)
    weights = torch.randn(2000)
    parameter = torch.nn.Parameter(weights.clone())
    optimizer_class = torch.optim.AdamW if is_decoupled else torch.optim.Adam
    optimizer = optimizer_class([parameter], lr=1e-3, weight_decay=0.1, foreach=False, fused=False)
    momentum, variance = torch.zeros(2000), torch.zeros(2000)
    for step in range(1, 101):
        parameter.grad = torch.randn(2000)
        optimizer.step()
        segments = (AdamSegment(begin=0, end=2000, hyper=hyper, step=step),)
        adam_update(AdamTile(weights, None, momentum, variance, parameter.grad, 1.0, segments), isa=isa)
    expected = parameter.detach()
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)  # atol: weights that cross zero
    assert (weights - expected).norm() <= 1e-7 * expected.norm()


def test_split_master_trains_as_float32_does(isa):
    segments = (AdamSegment(begin=0, end=999, hyper=ADAMW, step=5),)
    split_tile = make_tile(999, torch.bfloat16, torch.bfloat16, segments)
    whole_tile = dataclasses.replace(
        split_tile,
        working=master_of(split_tile),
        master=None,
        momentum=split_tile.momentum.clone(),
        variance=split_tile.variance.clone(),
    )
    for _ in range(20):
        adam_update(split_tile, isa=isa)
        adam_update(whole_tile, isa=isa)
    assert_same_bits(master_of(split_tile), whole_tile.working)


def test_segment_factors_are_rounded_once_from_double():
    factors = segment_factors(ADAMW, 2)

    def rounded(value):
        return struct.unpack("f", struct.pack("f", value))[0]

    assert factors.beta1_complement == rounded(0.1)
    assert factors.beta2 == rounded(0.999)
    assert factors.beta2_complement == rounded(1 - 0.999)
    assert factors.neg_step_size == rounded(-(1e-3 / (1 - 0.9**2)))
    assert factors.bias2_sqrt == rounded(math.sqrt(1 - 0.999**2))
    assert (factors.decay, factors.l2) == (rounded(1 - 1e-3 * 0.1), 0.0)
    l2_factors = segment_factors(ADAM_L2, 2)
    assert (l2_factors.decay, l2_factors.l2) == (1.0, rounded(0.1))


def test_hyper_parameters_and_steps_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"AdamHyper.beta2: expected a number in \[0, 1\), got 1.0"):
        dataclasses.replace(ADAMW, beta2=1.0)
    with pytest.raises(ValueError, match=r"AdamHyper.lr: expected a finite number >= 0, got -0.1"):
        dataclasses.replace(ADAMW, lr=-0.1)
    with pytest.raises(ValueError, match="step: expected a count from 1, got 0"):
        segment_factors(ADAMW, 0)
    with pytest.raises(ValueError, match=r"expected bfloat16, float16 or float32, got torch.float64"):
        state_format_of(torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": torch.zeros(7)}, "AdamTile.momentum: expected 8 elements, got 7"),
        ({"variance": torch.zeros(16)[::2]}, "AdamTile.variance: expected a contiguous 1D tensor"),
        ({"grad": torch.zeros(8, dtype=torch.float64)}, "AdamTile.grad: expected torch.float32 or"),
        ({"master": None}, "AdamTile.master: expected torch.int16 for working weights of torch.bfloat16, got None"),
        ({"master": torch.zeros(8)}, "AdamTile.master: expected torch.int16, got torch.float32"),
        ({"working": torch.zeros(8)}, "AdamTile.master: expected None for working weights of torch.float32"),
        ({"working": torch.zeros(2, 4, dtype=torch.bfloat16)}, "AdamTile.working: expected a contiguous 1D tensor"),
        ({"grad": torch.zeros(8, device="meta")}, "AdamTile.grad: expected a CPU tensor, got one on meta"),
        ({"segments": (AdamSegment(begin=0, end=9, hyper=ADAMW, step=1),)}, r"within \[0, 8\], got \[0, 9\)"),
        ({"segments": (AdamSegment(begin=5, end=4, hyper=ADAMW, step=1),)}, r"got \[5, 4\) after 0"),
    ],
)
def test_a_tile_refuses_what_the_kernel_cannot_take(changes, message):
    tile = make_tile(8, torch.bfloat16, torch.float32, ())
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tile, **changes)


def native_segment(begin, end):
    return {"begin": begin, "end": end, "beta2": 0.5, "bias2_sqrt": 1.0, "decay": 1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 3},
        {"grad_dtype": -1},
        {"isa": 5},
        {"numel": -1},
        {"working": ffi.NULL},
        {"grad": ffi.NULL},
        {"format": 0},  # needs a master, which is null
        {"segments": [native_segment(0, 5)]},
        {"segments": [native_segment(-1, 2)]},
        {"segments": [native_segment(2, 4), native_segment(0, 2)]},
        {"segments": [native_segment(0, 3), native_segment(2, 4)]},
    ],
    ids=str,
)
def test_native_adam_answers_einval_and_changes_nothing(changes):
    tensors = [torch.ones(4) for _ in range(4)]
    pointers = [ffi.cast("void *", tensor.data_ptr()) for tensor in tensors]
    segments = ffi.new("gn_adam_segment[]", changes.get("segments", [native_segment(0, 4)]))
    fields = {"format": 2, "numel": 4, "grad_scale": 1.0, "num_segments": len(segments)}
    fields.update(working=pointers[0], grad=pointers[3])
    fields.update(momentum=ffi.cast("float *", pointers[1]), variance=ffi.cast("float *", pointers[2]))
    fields.update(changes, segments=segments)
    assert lib.gn_adam_update(ffi.new("gn_adam_args *", fields)) == -22
    assert all(tensor.tolist() == [1.0] * 4 for tensor in tensors)


PARTS = ("working", "master", "momentum", "variance")


@pytest.mark.parametrize("numel", [1, 37, 4096, 10_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elsewhere", [PARTS, ("working",), ("momentum", "variance")])
def test_an_update_from_elsewhere_equals_one_in_place(numel, dtype, elsewhere, isa):
    """Elements in no segment are copied; what the update reads keeps its bits."""
    segments = (
        AdamSegment(begin=0, end=numel // 3, hyper=ADAMW, step=5),
        AdamSegment(begin=numel // 2, end=numel - numel // 10, hyper=ADAMW, step=2),
    )
    before = make_tile(numel, dtype, torch.float32, segments)
    in_place = dataclasses.replace(before, **{name: cloned(getattr(before, name)) for name in PARTS})
    adam_update(in_place, isa=isa)
    kept = {name: cloned(getattr(before, name)) for name in PARTS}
    source = AdamSource(**{name: getattr(before, name) for name in elsewhere})
    targets = {
        name: None if (part := getattr(before, name)) is None else torch.full_like(part, 7) for name in elsewhere
    }
    moved = dataclasses.replace(before, **targets, source=source)
    adam_update(moved, isa=isa)
    for name in PARTS:
        if getattr(before, name) is None:
            continue
        assert bytes_of(getattr(moved, name)) == bytes_of(getattr(in_place, name))
        if name in elsewhere:
            assert bytes_of(getattr(before, name)) == bytes_of(kept[name])


def bytes_of(tensor):
    return tensor.view(torch.uint8).numpy().tobytes()


def cloned(tensor):
    return None if tensor is None else tensor.clone()


def test_a_source_must_fit_its_tile():
    tile = make_tile(8, torch.float32, torch.float32, ())
    with pytest.raises(ValueError, match=r"AdamSource.momentum: expected 8 elements, got 7"):
        dataclasses.replace(tile, source=AdamSource(momentum=torch.zeros(7)))
    with pytest.raises(ValueError, match=r"AdamSource.working: expected other memory than AdamTile.working"):
        dataclasses.replace(tile, source=AdamSource(working=tile.working))
    with pytest.raises(ValueError, match=r"AdamSource.master: expected None, because the tile has no master"):
        dataclasses.replace(tile, source=AdamSource(master=tile.momentum))
