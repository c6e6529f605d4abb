"""A process that replaces a directory's files and is killed before a chosen change of the file system."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemini.pretrained.directory import NewFiles

CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")
"""Audit events of what the directory could be left behind by."""

Generation = int
"""Which save: the value of all elements of all its tensors."""


def write_files(place: Path, names: tuple[str, ...], value: Generation) -> None:
    """Write safetensors files of one tensor each, and an index if there are shards of a model."""
    weight_map = {}
    for name in names:
        (place / name).parent.mkdir(exist_ok=True)
        tensor = name.removesuffix(".safetensors")
        save_file({tensor: torch.full((3,), value)}, place / name)
        weight_map[tensor] = name
    if any(name.startswith("model-") for name in names):
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (place / "config.json").write_text(json.dumps({"generation": value}))


def replace_files(path: Path, names: tuple[str, ...], value: Generation, kill_at: int) -> None:
    """Save files into a directory; this process is killed before its change number `kill_at`."""
    numbers = itertools.count()

    def kill(event: str, _: object) -> None:
        if event in CHANGES and next(numbers) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    new = NewFiles(path)
    sys.addaudithook(kill)
    new.begin()
    write_files(new.place, names, value)
    new.commit()
