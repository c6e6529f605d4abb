"""The content of a report as data: tiles, tables and figures, grouped by tab. The page and the terminal draw them."""

from __future__ import annotations

import statistics
import time
from typing import Any

from gemini.profile.chunk_map import chunk_map
from gemini.profile.events import Step
from gemini.profile.figures import channels_figure, map_figure, memory_figure, run_figures, timeline_figure
from gemini.profile.lanes import bars_of_step
from gemini.profile.recording import Recording
from gemini.profile.series import measured_channels, memory_of_step, run_series
from gemini.profile.stalls import ExplainedStall, seconds_by_cause, stalls_of_step
from gemini.profile.words import plan_in_words
from gemini.tiers import format_nbytes

__all__ = ["TABS", "Part", "chunk_table", "expectations_table", "facts_of", "report_of", "stall_tables", "step_tiles"]

Part = dict[str, Any]
"""A part of a report: any of `title`, `note`, `tiles`, `table` and `figure`."""

TABS = (
    {"key": "overview", "title": "Overview", "of_run": False},
    {"key": "memory", "title": "Memory", "of_run": False},
    {"key": "chunks", "title": "Chunks", "of_run": False},
    {"key": "timeline", "title": "Timeline", "of_run": False},
    {"key": "run", "title": "Run", "of_run": True},
    {"key": "plan", "title": "Plan", "of_run": True},
)
MAX_ROWS = 12
"""Maximum number of rows in the table of single waits."""


def report_of(recording: Recording) -> dict[str, Any]:
    """Return everything that a page shows of a recording, as JSON can write it."""
    figures = run_figures(run_series(recording))
    titles = {"loss": "Loss", "tokens": "Tokens per second", "seconds": "Where the time of each step went"}
    return {
        "facts": facts_of(recording),
        "tabs": list(TABS),
        "run": {
            "run": [{"title": titles[key], "figure": figure} for key, figure in figures.items()],
            "plan": [{"title": "In words", "note": plan_in_words(recording.run)}, chunk_table(recording)],
        },
        "steps": [
            {"number": step.number, "parts": _parts_of_step(recording, step)} for step in recording.detailed_steps
        ],
    }


def facts_of(recording: Recording) -> str:
    """Return one line about a run: date, duration and size."""
    run = recording.run
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.began_unix_s))
    detailed = ", ".join(str(step.number) for step in recording.detailed_steps) or "none"
    return (
        f"Rank {run.rank}, {run.num_params:,} parameters in {run.dtype}; recorded from {when}, "
        f"{len(recording.steps)} steps, in detail: {detailed}."
    )


def _parts_of_step(recording: Recording, step: Step) -> dict[str, list[Part]]:
    bars, stalls = bars_of_step(recording, step), stalls_of_step(recording, step)
    predicted = recording.run.predicted
    channels = channels_figure(measured_channels(bars), None if predicted is None else predicted.seconds)
    return {
        "overview": [
            {"tiles": step_tiles(recording, step)},
            expectations_table(recording, step),
            {
                "title": "How long each channel was busy" + (", predicted beside measured" if predicted else ""),
                "note": "Host memory: Adam, storing gradients, and copies by the processor. Compute: forward and "
                "backward, without waits.",
                "figure": channels,
            },
            *stall_tables(recording, stalls),
        ],
        "memory": [
            {
                "title": f"{series.tier.tier} memory" if series.tier.tier != "nvme" else "NVMe swap file",
                "note": None
                if series.tier.tier == "nvme" or any(n is not None for n in series.non_model_nbytes)
                else "Activations and temporaries in this tier were not counted.",
                "figure": memory_figure(
                    series,
                    step,
                    activation_nbytes=recording.run.predicted_activation_nbytes
                    if series.tier.tier == recording.run.compute_tier
                    else None,
                ),
            }
            for series in memory_of_step(recording, step)
        ],
        "chunks": [
            {
                "title": "Tier of each chunk at each moment",
                "note": "At each moment, a unit is entered, left, or reached by backward. Colours change when a chunk "
                "moves.",
                "figure": map_figure(chunk_map(recording, step), recording),
            }
        ],
        "timeline": [
            {
                "title": "Who was busy when",
                "note": "Red: training waited. Hover over a wait to see its chunk and its causes. Drag to zoom; "
                "double-click to see the whole step again.",
                "figure": timeline_figure(bars, stalls, recording, step),
            }
        ],
    }


