"""The time of a step, against numbers computed by hand (docs/cost_model.md) and against what must hold for any."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini.errors import ConfigError
from gemini.placement import ChunkDemand, ChunkPlacement, PlacementPlan, RuntimeShape
from gemini.placement.cost_model import (
    Channel,
    HardwareProfile,
    StepFlops,
    StepPrediction,
    StepWork,
    Work,
    count_step,
    predict_step,
    transformer_flops,
)
from gemini.placement.overlap import OverlapMode
from gemini.tiers import MemoryTier

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
COST_MODEL = Path(__file__).parents[2] / "docs" / "cost_model.md"

# The chunks, homes and buffers of the worked example of docs/memory_model.md, with spare places on disk.
SHAPE = RuntimeShape(has_device=True, tile_numel=4096, ring_depth=2, grad_itemsize=4)
CHUNKS = [
    ChunkDemand(chunk_id=i, numel=numel, working_itemsize=2, master_itemsize=2, is_trainable=True, is_pinned=i == 0)
    for i, numel in enumerate([4096, 10_000])
]
PLAN = PlacementPlan(
    chunks=(
        ChunkPlacement(chunk_id=0, working=(HOST,), state=(HOST,), grad=HOST, is_resident=True),
        ChunkPlacement(
            chunk_id=1,
            working=(HOST, NVME, NVME),
            state=(HOST, NVME, NVME),
            grad=NVME,
            is_resident=False,
            spares=(1, 2),
        ),
    ),
    num_slots=1,
    slot_nbytes=20_480,
)
FLOPS = StepFlops(forward=2_819_200, backward=5_638_400)  # 2 x 14,096 x 100 tokens; twice that
WORK = StepWork(
    forward=Work(  # the copy engine reads what it copies; of that, tiles 1 and 2 come from disk: 8,192 + 3,616
        flops=2_819_200, h2d_nbytes=20_000, host_memory_nbytes=20_000, nvme_read_nbytes=11_808
    ),
    backward=Work(
        flops=5_638_400,
        h2d_nbytes=20_000,
        d2h_nbytes=28_192,  # 8,192 + 20,000
        host_memory_nbytes=132_768,  # (2 + 4) x 14,096, and both copies: 20,000 + 28,192
        nvme_read_nbytes=11_808,
        nvme_written_nbytes=40_000,
    ),
    ahead=Work(  # tiles 1 and 2 of chunk 1: 5,904 elements with records of 40,960 and 20,480
        host_memory_nbytes=170_112,  # 2 x 61,440 + 2 x 11,808 + 4 x 5,904
        nvme_read_nbytes=96_864,  # 61,440 + 11,808 + 23,616
        nvme_written_nbytes=73_248,  # 61,440 + 11,808
    ),
    rest=Work(  # chunk 0 and tile 0 of chunk 1, of 4096 elements each; the gradient of the latter is on disk
        h2d_nbytes=8_192,
        host_memory_nbytes=237_568,  # 2 x (2 x 40,960 + 2 x 8,192 + 16,384), and the copy
        nvme_read_nbytes=16_384,
    ),
)
PROFILE = HardwareProfile(
    matrix_rates={"bfloat16": 1e7},
    host_memory_rate=1e6,
    h2d_rate=1e5,
    d2h_rate=1e5,
    nvme_read_rate=2e5,
    nvme_write_rate=2e5,
    nvme_mixed_rate=2.5e5,
)
STEP_S = {OverlapMode.OFF: 1.631744, OverlapMode.NEXT_FORWARD: 1.408864, OverlapMode.SPECULATIVE: 1.024064}
CHANNEL_S = {
    Channel.COMPUTE: 0.84576,
    Channel.H2D: 0.48192,
    Channel.D2H: 0.28192,
    Channel.DEVICE_MEMORY: 0.0,
    Channel.HOST_MEMORY: 0.560448,
    Channel.NVME: 1.024064,  # 2 x 113,248 at 2.5e5, then 23,616 more reads at 2e5
}


def predict(work: StepWork, mode: OverlapMode, profile: HardwareProfile = PROFILE, **kwargs: bool) -> StepPrediction:
    return predict_step(work, profile, dtype="bfloat16", mode=mode, **{"has_device": True, **kwargs})


def test_worked_example_has_the_work_computed_by_hand():
    assert count_step(CHUNKS, PLAN, SHAPE, FLOPS) == WORK


@pytest.mark.parametrize("mode", list(OverlapMode))
def test_worked_example_takes_the_time_computed_by_hand(mode):
    prediction = predict(WORK, mode)
    assert prediction.step_s == pytest.approx(STEP_S[mode], rel=1e-12)
    assert prediction.seconds == pytest.approx(CHANNEL_S, rel=1e-12)
    assert prediction.bottleneck is Channel.NVME
    assert prediction.overlap == mode.value


def test_documentation_gives_the_numbers_of_the_worked_example():
    text = COST_MODEL.read_text(encoding="ascii")
    parts = {"forward": WORK.forward, "backward": WORK.backward, "update, ahead": WORK.ahead, "update, rest": WORK.rest}
    for name, work in parts.items():
        amounts = (
            int(work.flops),
            work.h2d_nbytes,
            work.d2h_nbytes,
            work.host_memory_nbytes,
            work.nvme_read_nbytes,
            work.nvme_written_nbytes,
        )
        assert f"| {name} | " + " | ".join(f"{amount:,}" for amount in amounts) + " |" in text
    for mode, seconds in STEP_S.items():
        assert f"| {mode.value} | {seconds} |" in text


def with_spares(*spares: int, **fields: bool) -> PlacementPlan:
    second = dataclasses.replace(PLAN.chunks[1], spares=spares, **fields)
    return dataclasses.replace(PLAN, chunks=(PLAN.chunks[0], second))


def test_without_spare_places_nothing_goes_ahead():
    work = count_step(CHUNKS, with_spares(), SHAPE, FLOPS)
    assert work.ahead == Work()
    assert work.rest == WORK.update


def test_a_tile_in_host_memory_that_goes_ahead_is_written_to_lines_that_are_read_first():
    work = count_step(CHUNKS, with_spares(0, 1, 2), SHAPE, FLOPS)
    in_place = Work(host_memory_nbytes=114_688, nvme_read_nbytes=16_384)  # 2 x 40,960 + 2 x 8,192 + 16,384
    again = Work(host_memory_nbytes=8_192 + 40_960)  # weights and record
    assert work.ahead == WORK.ahead + in_place + again
    assert work.ahead + work.rest == WORK.update + again


def test_a_resident_chunk_is_not_fetched():
    work = count_step(CHUNKS, with_spares(is_resident=True), SHAPE, FLOPS)
    assert work.forward == Work(flops=FLOPS.forward)


def test_state_on_the_device_is_updated_in_its_memory_alone():
    chunk = dataclasses.replace(CHUNKS[0], numel=8192)
    homes = ChunkPlacement(chunk_id=0, working=(DEVICE,) * 2, state=(DEVICE,) * 2, grad=DEVICE, is_resident=True)
    work = count_step([chunk], PlacementPlan(chunks=(homes,), num_slots=0, slot_nbytes=0), SHAPE, FLOPS)
    assert work.rest == Work(device_memory_nbytes=229_376)  # 8192 x (2 x 10 + 2 x 2 + 4)
    assert work.backward == Work(flops=FLOPS.backward, device_memory_nbytes=49_152)  # 8192 x (2 + 4)


def test_frozen_chunk_is_fetched_and_that_is_all():
    chunk = dataclasses.replace(CHUNKS[0], is_trainable=False, master_itemsize=0)
    homes = ChunkPlacement(chunk_id=0, working=(NVME,), state=(), grad=None, is_resident=False)
    work = count_step([chunk], PlacementPlan(chunks=(homes,), num_slots=1, slot_nbytes=8192), SHAPE, FLOPS)
    assert work.total == Work(flops=8_457_600, h2d_nbytes=16_384, host_memory_nbytes=16_384, nvme_read_nbytes=16_384)


def test_without_a_device_host_tiles_are_copied_to_the_slot():
    plan = dataclasses.replace(PLAN, chunks=PLAN.chunks[1:])
    work = count_step(CHUNKS[1:], plan, dataclasses.replace(SHAPE, has_device=False), FLOPS)
    assert work.forward == Work(flops=2_819_200, nvme_read_nbytes=11_808, host_memory_nbytes=16_384)  # 2 x 8,192


def test_without_a_device_the_processor_that_computes_also_updates():
    work = StepWork(
        forward=Work(flops=1e7), backward=Work(flops=2e7), ahead=Work(), rest=Work(host_memory_nbytes=500_000)
    )
    assert predict(work, OverlapMode.NEXT_FORWARD, has_device=True).step_s == pytest.approx(3.0)
    assert predict(work, OverlapMode.NEXT_FORWARD, has_device=False).step_s == pytest.approx(3.5)
    assert predict(work, OverlapMode.OFF, has_device=True).step_s == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("read", "written", "mixed_rate", "seconds"),
    [
        (3000, 0, 1500, 3.0),
        (0, 4000, 1500, 2.0),
        (1000, 1000, 1600, 1.25),
        (1000, 3000, 1600, 2.25),  # 2 x 1000 mixed, then 2000 written
        (1000, 1000, 9999, 1.0),  # reading is no faster for being mixed
    ],
)
def test_a_disk_mixes_what_it_can_and_does_the_rest_alone(read, written, mixed_rate, seconds):
    profile = dataclasses.replace(PROFILE, nvme_read_rate=1000, nvme_write_rate=2000, nvme_mixed_rate=mixed_rate)
    found = profile.seconds(Work(nvme_read_nbytes=read, nvme_written_nbytes=written), "bfloat16")
    assert found[Channel.NVME] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ({"h2d_rate": None}, "copies to the device"),
        ({"nvme_mixed_rate": None}, "disk reads and writes at once"),
        ({"nvme_read_rate": None}, "disk reads"),
        ({"matrix_rates": {"float32": 1e9}}, "matrix products in bfloat16"),
    ],
)
def test_a_rate_that_is_needed_and_not_known_is_named(missing, what):
    with pytest.raises(ConfigError, match=f"no rate for {what}, which this plan needs: call gemini.measure_hardware"):
        predict(WORK, OverlapMode.OFF, dataclasses.replace(PROFILE, **missing))


@pytest.mark.parametrize(
    ("compute_s", "nvme_s", "shares", "seconds"),
    [
        (3.0, 5.0, (None, None), 5.0),
        (4.0, 6.0, (0.5, 0.75), 8.0),  # compute ends at 8 s, when the disk has done 6 s of its work too
        (2.0, 6.0, (0.5, 0.75), 7.0),  # compute at 4 s, with 3 s of the disk's work left
        (6.0, 3.0, (0.5, 0.75), 8.0),  # the disk at 4 s, with 4 s of compute left
        (0.0, 6.0, (0.5, 0.75), 6.0),
    ],
)
def test_compute_and_disk_share_until_one_is_done(compute_s, nvme_s, shares, seconds):
    compute_share, nvme_share = shares
    profile = dataclasses.replace(
        PROFILE, compute_share_beside_nvme=compute_share, nvme_share_beside_compute=nvme_share
    )
    assert profile.span(compute_s, nvme_s) == pytest.approx(seconds)


def test_a_step_takes_longer_where_the_disk_slows_compute_down():
    work = StepWork(
        forward=Work(flops=4e7, nvme_read_nbytes=1_200_000), backward=Work(flops=8e7), ahead=Work(), rest=Work()
    )
    profile = dataclasses.replace(PROFILE, compute_share_beside_nvme=0.5, nvme_share_beside_compute=0.75)
    assert predict(work, OverlapMode.OFF, PROFILE).step_s == pytest.approx(6 + 8)
    assert predict(work, OverlapMode.OFF, profile).step_s == pytest.approx(8 + 8)


def test_a_rate_that_is_not_needed_may_be_unknown():
    profile = HardwareProfile(matrix_rates={"bfloat16": 1e7}, host_memory_rate=1e6)
    work = StepWork(forward=Work(flops=1e7), backward=Work(flops=2e7), ahead=Work(), rest=Work())
    assert predict(work, OverlapMode.OFF, profile).step_s == pytest.approx(3.0)


@pytest.mark.parametrize(("has_device", "channel"), [(True, "device_memory_nbytes"), (False, "host_memory_nbytes")])
def test_other_operations_of_the_model_are_passes_over_compute_memory(has_device, channel):
    shape = dataclasses.replace(SHAPE, has_device=has_device)
    bare = count_step(CHUNKS, PLAN, shape, FLOPS)
    work = count_step(CHUNKS, PLAN, shape, dataclasses.replace(FLOPS, forward_nbytes=300, backward_nbytes=700))
    assert work.forward == bare.forward + Work(**{channel: 300})
    assert work.backward == bare.backward + Work(**{channel: 700})
    assert work.update == bare.update


def test_transformer_flops_are_those_of_two_layers_computed_by_hand():
    # Width 8: 12 x 64 parameters a layer, an output layer of 8 x 100; 2 sequences of 16 tokens.
    shape = {"num_tokens": 32, "num_layers": 2, "hidden_size": 8, "sequence_length": 16}
    attention = 4 * 32 * 2 * 8 * 16  # 32,768
    forward = 2 * 2336 * 32 + attention
    assert transformer_flops(num_params=2336, **shape) == StepFlops(forward=forward, backward=2 * forward)
    again = transformer_flops(num_params=2336, num_recomputed_params=1536, **shape)
    assert again == StepFlops(forward=182_272, backward=495_616)  # 2 x 182,272 + 2 x 1536 x 32 + 32,768


@pytest.mark.parametrize("name", ["num_params", "num_tokens", "num_layers", "num_recomputed_params"])
def test_negative_counts_are_refused_by_name(name):
    counts = {"num_params": 1, "num_tokens": 1, "num_layers": 1, "hidden_size": 1, "sequence_length": 1, name: -1}
    with pytest.raises(ConfigError, match=rf"^transformer_flops: {name}: expected 0 or more, got -1$"):
        transformer_flops(**counts)


# ---------------------------------------------------------------- what holds for any work and machine

amounts = st.integers(0, 10**6)
rates = st.floats(1e3, 1e6)
works = st.builds(Work, flops=amounts, **dict.fromkeys(list(Work.__dataclass_fields__)[1:], amounts))
steps = st.builds(StepWork, forward=works, backward=works, ahead=works, rest=works)
modes = st.sampled_from(OverlapMode)
RATES = [field.name for field in dataclasses.fields(HardwareProfile) if field.name.endswith("_rate")]
shares = st.floats(0.5, 1)


@st.composite
def profiles(draw: st.DrawFn) -> HardwareProfile:
    """Draw rates; two things at once are no slower than in turn."""
    fields = {name: draw(rates) for name in RATES}
    fields |= {name: draw(shares) for name in ("compute_share_beside_nvme", "nvme_share_beside_compute")}
    read, write = fields["nvme_read_rate"], fields["nvme_write_rate"]
    fields["nvme_mixed_rate"] = 2 * read * write / (read + write) * draw(st.floats(1, 3))
    return HardwareProfile(matrix_rates={"bfloat16": draw(rates)}, **fields)


def at_least(a: float, b: float) -> bool:
    return a >= b * (1 - 1e-12)


@given(steps, profiles(), st.booleans())
def test_more_overlap_never_takes_longer(work, profile, has_device):
    off, next_forward, speculative = (predict(work, mode, profile, has_device=has_device) for mode in OverlapMode)
    assert at_least(off.step_s, next_forward.step_s)
    assert at_least(next_forward.step_s, speculative.step_s)


@given(steps, profiles(), modes, st.booleans())
def test_no_channel_is_busy_longer_than_the_step(work, profile, mode, has_device):
    prediction = predict(work, mode, profile, has_device=has_device)
    assert at_least(prediction.step_s, max(prediction.seconds.values()))
    assert prediction.seconds[prediction.bottleneck] == max(prediction.seconds.values())


@given(steps, profiles(), modes, st.data())
def test_more_work_never_takes_less_time(work, profile, mode, data):
    part = data.draw(st.sampled_from(list(StepWork.__dataclass_fields__)))
    more = dataclasses.replace(work, **{part: getattr(work, part) + data.draw(works)})
    assert at_least(predict(more, mode, profile).step_s, predict(work, mode, profile).step_s)


@given(steps, profiles(), modes, st.sampled_from(RATES), st.floats(1, 10))
def test_a_faster_machine_never_takes_longer(work, profile, mode, name, factor):
    faster = dataclasses.replace(profile, **{name: getattr(profile, name) * factor})
    assert at_least(predict(work, mode, profile).step_s, predict(work, mode, faster).step_s)


@given(steps, profiles(), modes)
def test_all_rates_doubled_halve_the_time(work, profile, mode):
    twice = {name: 2 * getattr(profile, name) for name in RATES}
    matrix_rates = {dtype: 2 * rate for dtype, rate in profile.matrix_rates.items()}
    faster = dataclasses.replace(profile, matrix_rates=matrix_rates, **twice)
    assert predict(work, mode, faster).step_s == pytest.approx(predict(work, mode, profile).step_s / 2)
