"""Figures as plotly.js takes them: data and layout, without the colours of paper and text, which the page chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from gemini.profile.chunk_map import ChunkMap, Place, describe_moment
from gemini.profile.events import Step
from gemini.profile.lanes import LANES, Bar, merge_bars, rows_of
from gemini.profile.recording import Recording
from gemini.profile.series import RunSeries, TierSeries
from gemini.profile.stalls import ExplainedStall
from gemini.tiers import format_nbytes

__all__ = ["Figure", "channels_figure", "map_figure", "memory_figure", "run_figures", "timeline_figure"]

Figure = dict[str, Any]
"""Object with `data` and `layout` of plotly.js."""

PALETTE = ("#4c78a8", "#54a24b", "#b279a2", "#eeca3b", "#72b7b2", "#9d755d", "#439894", "#83bcb6", "#88d27a")
"""Colours from Vega's category20, distinct on white and on black, and for most colour-blind readers."""
NON_MODEL_COLOR, STALL_COLOR, LINE_COLOR = "#f58518", "#e45756", "#888888"
PLACE_COLORS = {
    Place.NVME: "#b9b9c6",
    Place.HOST: "#a5c8e4",
    Place.DEVICE: "#c5b0d5",
    Place.FETCHING: "#eeca3b",
    Place.READY: "#54a24b",
    Place.HELD: "#1f5fa8",
    Place.UPDATING: "#e45756",
}
LABEL_COLORS = {
    "forward": "#72a4d8",
    "backward": "#1f5fa8",
    "recompute": "#a5c8e4",
    "loss": "#83bcb6",
    "optimizer step": "#b279a2",
    "adam update": "#439894",
    "gradient": "#eeca3b",
}
CONTENT_COLORS = {"weights": "#54a24b", "state": "#9a78c2", "gradients": "#eeca3b", "activations": "#f58518"}
"""Colours of copies and transfers by content."""
LONG_STEP_NS = 2_000_000_000
"""Length from which a step is drawn in seconds."""
MAX_TICKS = 20
"""Maximum number of steps that are numbered one by one."""
NUM_PIXELS = 1500
"""Number of pixels for a step's length; things closer than one pixel are drawn as one."""


def memory_figure(series: TierSeries, step: Step, *, activation_nbytes: int | None = None) -> Figure:
    """Draw one tier's bytes over a step: model data stacked, then non-model data; budget, plan and prediction as lines.

    Args:
        series: the tier's series.
        step: the step.
        activation_nbytes: expected non-model data in the tier; None: not known.

    Returns:
        The figure.
    """
    budget_name = "budget of the engine's" if series.tier.tier == "host" else "budget"
    times = _since(step, series.times_ns)
    traces = [
        _area(purpose, times, nbytes, PALETTE[index % len(PALETTE)])
        for index, (purpose, nbytes) in enumerate(series.model_nbytes.items())
        if any(nbytes)
    ]
    if any(nbytes is not None for nbytes in series.non_model_nbytes):
        values = [nbytes or 0 for nbytes in series.non_model_nbytes]
        traces.append(_area("non-model: activations, temporaries", times, values, NON_MODEL_COLOR))
    planned = sum(series.tier.planned_nbytes.values())
    lines = {"planned": planned, budget_name: series.tier.budget_nbytes}
    if activation_nbytes is not None:
        lines["planned, with activations"] = planned + activation_nbytes
    top = max((sum(values) for values in zip(*(trace["y"] for trace in traces), strict=True)), default=0)
    for name, nbytes in lines.items():
        if nbytes and nbytes <= 4 * top:  # a distant budget would flatten the rest
            traces.append(_level(name, nbytes, _since(step, (step.begin_ns, step.end_ns))))
    values, texts = _byte_ticks(max([top, *(max(trace["y"]) for trace in traces if "stackgroup" not in trace)]))
    layout = {
        "xaxis": _time_axis(step),
        "yaxis": {
            "title": {"text": "held"},
            "tickvals": values,
            "ticktext": texts,
            "rangemode": "tozero",
            "automargin": True,
        },
        "hovermode": "x unified",
        "legend": {"traceorder": "reversed"},
        "height": 360,
    }
    return {"data": traces, "layout": layout}


