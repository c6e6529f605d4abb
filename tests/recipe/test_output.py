"""Output directories: one run at a time, the settings it began with, and the checkpoint it may go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemini import ConfigError
from gemini.recipe.output import claimed, find_start, keep_settings
from gemini.recipe.settings import Settings


def settings_of(path: Path, **training: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"path": "m"},
            "data": {"files": ["a"]},
            "training": {"learning_rate": 1e-4, **training},
            "output": {"path": str(path)},
        }
    )


def save(path: Path, step: int, *, is_complete: bool = True) -> Path:
    checkpoint = path / f"checkpoint-{step}"
    place = checkpoint / "gemini" / f"step-{step:08}-save-00001"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    if is_complete:
        (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_a_new_run_begins_at_the_beginning(tmp_path: Path) -> None:
    start = find_start(settings_of(tmp_path / "new"), resume=False)
    assert (start.checkpoint, start.dtype) == (None, None)


@pytest.mark.parametrize("left", ["checkpoint", "model"])
def test_a_directory_with_a_run_is_not_trained_into(tmp_path: Path, left: str) -> None:
    if left == "checkpoint":
        save(tmp_path, 3)
    else:
        (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="of a run: .*name another directory"):
        find_start(settings_of(tmp_path), resume=False)


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"):
        other = claimed(tmp_path / "run")
        with pytest.raises(ConfigError, match="output.path: another process is training into"):
            other.__enter__()
    with claimed(tmp_path / "run"):
        pass


def test_the_newest_complete_checkpoint_is_gone_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is killed while it saves leaves one without its last file; its weights would go on from step 0."""
    keep_settings(settings_of(tmp_path), dtype="fp32")
    save(tmp_path, 9)
    expected = save(tmp_path, 10)
    save(tmp_path, 11, is_complete=False)
    torn = save(tmp_path, 12)
    (torn / "trainer_state.json").write_text('{"epoch":')
    saving = save(tmp_path, 13)
    (saving / "gemini" / "step-00000013-save-00001").rename(saving / "gemini" / ".saving")
    start = find_start(settings_of(tmp_path), resume=True)
    assert (start.checkpoint, start.dtype) == (expected, "fp32")
    assert "checkpoint-13 is incomplete" in caplog.text


def test_a_run_without_a_complete_checkpoint_is_not_gone_on_with(tmp_path: Path) -> None:
    save(tmp_path, 3, is_complete=False)
    with pytest.raises(ConfigError, match="there is no complete checkpoint in"):
        find_start(settings_of(tmp_path), resume=True)


def test_a_run_goes_on_with_the_settings_it_began_with(tmp_path: Path) -> None:
    """The trainer would take the learning rate of the checkpoint, and not say so."""
    keep_settings(settings_of(tmp_path), dtype="fp32")
    save(tmp_path, 3)
    changed = settings_of(tmp_path, learning_rate=1e-3, batch_size=2, steps=9)
    with pytest.raises(ConfigError) as caught:
        find_start(changed, resume=True)
    assert "training.learning_rate was 0.0001, and is 0.001" in str(caught.value)
    assert "training.batch_size was 1, and is 2" in str(caught.value)
    assert "steps" not in str(caught.value)


def test_how_far_and_where_may_change(tmp_path: Path) -> None:
    keep_settings(settings_of(tmp_path, steps=3), dtype="fp32")
    expected = save(tmp_path, 3)
    changed = settings_of(tmp_path, steps=5, epochs=2.0).model_copy(
        update={"memory": settings_of(tmp_path).memory.model_copy(update={"host_budget": "3GiB"})}
    )
    assert find_start(changed, resume=True).checkpoint == expected


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"dtype": "fp32", "settings": 3})])
def test_damaged_settings_are_named(tmp_path: Path, text: str) -> None:
    save(tmp_path, 3)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ConfigError, match=r"settings.json is damaged .*; remove it to resume without this check"):
        find_start(settings_of(tmp_path), resume=True)


def test_runs_of_earlier_versions_can_be_gone_on_with(tmp_path: Path) -> None:
    expected = save(tmp_path, 3)
    start = find_start(settings_of(tmp_path), resume=True)
    assert (start.checkpoint, start.dtype) == (expected, None)
