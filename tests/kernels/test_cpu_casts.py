"""Casts and the lossless split, against torch and against integer arithmetic, for every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.errors import ConfigError
from gemini.kernels.cpu import Isa, cast, join_master, resolve_isa, split_master, supported_isas

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BIT_DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# 0, 1, less than, equal to and more than every vector width, odd tails, and a long one.
NUMELS = (0, 1, 7, 8, 9, 15, 16, 17, 33, 30_003)
EVERY_ISA = [isa for isa in Isa if isa is not Isa.AUTO]


@pytest.fixture(params=supported_isas(), ids=lambda isa: isa.name.lower())
def isa(request):
    return request.param


def all_halves(dtype):
    """Return every 16-bit pattern as a tensor of `dtype`, in an order that mixes them within a vector."""
    patterns = (torch.arange(65536) * 40503) % 65536
    return patterns.to(torch.int32).to(torch.int16).view(dtype)


def awkward_floats(count=200_000):
    """Return float32 bit patterns: random ones, all upper halves with the lower halves where rounding turns."""
    random = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64, generator=torch.Generator().manual_seed(5))
    upper = torch.arange(65536, dtype=torch.int64) << 16
    turns = [upper + low for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    bits = torch.cat([random, *turns]) & 0xFFFFFFFF
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def bits(tensor):
    return tensor.view(BIT_DTYPES[tensor.dtype])


def converted(src, dtype, isa):
    dst = torch.empty(src.numel(), dtype=dtype)
    cast(dst, src, isa=isa)
    return dst


@pytest.mark.parametrize("src_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dst_dtype", FLOAT_DTYPES)
def test_cast_of_every_half_equals_torch(src_dtype, dst_dtype, isa):
    src = all_halves(src_dtype)
    result, expected = converted(src, dst_dtype, isa), src.to(dst_dtype)
    is_nan = src.isnan()
    assert torch.equal(result.isnan(), is_nan)
    assert torch.equal(bits(result)[~is_nan], bits(expected)[~is_nan])


@pytest.mark.parametrize("dst_dtype", [torch.bfloat16, torch.float16])
def test_cast_from_float32_equals_torch_where_rounding_turns(dst_dtype, isa):
    src = awkward_floats()
    result, expected = converted(src, dst_dtype, isa), src.to(dst_dtype)
    is_nan = src.isnan()
    assert torch.equal(result.isnan(), is_nan)
    assert torch.equal(bits(result)[~is_nan], bits(expected)[~is_nan])


@pytest.mark.parametrize("src_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dst_dtype", FLOAT_DTYPES)
def test_cast_gives_the_same_bits_on_every_isa_even_for_nan(src_dtype, dst_dtype, isa):
    src = awkward_floats() if src_dtype == torch.float32 else all_halves(src_dtype)
    assert torch.equal(bits(converted(src, dst_dtype, isa)), bits(converted(src, dst_dtype, Isa.SCALAR)))


def test_cast_makes_nan_quiet_and_keeps_sign_and_payload(isa):
    src = torch.tensor([0x7F800001, -0x7FFFFF, 0x7FABCDEF, 0x7FC00000] * 8, dtype=torch.int32).view(torch.float32)
    assert bits(converted(src, torch.bfloat16, isa))[:4].tolist() == [0x7FC0, 0xFFC0 - 65536, 0x7FEB, 0x7FC0]
    assert bits(converted(src, torch.float16, isa))[:4].tolist() == [0x7E00, 0xFE00 - 65536, 0x7F5E, 0x7E00]


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("offset", [0, 1])
def test_cast_of_any_length_writes_only_its_elements(numel, offset, isa):
    src = torch.randn(numel + offset)[offset:]
    whole = torch.full((numel + offset + 1,), 7.0, dtype=torch.bfloat16)
    cast(whole[offset : numel + offset], src, isa=isa)
    assert torch.equal(whole[offset : numel + offset], src.to(torch.bfloat16))
    assert whole[numel + offset].item() == 7.0


def test_cast_ignores_flush_to_zero_of_the_calling_thread(isa):
    src = torch.tensor([1, -0x7FFFFFFF, 0x00400000] * 8, dtype=torch.int32).view(torch.float32)
    halves = torch.tensor([1, 0x3FF] * 8, dtype=torch.int16).view(torch.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        narrow, wide = converted(src, torch.bfloat16, isa), converted(halves, torch.float32, isa)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(narrow), bits(src.to(torch.bfloat16)))
    assert torch.equal(wide, halves.to(torch.float32))


def split(master, isa):
    working = torch.empty(master.numel(), dtype=torch.bfloat16)
    residual = torch.empty(master.numel(), dtype=torch.int16)
    split_master(working, residual, master, isa=isa)
    return working, residual


def joined(working, residual, isa):
    master = torch.empty(working.numel())
    join_master(master, working, residual, isa=isa)
    return master


def test_split_follows_its_definition_and_join_inverts_it(isa):
    master = awkward_floats()
    working, residual = split(master, isa)
    integers = bits(master).to(torch.int64) & 0xFFFFFFFF
    upper = ((integers + 0x8000) & 0xFFFFFFFF) >> 16
    assert torch.equal(bits(working).to(torch.int64) & 0xFFFF, upper)
    assert torch.equal((residual.to(torch.int64) + (upper << 16)) & 0xFFFFFFFF, integers)
    assert torch.equal(bits(joined(working, residual, isa)), bits(master))


@pytest.mark.parametrize("numel", NUMELS)
def test_split_and_join_of_any_length_and_offset(numel, isa):
    master = torch.randn(numel + 1)[1:]
    working, residual = split(master, isa)
    assert torch.equal(joined(working, residual, isa), master)


@settings(max_examples=100)
@given(patterns=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_split_and_join_round_trip_any_bits(patterns):
    master = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    for isa in supported_isas():
        working, residual = split(master, isa)
        assert bits(joined(working, residual, isa)).tolist() == patterns


def test_split_working_weight_is_nearest_bfloat16_ties_away():
    master = torch.tensor([0x3F808000, 0x3F807FFF, 0x3F818000], dtype=torch.int32).view(torch.float32)
    working, residual = split(master, Isa.AUTO)
    assert bits(working).tolist() == [0x3F81, 0x3F80, 0x3F82]
    assert residual.tolist() == [-32768, 32767, -32768]


def test_cast_rejects_tensors_it_cannot_take_by_address():
    with pytest.raises(ValueError, match=r"cast: dst: expected 4 elements, got 3"):
        cast(torch.empty(3), torch.empty(4))
    with pytest.raises(
        ValueError, match=r"cast: src: expected a contiguous 1D tensor, got shape \[4\] and stride \[2\]"
    ):
        cast(torch.empty(4), torch.empty(8)[::2])
    with pytest.raises(ValueError, match=r"cast: src: expected torch.float32 or .*, got torch.int64"):
        cast(torch.empty(4), torch.empty(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="cast: dst: expected a CPU tensor, got one on meta"):
        cast(torch.empty(4, device="meta"), torch.empty(4))
    with pytest.raises(ValueError, match="residual: expected torch.int16, got torch.int32"):
        split_master(torch.empty(4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32), torch.empty(4))


def test_resolve_isa_names_what_the_machine_supports():
    assert resolve_isa("scalar") is Isa.SCALAR
    assert resolve_isa("auto") in supported_isas()
    assert Isa.SCALAR in supported_isas()
    with pytest.raises(ConfigError, match=r'expected "auto" or one this machine supports \("scalar".*got \'mmx\''):
        resolve_isa("mmx")


@pytest.mark.parametrize("isa", EVERY_ISA, ids=lambda isa: isa.name.lower())
def test_every_isa_is_covered_by_the_tests_of_this_directory(isa):
    """The skips of this test say which instruction sets this machine could not test."""
    if isa not in supported_isas():
        pytest.skip(f"this machine has no {isa.name}")
    src = torch.randn(100)
    assert torch.equal(converted(src, torch.bfloat16, isa), src.to(torch.bfloat16))


def test_an_isa_the_machine_lacks_is_a_config_error():
    missing = next(isa for isa in EVERY_ISA if isa not in supported_isas())
    with pytest.raises(ConfigError, match=f"does not support {missing.name}; it supports SCALAR"):
        cast(torch.empty(4), torch.empty(4), isa=missing)
    with pytest.raises(ConfigError, match="this machine supports"):
        resolve_isa(missing.name.lower())
