"""Memory over a step and numbers over a run, as step functions without holes."""

from __future__ import annotations

from recorded import invented

from gemini.profile.chunk_map import Place, chunk_map, describe_moment
from gemini.profile.events import ChunkChange, MemorySample, Moment, Step
from gemini.profile.figures import memory_figure, run_figures
from gemini.profile.series import memory_of_step, run_series
from gemini.profile.words import plan_in_words

STEP = Step(0, 100, 200, True, 0.0, 0.0, 0, 0, 0, 0, 0)


def test_memory_that_nothing_changes_is_drawn_over_the_whole_step() -> None:
    recording = invented()
    recording.samples.append(MemorySample(40, "host", {"slots": 4096}, 7))
    (series,) = memory_of_step(recording, STEP)
    assert (series.times_ns, series.model_nbytes) == ((100, 200), {"slots": (4096, 4096)})
    assert series.non_model_nbytes == (7, 7)
    slots = memory_figure(series, STEP)["data"][0]
    assert (slots["x"], slots["y"]) == ([0.0, 1e-4], [4096, 4096])


def test_model_data_and_activation_checkpoints_are_told_apart() -> None:
    recording = invented()
    held = {"slots": 10, "activation checkpoints": 5}
    recording.samples.extend([MemorySample(90, "host", {"slots": 9}, 1), MemorySample(150, "host", held, 2)])
    (series,) = memory_of_step(recording, STEP)
    assert series.model_nbytes == {"slots": (9, 10, 10)}
    assert series.non_model_nbytes == (1, 7, 7)


def test_what_nobody_counts_is_not_drawn_as_nothing() -> None:
    recording = invented()
    recording.samples.append(MemorySample(90, "host", {"slots": 9}, None))
    (series,) = memory_of_step(recording, STEP)
    assert series.non_model_nbytes == (None, None)
    assert [trace["name"] for trace in memory_figure(series, STEP)["data"]] == ["slots"]


def test_samples_of_later_steps_do_not_count() -> None:
    recording = invented()
    recording.samples.append(MemorySample(201, "host", {"slots": 9}, None))
    assert memory_of_step(recording, STEP) == []


def test_rates_count_the_time_between_steps_too() -> None:
    recording = invented()
    recording.steps.extend(
        [STEP._replace(begin_ns=0, end_ns=10**9), STEP._replace(number=1, begin_ns=2 * 10**9, end_ns=3 * 10**9)]
    )
    recording.logged.update({0: {"tokens": 10.0}, 1: {"tokens": 10.0, "loss": 2.5}})
    series = run_series(recording)
    assert series.seconds == (1.0, 1.0)
    assert series.tokens_per_s == (10.0, 5.0)
    assert series.loss == (None, 2.5)
    assert set(run_figures(series)) == {"loss", "tokens", "seconds"}


def test_a_run_that_logs_nothing_has_only_its_times() -> None:
    recording = invented()
    recording.steps.append(STEP)
    assert set(run_figures(run_series(recording))) == {"seconds"}


def test_the_map_shows_each_chunk_after_each_moment() -> None:
    recording = invented()
    recording.moments.extend([Moment(100, "enter", 0), Moment(110, "enter", 1), Moment(120, "leave", 1)])
    changes = [(90, 0, "at home"), (105, 0, "fetching"), (110, 0, "held"), (115, 0, "ready"), (112, 1, "updating")]
    recording.chunk_changes.extend(ChunkChange(*change) for change in changes)
    found = chunk_map(recording, STEP)
    assert found.places == ((Place.NVME, Place.HELD, Place.READY), (Place.NVME, Place.NVME, Place.UPDATING))


def test_moments_have_names() -> None:
    units = ("", "layer.0")
    found = [describe_moment(Moment(0, *pair), units) for pair in (("enter", 0), ("backward", 1), ("update", None))]
    assert found == ["enter the model", "backward layer.0", "update"]


def test_the_plan_is_said_in_words() -> None:
    assert plan_in_words(invented().run) == (
        "2,048 parameters in float32 lie in 2 chunks. 0 of them stay in host memory, where forward and backward run; "
        "the other 2 take turns in 1 slots of 4.00 KiB. Between uses, weights live with 8.00 KiB in the swap file on "
        "NVMe. Optimizer state lives with 16.00 KiB in the swap file on NVMe. Gradients wait for the update with 8.00 "
        "KiB in host memory. When the recording began, updates ran inside the optimizer's step."
    )
