"""Write the measured tables of docs/performance.md from the newest result file of each benchmark.

    python benchmarks/tables.py [--check]

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; NAME is what its files in benchmarks/results begin
with, before the kind of machine and the date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from results_file import markdown_table

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BLOCK = re.compile(r"<!-- results: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def rewrite(page: str, results: Path) -> str:
    """Return a page with its tables made anew.

    Args:
        page: Markdown with markers.
        results: directory of the result files.

    Returns:
        The page; what is outside the markers is unchanged.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- results: {name} -->\n{_section(name, newest(name, results))}\n<!-- end -->"

    return BLOCK.sub(block, page)


def newest(name: str, results: Path) -> Path | None:
    """Return the latest file called NAME_MACHINE_DATE.json, None if there is none."""
    paths = [path for path in results.glob(f"{name}_*.json") if path.stem.count("_") == name.count("_") + 2]
    return max(paths, key=lambda path: path.stem.rpartition("_")[2], default=None)


def _section(name: str, path: Path | None) -> str:
    if path is None:
        return f"No result file for `{name}` yet."
    document = json.loads(path.read_text(encoding="utf-8"))
    environment = document["environment"]
    machine = f"{environment['processor']}, {environment['num_cpus']} processors"
    machine += f", {environment['memory_nbytes'] / 2**30:.0f} GiB"
    if environment.get("gpu"):
        machine += f", {environment['gpu']}"
    origin = f"`{environment['command']}`, {environment['date'][:10]}, {machine}, torch {environment['torch']}"
    columns = document.get("columns") or list(dict.fromkeys(key for row in document["rows"] for key in row))
    table = markdown_table(*_in_large_units(document["rows"], columns))
    return f"{origin} ([{path.name}](../benchmarks/results/{path.name})):\n\n{table}"


def _in_large_units(rows: list[dict[str, Any]], columns: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and columns with bytes as GB and counts of parameters as billions, both decimal."""
    titles = {
        column: column.removesuffix("_bytes") + "_gb" if column.endswith("_bytes") else "params (10^9)"
        for column in columns
        if column.endswith("_bytes") or column == "params"
    }

    def converted(row: dict[str, Any]) -> dict[str, Any]:
        return {
            titles.get(key, key): value / 1e9 if key in titles and value is not None else value
            for key, value in row.items()
        }

    return [converted(row) for row in rows], [titles.get(column, column) for column in columns]


def main() -> None:
    """Write the page, or only say whether it is up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page would change")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    written = rewrite(page, RESULTS)
    if arguments.check and page != written:
        sys.exit(f"{PAGE.name} is not what its result files say: run python benchmarks/tables.py")
    if not arguments.check:
        PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
