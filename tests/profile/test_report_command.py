"""`python -m gemini report`: files that were asked for, a terminal view, and errors in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recorded import config_for, invented, make_model, record

from gemini import GeminiDDP
from gemini.__main__ import main
from gemini.profile.recording import RecordingWriter


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recorded")
    with GeminiDDP(make_model(), config_for("disk", directory)) as engine:
        record(engine, directory / "run")
    return directory / "run"


def test_without_options_a_page_is_written_beside_the_recording(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out == f"page: {run / 'report.html'}\n"


def test_trace_and_json_are_written_where_they_are_asked_for(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--trace", str(tmp_path / "t.json"), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [step["number"] for step in json.loads((tmp_path / "r.json").read_text())["steps"]] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "t.json"]


def test_the_terminal_shows_a_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--terminal", "--step", "1"]) == 0
    text = capsys.readouterr().out
    for word in ("step 1;", "Lanes", "optimizer", "NVMe read", "host", "What training waited for"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{missing}"], "no recording in"),
        (["{run}", "--rank", "3"], "expected rank3.jsonl"),
        (["{run}", "--terminal", "--step", "0"], "the moves of step 0 were not recorded, only those of 1, 2"),
        (["{run}", "--json", "{missing}/r.json"], "cannot write"),
        (["{empty}"], "has no step"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_line(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RecordingWriter(tmp_path / "empty", invented().run).close()
    places = {"run": run, "missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    assert main(["report", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
