"""A recording in a terminal: numbers, waits, and lanes drawn with characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemini.profile.events import Step
from gemini.profile.intervals import clip, total_ns
from gemini.profile.lanes import LANES, Bar, bars_of_step, busy_s_by_lane
from gemini.profile.recording import Recording
from gemini.profile.report_parts import Part, expectations_table, facts_of, stall_tables, step_tiles
from gemini.profile.series import memory_of_step
from gemini.profile.stalls import stalls_of_step
from gemini.profile.words import plan_in_words
from gemini.tiers import format_nbytes

__all__ = ["lane_strip", "terminal_view"]

_SHADES = " \u2591\u2592\u2593\u2588"
_STRIP_WIDTH = 48


def terminal_view(recording: Recording, step: Step) -> RenderableType:
    """Draw one step of a recording.

    Args:
        recording: one rank's recording.
        step: a step with details.

    Returns:
        An object that a rich console prints.
    """
    bars = bars_of_step(recording, step)
    summary = Table(show_header=False, box=None, pad_edge=False)
    for value, meaning in step_tiles(recording, step):
        summary.add_row(Text(value, style="bold"), meaning)
    parts: list[RenderableType] = [
        Text(facts_of(recording)),
        Text(plan_in_words(recording.run)),
        summary,
        _titled(expectations_table(recording, step)),
        _lanes_table(bars, step),
        _memory_table(recording, step),
    ]
    parts += map(_titled, stall_tables(recording, stalls_of_step(recording, step)))
    return Group(*parts)


def _titled(part: Part) -> RenderableType:
    return Group(Text(part["title"], style="bold"), _table(part["table"]) if "table" in part else Text(part["note"]))


def lane_strip(bars: Sequence[Bar], *, begin_ns: int, end_ns: int, width: int) -> str:
    """Draw the share of each part of a time span that bars cover.

    Args:
        bars: bars of one lane.
        begin_ns: beginning of the strip.
        end_ns: end of the strip, later.
        width: number of characters.

    Returns:
        One character per part, from a space for nothing to a full block for complete cover.
    """
    edges = [begin_ns + (end_ns - begin_ns) * index // width for index in range(width + 1)]
    strip = ""
    for left, right in pairwise(edges):
        covered = total_ns(clip(bar.interval, (left, right)) for bar in bars) / max(right - left, 1)
        strip += _SHADES[0 if covered == 0 else max(1, round(covered * (len(_SHADES) - 1)))]
    return strip


def _lanes_table(bars: Sequence[Bar], step: Step) -> Table:
    table = Table(title="Lanes", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("lane", "busy s", "over the step"):
        table.add_column(heading, justify="right" if heading == "busy s" else "left", no_wrap=True)
    busy = busy_s_by_lane(bars)
    for lane in LANES:
        if busy[lane]:
            own = [bar for bar in bars if bar.lane == lane]
            strip = lane_strip(own, begin_ns=step.begin_ns, end_ns=step.end_ns, width=_STRIP_WIDTH)
            table.add_row(lane, f"{busy[lane]:.3f}", Text(strip, style="red" if lane == "waits" else "blue"))
    return table


def _memory_table(recording: Recording, step: Step) -> Table:
    table = Table(title="Memory at its peak in the step", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("tier", "model data", "non-model data", "planned", "budget"):
        table.add_column(heading, justify="left" if heading == "tier" else "right")
    for series in memory_of_step(recording, step):
        model = max(sum(values) for values in zip(*series.model_nbytes.values(), strict=True))
        others = [nbytes for nbytes in series.non_model_nbytes if nbytes is not None]
        budget = series.tier.budget_nbytes
        table.add_row(
            series.tier.tier,
            format_nbytes(model),
            format_nbytes(max(others)) if others else "-",
            format_nbytes(sum(series.tier.planned_nbytes.values())),
            format_nbytes(budget) if budget is not None else "-",
        )
    return table


def _table(content: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(content["head"]):
        table.add_column(heading, justify="right" if index in content["numbers"] else "left")
    for row in content["rows"]:
        table.add_row(*map(Text, row))
    return table