def _byte_ticks(top: int) -> tuple[list[int], list[str]]:
    """Return about five round numbers of bytes up to one, and how they are written."""
    step = 1 << max(0, (max(top, 1) // 4).bit_length() - 1)
    values = list(range(0, top + step, step))
    return values, [format_nbytes(value).replace(".00", "") for value in values]


def _area(name: str, times_ms: Sequence[float], nbytes: Sequence[int], color: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(times_ms),
        "y": list(nbytes),
        "text": [format_nbytes(value) for value in nbytes],
        "hovertemplate": "%{text}",
        "stackgroup": "held",
        "line": {"shape": "hv", "width": 0.5, "color": color},
        "fillcolor": color,
    }


def _level(name: str, nbytes: int, ends_ms: Sequence[float]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"{name}: {format_nbytes(nbytes)}",
        "x": list(ends_ms),
        "y": [nbytes, nbytes],
        "line": {"dash": "dot" if name.startswith("planned") else "dash", "width": 1.5, "color": LINE_COLOR},
        "hoverinfo": "skip",
    }


def map_figure(found: ChunkMap, recording: Recording) -> Figure:
    """Draw the place of each chunk at each moment, one column per moment."""
    run = recording.run
    places = list(Place)
    number = {place: index for index, place in enumerate(places)}
    moments = [describe_moment(moment, run.units) for moment in found.moments]
    names = [chunk.name for chunk in run.chunks]
    scale = []
    for place in places:
        color = PLACE_COLORS[place]
        scale += [[number[place] / len(places), color], [(number[place] + 1) / len(places), color]]
    heatmap = {
        "type": "heatmap",
        "z": [[number[place] for place in row] for row in found.places],
        "text": [[place.value for place in row] for row in found.places],
        "x": list(range(len(moments))),
        "y": names,
        "customdata": [moments] * len(names),
        "hovertemplate": "%{y}<br>moment %{x}: %{customdata}<br><b>%{text}</b><extra></extra>",
        "zmin": -0.5,
        "zmax": len(places) - 0.5,
        "colorscale": scale,
        "colorbar": {"tickvals": list(range(len(places))), "ticktext": [place.value for place in places], "len": 1},
        "xgap": 1 if len(moments) < 200 else 0,
        "ygap": 1 if len(names) < 100 else 0,
    }
    layout = {
        "xaxis": {"title": {"text": "moment of the step"}, "showgrid": False},
        "yaxis": {"autorange": "reversed", "showgrid": False, "automargin": True, "tickfont": {"size": 10}},
        "height": max(320, 120 + 16 * len(names)),
    }
    return {"data": [heatmap], "layout": layout}


def timeline_figure(bars: Sequence[Bar], stalls: Sequence[ExplainedStall], recording: Recording, step: Step) -> Figure:
    """Draw a step's lanes, with waits marked across all of them."""
    gap_ns = max(1, (step.end_ns - step.begin_ns) // NUM_PIXELS)
    apart = [bar for bar in bars if bar.lane == "compute"]  # few, one after the other
    shown = [*apart, *merge_bars([bar for bar in bars if bar.lane != "compute"], gap_ns=gap_ns)]
    rows = rows_of(shown)
    heights = Counter({bar.lane: 0 for bar in shown})
    for bar, row in zip(shown, rows, strict=True):
        heights[bar.lane] = max(heights[bar.lane], row + 1)
    lanes = [lane for lane in LANES if heights[lane]]
    tops = dict(zip(lanes, accumulate((heights[lane] for lane in lanes), initial=0), strict=False))
    why = {(each.stall.chunk_id, each.stall.begin_ns): each for each in stalls}
    by_label: dict[str, list[tuple[Bar, int]]] = {}
    for bar, row in zip(shown, rows, strict=True):
        by_label.setdefault(bar.label, []).append((bar, tops[bar.lane] + row))
    traces = []
    for label, placed in by_label.items():
        texts = [_describe(bar, recording, why) for bar, _ in placed]
        traces.append(_bars_trace(label, placed, texts, step))
    marks = merge_bars([bar for bar in bars if bar.lane == "waits"], gap_ns=gap_ns)
    layout = {
        "barmode": "overlay",
        "xaxis": {**_time_axis(step), "range": _since(step, (step.begin_ns, step.end_ns))},
        "yaxis": {
            "tickvals": [tops[lane] + (heights[lane] - 1) / 2 for lane in lanes],
            "ticktext": lanes,
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        },
        "shapes": [_wait_mark(bar, step) for bar in marks if bar.end_ns - bar.begin_ns > 2 * gap_ns],
        "height": 180 + 22 * sum(heights.values()),
        "margin": {"b": 130},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    }
    return {"data": traces, "layout": layout}


def _bars_trace(label: str, placed: Sequence[tuple[Bar, int]], texts: Sequence[str], step: Step) -> Figure:
    """Return the bars of one label, each in its row."""
    color = STALL_COLOR if placed[0][0].lane == "waits" else _color_of(label)
    return {
        "type": "bar",
        "orientation": "h",
        "name": label,
        "base": _since(step, [bar.begin_ns for bar, _ in placed]),
        "x": [(bar.end_ns - bar.begin_ns) / _unit_of(step)[0] for bar, _ in placed],
        "y": [row for _, row in placed],
        "width": 0.86,
        "text": list(texts),
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": color, "line": {"width": 0}},
    }


def _wait_mark(bar: Bar, step: Step) -> Figure:
    """Return what shades all lanes while training waits."""
    return {
        "type": "rect",
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "x0": _since(step, [bar.begin_ns])[0],
        "x1": _since(step, [bar.end_ns])[0],
        "fillcolor": STALL_COLOR,
        "opacity": 0.13,
        "line": {"width": 0},
        "layer": "below",
    }


def _color_of(label: str) -> str:
    """Return the colour of the operation, or else of its object, the last word of the label."""
    return LABEL_COLORS.get(label) or CONTENT_COLORS.get(label.rpartition(" ")[2], LINE_COLOR)


def _describe(bar: Bar, recording: Recording, why: dict[tuple[int, int], ExplainedStall]) -> str:
    lines = [f"<b>{bar.label}</b>, {(bar.end_ns - bar.begin_ns) / 1e6:.3f} ms"]
    if bar.unit_id is not None:
        lines.append(recording.run.units[bar.unit_id] or "the model itself")
    if bar.chunk_id is not None:
        lines.append(recording.run.chunks[bar.chunk_id].name)
    if bar.nbytes:
        rate = bar.nbytes / max(bar.end_ns - bar.begin_ns, 1)
        lines.append(f"{format_nbytes(bar.nbytes)}, {rate:.2f} GB/s")
    explained = why.get((bar.chunk_id, bar.begin_ns)) if bar.chunk_id is not None and bar.lane == "waits" else None
    if explained is not None:
        if explained.was_late:
            lines.append("fetched only when needed")
        lines += [f"{cause}: {ns / 1e6:.3f} ms" for cause, ns in explained.spent_ns.items()]
    return "<br>".join(lines)


def channels_figure(measured: dict[str, float], predicted: dict[str, float] | None) -> Figure:
    """Draw the predicted and measured busy seconds of each channel."""
    names = [name for name in measured if measured[name] or (predicted or {}).get(name)]
    traces = []
    for label, seconds, color in (("measured", measured, PALETTE[0]), ("predicted", predicted, NON_MODEL_COLOR)):
        if seconds is not None:
            values = [seconds.get(name, 0.0) for name in names]
            traces.append(
                {
                    "type": "bar",
                    "name": label,
                    "x": names,
                    "y": values,
                    "marker": {"color": color},
                    "hovertemplate": "%{x}: %{y:.3f} s",
                }
            )
    layout = {"barmode": "group", "yaxis": {"title": {"text": "seconds busy in the step"}}, "height": 320}
    return {"data": traces, "layout": layout}


def run_figures(series: RunSeries) -> dict[str, Figure]:
    """Draw loss, rate and time over the steps; quantities without values are left out."""
    figures = {}
    for key, values, title in (
        ("loss", series.loss, "loss"),
        ("tokens", series.tokens_per_s, "tokens per second"),
    ):
        if any(value is not None for value in values):
            trace = {
                "type": "scatter",
                "mode": "lines+markers" if len(values) < 100 else "lines",
                "x": list(series.steps),
                "y": list(values),
                "line": {"color": PALETTE[0]},
                "hovertemplate": "step %{x}: %{y:.4g}<extra></extra>",
            }
            figures[key] = {"data": [trace], "layout": _step_layout(title, len(series.steps))}
    others = [
        max(0.0, seconds - weights - update)
        for seconds, weights, update in zip(series.seconds, series.weights_stall_s, series.update_stall_s, strict=True)
    ]
    parts = (
        ("computing and all else", others, PALETTE[0]),
        ("waiting for weights", series.weights_stall_s, STALL_COLOR),
        ("waiting for updates", series.update_stall_s, NON_MODEL_COLOR),
    )
    bars = [
        {
            "type": "bar",
            "name": name,
            "x": list(series.steps),
            "y": list(values),
            "marker": {"color": color},
            "hovertemplate": "%{y:.3f} s",
        }
        for name, values, color in parts
    ]
    layout = {**_step_layout("seconds", len(series.steps)), "barmode": "stack", "hovermode": "x unified"}
    return {**figures, "seconds": {"data": bars, "layout": layout}}


def _step_layout(title: str, num_steps: int) -> Figure:
    axis = {"title": {"text": "step"}, **({"dtick": 1} if num_steps <= MAX_TICKS else {})}
    return {"xaxis": axis, "yaxis": {"title": {"text": title}}, "height": 300}


def _unit_of(step: Step) -> tuple[float, str]:
    """Return the unit that a step's times are drawn in, in nanoseconds, and its name."""
    return (1e9, "s") if step.end_ns - step.begin_ns >= LONG_STEP_NS else (1e6, "ms")


def _time_axis(step: Step) -> Figure:
    return {"title": {"text": f"{_unit_of(step)[1]} since the step began"}}


def _since(step: Step, times_ns: Sequence[int]) -> list[float]:
    return [(at_ns - step.begin_ns) / _unit_of(step)[0] for at_ns in times_ns]
