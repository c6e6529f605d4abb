"""The output directory of a run: its owner, the settings the run began with, and the point from which to resume.

OUTPUT/settings.json     settings that the run began with OUTPUT/log.csv           one row per logged step
OUTPUT/recording/        for `python -m gemini report`
OUTPUT/checkpoint-N/     state after step N OUTPUT/model/            the trained model
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemini.errors import ConfigError, naming_file
from gemini.integrations.transformers import last_complete_checkpoint
from gemini.recipe.settings import Settings

__all__ = ["LOG_NAME", "MODEL_NAME", "Start", "claimed", "find_start", "keep_settings"]

MODEL_NAME = "model"
LOG_NAME = "log.csv"
SETTINGS_NAME = "settings.json"

_MAY_CHANGE = {
    "model": {"dtype"},
    "data": {"eval_files"},
    "training": {"steps", "epochs"},
    "memory": None,
    "output": None,
}
"""Settings that may change on resume: they change no number, or only how far the run goes. None: the whole section."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The point at which a run begins."""

    checkpoint: Path | None
    """Checkpoint to start from; None for the very beginning."""
    dtype: str | None
    """Working dtype of the run so far; None if it has none yet."""


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Make a run's directory, and keep other runs out while the context is open.

    Args:
        path: path of the directory.

    Yields:
        Nothing.

    Raises:
        ConfigError: another run trains into the directory.
        OffloadIOError: the directory cannot be made.
    """
    with naming_file("make the directory output.path,", path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # file systems without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"output.path: another process is training into {path}; name another directory"
                ) from None
        yield
    finally:
        os.close(descriptor)


def find_start(settings: Settings, *, resume: bool) -> Start:
    """Find the point at which a run begins.

    Args:
        settings: settings of the run.
        resume: whether to continue from the last complete checkpoint in its directory.

    Returns:
        That checkpoint, or the beginning of a new run.

    Raises:
        ConfigError: the directory contains a run that must not be continued, or no run that can be; or the run began
            with other settings.
    """
    path = settings.output.path
    checkpoint = last_complete_checkpoint(path)
    if not resume:
        has_model = (path / MODEL_NAME).exists()
        if checkpoint is not None or has_model:
            what = "the checkpoints" if checkpoint is not None else "the trained model"
            going_on = "resume it with --resume, or " if checkpoint is not None else ""
            raise ConfigError(f"output.path: {path} has {what} of a run: {going_on}name another directory")
        return Start(checkpoint=None, dtype=None)
    if checkpoint is None:
        raise ConfigError(f"--resume: there is no complete checkpoint in {path}; start without it")
    kept = _read_kept(path)
    if kept is None:  # written by an earlier version
        return Start(checkpoint=checkpoint, dtype=None)
    changes = _changes(kept["settings"], settings.model_dump(mode="json"))
    if changes:
        raise ConfigError(
            f"--resume: the run in {path} began with other settings: {'; '.join(changes)}. Set them back, or name "
            "another output.path for a new run"
        )
    return Start(checkpoint=checkpoint, dtype=kept["dtype"])


def keep_settings(settings: Settings, *, dtype: str) -> None:
    """Write down the settings with which a run begins.

    Args:
        settings: settings of the run.
        dtype: name of the working dtype in settings.

    Raises:
        OffloadIOError: the file cannot be written.
    """
    path = settings.output.path / SETTINGS_NAME
    document = {"dtype": dtype, "settings": settings.model_dump(mode="json")}
    with naming_file("write", path):
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _read_kept(path: Path) -> dict[str, Any] | None:
    try:
        kept: dict[str, Any] = json.loads((path / SETTINGS_NAME).read_text(encoding="utf-8"))
        return {"dtype": str(kept["dtype"]), "settings": dict(kept["settings"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--resume: {path / SETTINGS_NAME} is damaged ({error}); remove it to resume without this check"
        ) from None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the changed settings that make it another run; settings unknown to either of the two do not count."""
    found = []
    for section, may_change in _MAY_CHANGE.items():
        if may_change is None:
            continue
        for name, value in now[section].items():
            old = before.get(section, {}).get(name, value)
            if name not in may_change and old != value:
                found.append(f"{section}.{name} was {old}, and is {value}")
    return found
