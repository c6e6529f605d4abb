"""`python -m gemini bench`: measures, shows and keeps a profile that `plan` finds."""

from __future__ import annotations

import dataclasses

import pytest

from gemini.__main__ import main
from gemini.cli.profiles import cache_path, cached_profile
from gemini.planning.hardware import load_profile
from gemini.planning.machine import describe_machine, load_machine


def test_what_is_measured_is_shown_kept_and_found_again(tmp_path, capsys):
    kept, copy = tmp_path / "kept", tmp_path / "copy.json"
    argv = ["--device", "simulated", "--seconds", "0.02", "--cache", str(kept), "--json", str(copy)]
    assert cached_profile(kept) is None
    assert main(["bench", *argv]) == 0
    out = capsys.readouterr().out
    for text in (
        "matrix products, float32",
        "both at once",
        "instruction sets",
        "not measured",
        "Saved the profile to",
    ):
        assert text in out
    profile = load_profile(copy)
    assert profile == cached_profile(kept)
    assert profile.both_ways_rate > 1e6
    assert load_machine(copy) == describe_machine()


def test_another_machine_has_another_file():
    machine = describe_machine()
    other = dataclasses.replace(machine, num_cpus=machine.num_cpus + 1)
    assert cache_path(machine) != cache_path(other)


def test_the_disk_does_not_change_whose_profile_it_is(tmp_path):
    assert cache_path(describe_machine(tmp_path)) == cache_path(describe_machine())


def test_a_cached_file_that_cannot_be_read_is_as_good_as_none(tmp_path):
    path = cache_path(describe_machine(), tmp_path)
    path.write_text("{}")
    assert cached_profile(tmp_path) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seconds", "0"], "argument --seconds: expected more than 0 seconds, got 0"),
        (["--seconds", "nan"], "expected more than 0 seconds, got nan"),
        (["--disk-seconds", "-1"], "argument --disk-seconds: expected more than 0 seconds, got -1"),
    ],
)
def test_times_that_measure_nothing_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nvme", "{missing}"], "cannot find the directory --nvme {missing}"),
        (["--cache", "{file}/a"], "cannot make the directory of {file}/a"),
        (["--json", "{file}/a.json"], "cannot make the directory of {file}/a.json"),
    ],
)
def test_places_are_looked_at_before_anything_is_measured(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gemini.cli.bench.measure_hardware", pytest.fail)
    (tmp_path / "file").write_text("")
    places = {"missing": tmp_path / "missing", "file": tmp_path / "file"}
    argv = ["--cache", str(tmp_path / "cache"), *(text.format(**places) for text in argv)]
    assert main(["bench", *argv]) == 2
    assert message.format(**places) in capsys.readouterr().err
