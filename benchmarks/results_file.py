"""The one form of every benchmark's results: `{"environment": ..., "rows": [...]}` and a Markdown table of the rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import describe_environment

__all__ = ["markdown_table", "missing_row", "spread_of", "write_results"]


def spread_of(values: Sequence[float], name: str) -> dict[str, float]:
    """Return the median of repeated measurements as `name`, the extremes as `name_min` and `name_max`.

    Args:
        values: at least one measurement.
        name: what was measured, unit included: "step_s".
    """
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def missing_row(system: str, why: str, **fields: Any) -> dict[str, Any]:
    """Return the row of a system that could not be measured: it says why and has no numbers."""
    return {"system": system, **fields, "missing": why}


def markdown_table(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return the rows as a Markdown table; a cell that a row lacks is empty, a missing system's reason ends its row.

    Args:
        rows: as they are written to JSON.
        columns: the keys to show, in order; every key in order of appearance if None.
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    elif any("missing" in row for row in rows):
        columns = [*columns, "missing"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def write_results(
    path: Path | None, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None, **extra: Any
) -> None:
    """Print the rows as a Markdown table and, if asked, write them as JSON, with the columns for later tables.

    Args:
        path: the JSON file; None: print only.
        rows: one per measurement, or missing system.
        columns: the keys to show in the table; all if None.
        extra: more top-level entries of the document, such as the settings.
    """
    print(markdown_table(rows, columns), flush=True)
    if path is not None:
        shown = {} if columns is None else {"columns": list(columns)}
        document = {"environment": describe_environment(), **extra, **shown, "rows": list(rows)}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