def step_tiles(recording: Recording, step: Step) -> list[tuple[str, str]]:
    """Return the numbers of a step that matter first, each with what it is."""
    seconds = max(step.end_ns - step.begin_ns, 1) / 1e9
    series = run_series(recording)
    waited_s = step.weights_stall_s + step.update_stall_s
    later = series.seconds[1:] or series.seconds  # the first step touches memory for the first time
    tiles = [
        (f"{seconds:.3f} s", f"step {step.number}; median {statistics.median(later):.3f} s"),
        (
            f"{waited_s / seconds:.0%}",
            f"of it waited: {step.weights_stall_s:.3f} s weights, {step.update_stall_s:.3f} s updates",
        ),
        (str(step.num_fetches), f"fetches, {step.num_misses} of them late; {format_nbytes(step.fetched_nbytes)}"),
    ]
    if recording.run.predicted is not None:
        predicted = recording.run.predicted
        tiles.insert(1, (f"{predicted.step_s:.3f} s", f"predicted; bottleneck {predicted.bottleneck}"))
    if step.nvme_read_nbytes or step.nvme_written_nbytes:
        text = f"read from NVMe; {format_nbytes(step.nvme_written_nbytes)} written"
        tiles.append((format_nbytes(step.nvme_read_nbytes), text))
    logged = recording.logged.get(step.number, {})
    rate = dict(zip(series.steps, series.tokens_per_s, strict=True)).get(step.number)
    if rate is not None:
        tiles.append((f"{rate:,.0f}", "tokens per second"))
    if "loss" in logged:
        tiles.append((f"{logged['loss']:.4f}", "loss"))
    return tiles


def expectations_table(recording: Recording, step: Step) -> Part:
    """Return the planned, predicted and measured figures of a step."""
    run = recording.run
    rows = []
    if run.predicted is not None:
        measured_s = (step.end_ns - step.begin_ns) / 1e9
        rows.append(["time of the step", f"{run.predicted.step_s:.3f} s", f"{measured_s:.3f} s"])
    for series in memory_of_step(recording, step):
        tier = series.tier
        held = max(map(sum, zip(*series.model_nbytes.values(), strict=True)), default=0)
        planned = format_nbytes(sum(tier.planned_nbytes.values()))
        rows.append([f"{tier.tier}: model data at their peak", planned, format_nbytes(held)])
        others = [nbytes for nbytes in series.non_model_nbytes if nbytes is not None]
        if tier.tier == run.compute_tier and (run.predicted_activation_nbytes is not None or others):
            predicted = run.predicted_activation_nbytes
            rows.append(
                [
                    f"{tier.tier}: activations and temporaries",
                    "-" if predicted is None else format_nbytes(predicted),
                    format_nbytes(max(others)) if others else "-",
                ]
            )
    return {
        "title": "Expected beside measured",
        "note": "Measured activations are sampled between layers, so short-lived peaks inside a layer are missing; the "
        "prediction includes them.",
        "table": {"head": ["", "expected", "measured"], "rows": rows, "numbers": [1, 2]},
    }


def stall_tables(recording: Recording, stalls: list[ExplainedStall]) -> list[Part]:
    """Return the causes of waits, and the longest waits one by one."""
    causes = [[cause, f"{seconds * 1e3:.2f}"] for cause, seconds in seconds_by_cause(stalls).items()]
    longest = sorted(stalls, key=lambda each: -each.seconds)[:MAX_ROWS]
    rows = [
        [
            f"{each.seconds * 1e3:.2f}",
            each.stall.reason,
            recording.run.chunks[each.stall.chunk_id].name,
            each.cause + (", fetched only when needed" if each.was_late else ""),
        ]
        for each in longest
    ]
    if not rows:
        return [{"title": "Waits", "note": "None: every chunk was available when it was needed."}]
    return [
        {
            "title": "What training waited for",
            "note": "A wait is attributed to the work done on its chunk in the meantime. Others first: the chunk's own "
            "work was queued. Nothing under way: threads waited for a processor, or did their bookkeeping.",
            "table": {"head": ["cause", "ms"], "rows": causes, "numbers": [1]},
        },
        {
            "title": "The longest waits",
            "table": {"head": ["ms", "for", "chunk", "mostly"], "rows": rows, "numbers": [0]},
        },
    ]


def chunk_table(recording: Recording) -> Part:
    """Return the homes of every chunk."""

    def homes(by_tier: dict[str, int]) -> str:
        return ", ".join(f"{format_nbytes(nbytes)} {tier}" for tier, nbytes in by_tier.items()) or "-"

    rows = [
        [
            chunk.name,
            recording.run.units[chunk.unit_id] or "(model)",
            format_nbytes(chunk.nbytes),
            "stays" if chunk.is_resident else "takes turns",
            *(homes(chunk.homes.get(what, {})) for what in ("weights", "state", "gradients")),
        ]
        for chunk in recording.run.chunks
    ]
    head = ["chunk", "unit", "weights", "in compute memory", "home of weights", "of state", "of gradients"]
    return {"title": "Chunk by chunk", "table": {"head": head, "rows": rows, "numbers": [2]}}
