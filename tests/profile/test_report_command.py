"""`python -m gemini report`: files that were asked for, a terminal view, and errors in a line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import config_for, invented, make_model, record

from gemini import GeminiDDP, HardwareProfile, StepFlops
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
        (["{run}", "--terminal", "--step", "0"], "the details of step 0 were not recorded, only those of 1, 2"),
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


def test_the_terminal_has_what_was_expected_beside_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        flops = StepFlops(forward=1e9, backward=2e9)
        rates = HardwareProfile(
            matrix_rates={"float32": 1e9}, host_memory_rate=1e9, nvme_read_rate=1e9, nvme_write_rate=1e9
        )
        rates = dataclasses.replace(rates, nvme_mixed_rate=1e9)
        predicted = engine.memory_report(profile=rates, flops=flops).predicted
        record(engine, tmp_path / "run", predicted=predicted, activation_nbytes=3 << 20)
    assert main(["report", str(tmp_path / "run"), "--terminal"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (step,) = (line for line in lines if line[:4] == ["time", "of", "the", "step"])
    assert step[4:6] == [f"{predicted.step_s:.3f}", "s"]
    (activations,) = (line for line in lines if line[:2] == ["host:", "activations"])
    assert activations[4:6] == ["3.00", "MiB"]
    (model_data,) = (line for line in lines if line[:3] == ["host:", "model", "data"])
    assert model_data[-4:-2] == model_data[-2:]


def test_a_loss_that_is_no_number_is_no_reason_for_an_empty_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON has no NaN: a browser would read none of it."""
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        record(engine, tmp_path / "run", after_step=lambda step: None)
    path = tmp_path / "run" / "rank0.jsonl"
    path.write_text(path.read_text() + '["log",1,{"loss":NaN,"tokens":Infinity}]\n')
    assert main(["report", str(tmp_path / "run"), "--json", str(tmp_path / "r.json")]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    (loss,) = (part for part in report["run"]["run"] if part["title"] == "Loss")
    assert loss["figure"]["data"][0]["y"][1] is None


@pytest.mark.parametrize("label", ["", " ", "nobody's"])
def test_work_under_an_unknown_name_is_drawn(run: Path, label: str, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "rank0.jsonl").read_text().splitlines()]
    for line in lines:
        if isinstance(line, list) and line[0] == "work":
            line[1] = label
    (tmp_path / "rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0


@given(st.data())
@settings(max_examples=60)
def test_whatever_is_damaged_is_drawn_or_refused(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A value somewhere is another one; no kind of report ends in a traceback."""
    lines = [json.loads(line) for line in (run / "rank0.jsonl").read_text().splitlines()]
    place: Any = data.draw(st.sampled_from(lines))
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        break
    values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
    place[key] = data.draw(values)
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "rank0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outputs = ["--json", str(directory / "r.json"), "--trace", str(directory / "t.json"), "--terminal"]
    assert main(["report", str(directory), *outputs]) in (0, 2)
