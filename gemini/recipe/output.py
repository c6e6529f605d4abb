"""The output directory of a run: whose it is, what the run began with, and where one may go on from.

OUTPUT/settings.json     what the run began with
OUTPUT/log.csv           a row for each step that was logged
OUTPUT/recording/        for `python -m gemini report`
OUTPUT/checkpoint-N/     after step N
OUTPUT/model/            when it is trained
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
"""What a resumed run may do otherwise: it changes no number, or only how far the run goes. None: all of a section."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None
    """None: at the very beginning."""
    dtype: str | None
    """Working dtype that the run has had so far; None: none yet."""


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Make a run's directory, and keep other runs out of it while the context is open.

    Args:
        path: of the directory.

    Yields:
        Nothing.

    Raises:
        ConfigError: another run is training into it.
        OffloadIOError: it cannot be made.
    """
    with naming_file("make the directory output.path,", path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # of file systems without locks
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
    """Find where a run begins.

    Args:
        settings: of the run.
        resume: whether it is to go on from the last complete checkpoint in its directory.

    Returns:
        That checkpoint, or the beginning of a new run.

    Raises:
        ConfigError: the directory has a run that is not to be gone on with, or none that could be; or the run began
            with other settings.
    """
    path = settings.output.path
    checkpoint = last_complete_checkpoint(path)
    if not resume:
        has_model = (path / MODEL_NAME).exists()
        if checkpoint is not None or has_model:
            what = "the checkpoints" if checkpoint is not None else "the trained model"
            going_on = "go on with it by --resume, or " if checkpoint is not None else ""
            raise ConfigError(f"output.path: {path} has {what} of a run: {going_on}name another directory")
        return Start(checkpoint=None, dtype=None)
    if checkpoint is None:
        raise ConfigError(f"--resume: there is no complete checkpoint in {path}; start without it")
    kept = _read_kept(path)
    if kept is None:  # by an earlier version
        return Start(checkpoint=checkpoint, dtype=None)
    changes = _changes(kept["settings"], settings.model_dump(mode="json"))
    if changes:
        raise ConfigError(
            f"--resume: the run in {path} began with other settings: {'; '.join(changes)}. Set them back, or name "
            "another output.path for a new run"
        )
    return Start(checkpoint=checkpoint, dtype=kept["dtype"])


def keep_settings(settings: Settings, *, dtype: str) -> None:
    """Write down what a run begins with.

    Args:
        settings: of the run.
        dtype: working dtype, by the name it has in settings.

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
            f"--resume: {path / SETTINGS_NAME} is damaged ({error}); remove it to go on unchecked"
        ) from None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say which settings differ that make a run another one; those that one of the two does not know do not count."""
    found = []
    for section, may_change in _MAY_CHANGE.items():
        if may_change is None:
            continue
        for name, value in now[section].items():
            old = before.get(section, {}).get(name, value)
            if name not in may_change and old != value:
                found.append(f"{section}.{name} was {old}, and is {value}")
    return found
