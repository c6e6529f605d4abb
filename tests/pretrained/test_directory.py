"""A directory whose files are replaced has the older ones, the newer ones or none, whenever somebody is killed."""

from __future__ import annotations

import itertools
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from forking import fork_context
from killed_save import replace_files, write_files
from safetensors.torch import load_file

from gemini import CheckpointError, OffloadIOError
from gemini.pretrained.directory import NewFiles
from gemini.pretrained.files import CheckpointFiles

SINGLE = ("model.safetensors",)
TWO_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
THREE_SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
ADAPTERS = ("adapter_model.safetensors", "other/adapter_model.safetensors")
OLD, NEW = 1, 2


@pytest.fixture
def processes() -> ForkServerContext:
    """Processes that begin quickly: one has imported everything, and forks the rest."""
    return fork_context()


def model_in(path: Path) -> set[tuple[str, int]]:
    """Return name and generation of each tensor that a loader finds; nothing if it refuses."""
    try:
        with CheckpointFiles(path) as files:
            return {(f"{name}.safetensors", int(files.read(name)[0])) for name in files.entries}
    except CheckpointError:
        return set()


def adapters_in(path: Path) -> set[tuple[str, int]]:
    """Return as `model_in` the adapters, none of which belong together unless all are there."""
    found = {(name, path / name) for name in ADAPTERS if (path / name).is_file()}
    return {(name, int(next(iter(load_file(file).values()))[0])) for name, file in found}


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (SINGLE, SINGLE),
        (SINGLE, TWO_SHARDS),
        (THREE_SHARDS, TWO_SHARDS),
        (TWO_SHARDS, TWO_SHARDS),
        (THREE_SHARDS, SINGLE),
        ((), TWO_SHARDS),
        (ADAPTERS, ADAPTERS),
    ],
)
def test_whoever_is_killed_leaves_one_of_both_or_none_and_the_next_save_completes_it(
    older: tuple[str, ...], newer: tuple[str, ...], processes: ForkServerContext, tmp_path: Path
) -> None:
    read = adapters_in if newer is ADAPTERS else model_in
    old, new = ({(name, value) for name in names} for names, value in ((older, OLD), (newer, NEW)))
    completed = []
    for kill_at in itertools.count():
        path = tmp_path / str(kill_at)
        path.mkdir()
        write_files(path, older, OLD)
        process = processes.Process(target=replace_files, args=(path, newer, NEW, kill_at))
        process.start()
        process.join()
        left = read(path)
        assert left <= old or left <= new if newer is ADAPTERS else left in (old, new, set())

        again = NewFiles(path)
        again.begin()
        again.abandon()

        completed.append(read(path))
        if completed[-1] == new:
            assert {str(file.relative_to(path)) for file in path.rglob("*.safetensors")} == {*newer}
        if process.exitcode == 0:
            break
    num_old = completed.count(old)
    assert completed == [old] * num_old + [new] * (len(completed) - num_old)
    assert 1 < num_old < len(completed) - 1


def test_two_saves_into_one_directory_exclude_each_other(tmp_path: Path) -> None:
    first, second = NewFiles(tmp_path), NewFiles(tmp_path)
    first.begin()
    write_files(first.place, SINGLE, OLD)

    with pytest.raises(OffloadIOError, match="cannot lock .* another process is saving into it"):
        second.begin()
    second.abandon()

    first.commit()
    second.begin()
    assert model_in(tmp_path) == {("model.safetensors", OLD)}
