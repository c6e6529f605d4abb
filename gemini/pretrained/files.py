"""The tensors of a checkpoint directory in Hugging Face's layout, in one file or several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gemini.errors import CheckpointError, MissingCheckpointError, naming_file
from gemini.files.safetensors import SafetensorsReader, TensorEntry

__all__ = [
    "ADAPTER_FILE",
    "CONFIG",
    "INDEX",
    "SAVED",
    "SAVING",
    "SINGLE_FILE",
    "CheckpointFiles",
    "check_directory",
]

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SAVING = ".saving"
"""Name of the directory in which a save collects its files."""
SAVED = ".saved"
"""Name of the directory with complete files that are not yet in their final places."""


def check_directory(path: Path) -> None:
    """Check that a directory holds a checkpoint that can be loaded.

    Args:
        path: the directory.

    Raises:
        CheckpointError: it does not; the message says what to do.
        OffloadIOError: the directory cannot be read.
    """
    with naming_file("read", path):
        _check_directory(path)


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise MissingCheckpointError(
            f"{path} is not a directory; expected one with {SINGLE_FILE}, or {INDEX} and the files it names. "
            "huggingface_hub.snapshot_download(NAME) returns the directory of a model on the hub"
        )
    if (path / SINGLE_FILE).is_file() or (path / INDEX).is_file():
        _refuse_quantized(path)
        return
    remedy = f"expected {SINGLE_FILE}, or {INDEX} and the files it names"
    if (path / SAVED).is_dir():
        remedy = f"a save was interrupted while it moved its files: move the files in {SAVED} up by hand"
    elif (path / ADAPTER_CONFIG).is_file():
        remedy = "it is a PEFT adapter: load the base model, then peft.PeftModel.from_pretrained(model, DIRECTORY)"
    elif any(path.glob("pytorch_model*.bin")):
        remedy = (
            "its weights are pickled (.bin): convert them with transformers, "
            "AutoModel.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
        )
    elif (path / SAVING).is_dir():
        remedy = f"its first save is running or was interrupted; the files in {SAVING} are not complete: save again"
    raise MissingCheckpointError(f"{path} is not a checkpoint that can be loaded: {remedy}")


def _refuse_quantized(path: Path) -> None:
    if not (path / CONFIG).is_file():
        return
    if "quantization_config" in _read_json(path / CONFIG):
        raise CheckpointError(
            f"{path} is quantized, and its numbers alone are not the weights: dequantize it with transformers and "
            "save it again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    with naming_file("read", path):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is damaged: expected an object, found {type(fields).__name__}")
    return fields


class CheckpointFiles:
    """The tensors of a checkpoint directory, one file or many; reads any run of any tensor.

    Args:
        path: the directory.

    Raises:
        CheckpointError: it is not a checkpoint, or a file is missing, damaged or truncated.
        OffloadIOError: a file cannot be opened or read.

    Attributes:
        path: the directory.
        entries: dtype and shape of every tensor, by name.
    """

    def __init__(self, path: Path) -> None:
        check_directory(path)
        self.path = path
        self._files = ExitStack()
        try:
            if (path / SINGLE_FILE).is_file():
                single = self._open(SINGLE_FILE)
                self._readers = dict.fromkeys(single.entries, single)
            else:
                self._readers = self._open_all(path / INDEX)
        except BaseException:
            self.close()
            raise
        self.entries: dict[str, TensorEntry] = {name: each.entries[name] for name, each in self._readers.items()}

    def _open_all(self, index: Path) -> dict[str, SafetensorsReader]:
        """Open the files that an index names; return each tensor's file, as the index has it if there are several."""
        file_of = _read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
            raise CheckpointError(f"{index} is damaged: expected the file of each tensor under weight_map")
        for name in file_of.values():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(f"{index} names {name}, which is not in its directory: take another checkpoint")
        readers = {name: self._open(name) for name in dict.fromkeys(file_of.values())}
        reader_of = {tensor: reader for reader in readers.values() for tensor in reader.entries}
        for tensor, name in file_of.items():
            if tensor not in readers[name].entries:
                raise CheckpointError(f"{self.path / name} has no tensor {tensor}, although {index.name} lists it")
            reader_of[tensor] = readers[name]
        return reader_of

    def _open(self, name: str) -> SafetensorsReader:
        path = self.path / name
        with naming_file("open", path):
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing from the checkpoint, although its {INDEX} names it: download it again"
                )
        return self._files.enter_context(SafetensorsReader(path))

    def identity_of(self, name: str) -> tuple[int, ...]:
        """Return the identity of a tensor's file: device, inode, length and time of the last change."""
        return self._readers[name].identity

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Read elements [begin, end) of a tensor in row-major order; None: to its end.

        Args:
            name: name of the tensor.
            begin: first element.
            end: one past the last element.

        Returns:
            The elements, 1D, on the CPU, in the file's dtype.

        Raises:
            OffloadIOError: the elements cannot be read.
            CheckpointError: the file was truncated since it was opened.
        """
        return self._readers[name].read(name, begin, end)

    def close(self) -> None:
        """Close the files; idempotent."""
        self._files.close()

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
