"""Recordings as files: what is written is read, what is torn is left out, what is foreign is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import invented

from gemini.errors import OffloadIOError, RecordingError
from gemini.profile.description import Prediction
from gemini.profile.events import (
    ChunkChange,
    Event,
    Logged,
    MemorySample,
    Moment,
    Stall,
    Step,
    Work,
    decode_line,
    encode_line,
)
from gemini.profile.recording import RecordingWriter, path_of, read_recording

EVENTS: list[Event] = [
    Step(0, 1, 2, True, 0.1, 0.2, 3, 4, 5, 6, 7),
    Moment(1, "update", None),
    ChunkChange(1, 0, "at home"),
    Work("adam update", "", 0, 1, 2, 3),
    Stall("update", 0, 1, 2),
    MemorySample(1, "host", {"slots": 4096}, None),
    Logged(0, {"loss": 1.5}),
]


def write(directory: Path) -> Path:
    with RecordingWriter(directory, invented().run) as writer:
        writer.write(EVENTS)
    return path_of(directory, 0)


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_is_a_line_that_reads_back(event: Event) -> None:
    line = encode_line(event)
    assert line.count("\n") == 1
    assert decode_line(line) == event


def test_the_form_of_a_line() -> None:
    assert encode_line(ChunkChange(12, 3, "ready")) == '["chunk",12,3,"ready"]\n'


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "run")
    found = read_recording(tmp_path / "run")
    assert found.run == invented().run
    assert [*found.steps, *found.moments, *found.chunk_changes, *found.work, *found.stalls, *found.samples] == EVENTS[
        :6
    ]
    assert found.logged == {0: {"loss": 1.5}}


def test_a_prediction_is_part_of_the_description() -> None:
    run = invented().run
    predicted = Prediction(step_s=1.0, seconds={"nvme": 1.0}, bottleneck="nvme", overlap="off")
    described = type(run).from_json({**run.to_json(), "predicted": dataclasses.asdict(predicted)})
    assert described.predicted == predicted


@given(st.data())
def test_wherever_a_file_is_torn_all_lines_before_are_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("torn")
    path = write(directory)
    whole = path.read_bytes()
    header_nbytes = whole.index(b"\n") + 1
    length = data.draw(st.integers(header_nbytes, len(whole)))
    path.write_bytes(whole[:length])
    found = read_recording(directory)
    num_lines = whole[header_nbytes:length].count(b"\n")
    kinds = (found.steps, found.moments, found.chunk_changes, found.work, found.stalls, found.samples)
    assert sum(map(len, kinds)) + len(found.logged) == num_lines


def test_kinds_of_events_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + '["weather",1,"rain"]\n["stall","update",0,5,6]\n')
    assert [stall.begin_ns for stall in read_recording(tmp_path).stalls] == [1, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "its first line does not describe a run"),
        ("[]\n", "its first line does not describe a run"),
        ('{"format": "tar"}\n', "expected the format gemini-recording, found 'tar'"),
        ('{"format": "gemini-recording", "version": 2}\n', "of version 2, and this program reads version 1"),
        ('{"format": "gemini-recording", "version": 1}\n', "description is damaged: KeyError"),
    ],
)
def test_what_is_no_recording_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path_of(tmp_path, 0).write_text(content)
    with pytest.raises(RecordingError, match=message):
        read_recording(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "nonsense\n",
        "[]\n",
        '["stall",1]\n',
        "7\n",
        '["stall","update",0,"5",6]\n',
        '["stall","update",0,6,5]\n',
        '["step",0,1,2,1,0,0,0,0,0,0,0]\n',
        '["memory",1,"host",{"slots":"4096"},null]\n',
        '["log",0,{"loss":[1]}]\n',
    ],
)
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + line)
    with pytest.raises(RecordingError, match="line 9: expected an event"):
        read_recording(tmp_path)


@pytest.mark.parametrize("line", ['["chunk",1,2,"ready"]\n', '["moment",1,"enter",-1]\n'])
def test_what_is_about_no_part_of_the_run_is_named(line: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + line)
    with pytest.raises(RecordingError, match="line 9: it names a chunk or unit that the run does not have"):
        read_recording(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("num_params", "many"), ("tiers", [{"tier": 3, "budget_nbytes": 1, "planned_nbytes": {}}])]
)
def test_a_description_of_other_types_is_damaged(name: str, value: object, tmp_path: Path) -> None:
    path = write(tmp_path)
    head, _, rest = path.read_text().partition("\n")
    path.write_text(json.dumps(json.loads(head) | {name: value}) + "\n" + rest)
    with pytest.raises(RecordingError, match=f"description is damaged: {name}"):
        read_recording(tmp_path)


def test_recordings_from_before_activations_were_expected_are_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    head, _, rest = path.read_text().partition("\n")
    fields = json.loads(head)
    del fields["predicted_activation_nbytes"]
    path.write_text(json.dumps(fields) + "\n" + rest)
    assert read_recording(tmp_path).run == invented().run


def test_the_directory_of_a_run_and_the_file_itself_will_do(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "recording")
    assert read_recording(tmp_path / "run") == read_recording(path) == read_recording(path.parent)


def test_a_directory_without_a_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="expected rank0.jsonl"):
        read_recording(tmp_path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadIOError, match="rank0.jsonl"):
        RecordingWriter(tmp_path / "file" / "run", invented().run)


def test_a_step_without_details_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    recording = read_recording(tmp_path)
    assert recording.step() is recording.step(0) is recording.steps[0]
    with pytest.raises(RecordingError, match=r"details of step 5 were not recorded, only those of 0: .*steps=\.\.\."):
        recording.step(5)


def test_the_header_says_what_the_file_is(tmp_path: Path) -> None:
    header = json.loads(write(tmp_path).read_text().splitlines()[0])
    assert (header["format"], header["version"]) == ("gemini-recording", 1)
