"""Saves weights as transformers or peft would, in files that are filled tile by tile from any tier.

The safetensors library writes a file from tensors that are all in memory; SafetensorsWriter takes them piece by piece.
If a parameter is stored as the model computes with it, one tile is in memory at a time (with several ranks, which join
it, the parameter). If transformers converts it, the sources and targets of the conversion are in memory.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemini.checkpoint.participants import rank_of
from gemini.errors import ConfigError, GeminiError, naming_file
from gemini.files.safetensors import SafetensorsWriter, lay_out_tensors
from gemini.model.names import canonical_buffers, canonical_names, persistent_buffers
from gemini.model.parameter_kinds import is_cast_dtype
from gemini.model.tensor_parallel import local_part
from gemini.pretrained.adapters import Adapters, find_adapters, write_adapter_configs
from gemini.pretrained.conversions import Conversion, is_transformers_model, save_conversions
from gemini.pretrained.directory import NewFiles
from gemini.pretrained.files import INDEX, SINGLE_FILE
from gemini.pretrained.own_saving import has_own_saving, save_by_itself, showing
from gemini.pretrained.state_names import has_adapters
from gemini.ranks.agreement import on_all_ranks
from gemini.runtime.runtime import Runtime
from gemini.tiers import parse_nbytes
from gemini.weights.ownership import check_unchanged
from gemini.weights.values import master_runs, read_master, read_working, working_runs

__all__ = ["DEFAULT_SHARD_SIZE", "save_pretrained", "showing_weights"]

DEFAULT_SHARD_SIZE = "5GB"

SAVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _File:
    """A file to be written, and its content."""

    path: Path
    """Path in the directory."""
    conversions: tuple[Conversion, ...]


def save_pretrained(
    runtime: Runtime,
    model: torch.nn.Module,
    path: Path,
    *,
    dtype: torch.dtype | str | None,
    max_shard_size: int | str,
) -> None:
    """Save weights; see GeminiDDP.save_pretrained."""
    wanted = _parse_dtype(dtype)
    shard_nbytes = parse_nbytes(max_shard_size, name="save_pretrained: max_shard_size")
    runtime.check_usable()
    runtime.finish_updates()
    weights = Weights(runtime, model, wanted)
    new = NewFiles(path) if rank_of(runtime) == 0 else None
    if has_own_saving(model):
        own_size = None if max_shard_size == DEFAULT_SHARD_SIZE else max_shard_size
        _save_whole(runtime, model, weights, new, max_shard_size=own_size)
        return
    adapters = find_adapters(model, weights) if has_adapters(model) else None
    files = _plan_files(model, weights, adapters, shard_nbytes)
    output = _Output(None if new is None else new.place, is_alone=runtime.sharding.is_alone)
    try:
        with on_all_ranks(runtime.sharding):
            if new is not None:
                new.begin()
                if adapters is not None:
                    write_adapter_configs(model, weights, adapters, new.place)
                else:
                    _describe_model(model, new.place, weights)
        for file in files:
            output.open(file.path, weights.shapes_of(file))
            for conversion in file.conversions:
                for name, values in weights.convert(conversion):
                    output.append(name, values)
            output.close()
        with on_all_ranks(runtime.sharding):
            if output.failure is not None:
                raise output.failure
            if new is not None:
                _write_index(files, weights, new.place)
                new.commit()
    except BaseException:
        output.abort()
        if new is not None:
            new.abandon()
        raise


@contextmanager
def showing_weights(runtime: Runtime, model: torch.nn.Module) -> Iterator[None]:
    """Make a wrapped model's parameters plain tensors with its working weights; all in memory, on all ranks.

    Args:
        runtime: the engine's runtime.
        model: the user's model; it must not run meanwhile.

    Yields:
        Nothing.

    Raises:
        ModelError: the engine is closed, its state was lost, or the model's parameters are not those that were wrapped.
    """
    runtime.check_usable()
    check_unchanged(model, runtime, runtime.layout.place_by_name)
    runtime.finish_updates()
    with showing(model, Weights(runtime, model, None).read_params()):
        yield


def _save_whole(
    runtime: Runtime,
    model: torch.nn.Module,
    weights: Weights,
    new: NewFiles | None,
    *,
    max_shard_size: int | str | None,
) -> None:
    """Call a model's own way to save, on the first rank, with all weights in memory."""
    values = weights.read_params()
    try:
        with on_all_ranks(runtime.sharding):
            if new is not None:
                new.begin()
                with showing(model, values):
                    save_by_itself(model, new.place, max_shard_size=max_shard_size)
                new.commit()
    except BaseException:
        if new is not None:
            new.abandon()
        raise


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    named = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if named is None or named in SAVED_DTYPES:
        return named
    raise ConfigError(
        'save_pretrained: dtype: expected None for the working dtype, or "float32" (the masters), "bfloat16" or '
        f'"float16", got {dtype!r}'
    )


class Weights:
    """A model's weights and persistent buffers as they will be saved; with several ranks all read the same.

    Args:
        runtime: the engine's runtime.
        model: the user's model.
        dtype: dtype of floating-point tensors that are trained or frozen; None: the working dtype.

    Attributes:
        canonical: first name of a parameter, by each of its names.
        state: dtype and shape of each tensor by its name in the model, on the meta device. A tensor of several names
            has the first, or the one that transformers expects, or with adapters all, of which peft chooses.
    """

    def __init__(self, runtime: Runtime, model: torch.nn.Module, dtype: torch.dtype | None) -> None:
        self._runtime = runtime
        self._dtype = dtype
        self._places = runtime.layout.place_by_name
        self.canonical = canonical_names(model)
        first_of = canonical_buffers(model)
        buffers = persistent_buffers(model)
        kept_buffers = first_of if has_adapters(model) else buffers
        self._buffers = {name: buffers[first_of[name]] for name in kept_buffers}
        self.state: dict[str, torch.Tensor] = {}
        targets = getattr(model, "all_tied_weights_keys", {})
        kept: dict[str, str] = {}
        for name, canonical in self.canonical.items():
            if canonical not in kept or (kept[canonical] in targets and name not in targets):
                kept[canonical] = name
        for name in self.canonical:
            if kept[self.canonical[name]] == name or has_adapters(model):
                self.state[name] = self._on_meta(name)
        for name, buffer in self._buffers.items():
            self.state[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")

    def _on_meta(self, name: str) -> torch.Tensor:
        spec = self._places[self.canonical[name]].spec
        is_cast = self._dtype is not None and is_cast_dtype(spec.dtype)
        return torch.empty(spec.full_shape, dtype=self._dtype if is_cast else spec.dtype, device="meta")

    def read_params(self) -> dict[str, torch.Tensor]:
        """Return all parameters by their first names, as CPU copies."""
        found = {}
        for name in dict.fromkeys(self.canonical.values()):
            wanted = self._on_meta(name)
            found[name] = _filled(wanted, self._param_runs(name, wanted.dtype))
        return found

    @property
    def saved_dtype(self) -> torch.dtype:
        """Dtype of a plain model that is loaded from the saved files."""
        return self._dtype or self._runtime.config.dtype

    def runs(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor's values, 1D on the CPU, in order; each must be used before the next one is requested."""
        if name in self._buffers:
            yield local_part(self._buffers[name]).detach().cpu().reshape(-1)
            return
        yield from self._param_runs(name, self.state[name].dtype)

    def _param_runs(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        place = self._places[self.canonical[name]]
        is_working = dtype is place.spec.dtype
        if not self._runtime.sharding.is_alone:
            whole = read_working(self._runtime, place) if is_working else read_master(self._runtime, place)
            yield whole.reshape(-1).to(dtype)
            return
        for run in working_runs(self._runtime, place) if is_working else master_runs(self._runtime, place):
            yield run.to(dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as a CPU copy."""
        return _filled(self.state[name], self.runs(name))

    def shapes_of(self, file: _File) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of everything in a file, by name in the file."""
        found: dict[str, torch.Tensor] = {}
        for conversion in file.conversions:
            sources = {name: self.state[name] for name in conversion.sources}
            if conversion.convert is None:
                found[conversion.targets[0]] = sources[conversion.sources[0]]
            else:
                found |= conversion.convert(sources)
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}

    def convert(self, conversion: Conversion) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the targets of a conversion, by name, each in runs as `runs` does."""
        if conversion.convert is None:
            for run in self.runs(conversion.sources[0]):
                yield conversion.targets[0], run
            return
        converted = conversion.convert({name: self.read(name) for name in conversion.sources})
        for name in list(converted):
            yield name, converted.pop(name).contiguous().view(-1)


def _filled(wanted: torch.Tensor, runs: Iterator[torch.Tensor]) -> torch.Tensor:
    """Return a tensor as one on the meta device, of values that come in runs."""
    flat = torch.empty(wanted.numel(), dtype=wanted.dtype)
    done = 0
    for run in runs:
        flat[done : done + run.numel()] = run
        done += run.numel()
    return flat.view(wanted.shape)


def _plan_files(model: torch.nn.Module, weights: Weights, adapters: Adapters | None, shard_nbytes: int) -> list[_File]:
    """Distribute the weights among files."""
    if adapters is not None:
        return [_File(Path(name), conversions) for name, conversions in adapters.files]
    state = weights.state
    if is_transformers_model(model):
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        conversions = save_conversions(model, {name: each for name, each in state.items() if name not in ignored})
    else:
        conversions = [Conversion((name,), (name,)) for name in state]
    shards: list[list[Conversion]] = [[]]
    filled = 0
    for conversion in conversions:
        nbytes = sum(state[name].nbytes for name in conversion.sources)
        if shards[-1] and filled + nbytes > shard_nbytes:
            shards.append([])
            filled = 0
        shards[-1].append(conversion)
        filled += nbytes
    if len(shards) == 1:
        return [_File(Path(SINGLE_FILE), tuple(shards[0]))]
    return [
        _File(Path(f"model-{number:05d}-of-{len(shards):05d}.safetensors"), tuple(shard))
        for number, shard in enumerate(shards, 1)
    ]


def _write_index(files: list[_File], weights: Weights, place: Path) -> None:
    """Write the index that names each tensor's file, if a model has several files."""
    if len(files) == 1 or files[0].path.parent != Path(".") or not files[0].path.name.startswith("model-"):
        return
    shapes = {file.path.name: weights.shapes_of(file) for file in files}
    numel = sum(math.prod(shape) for tensors in shapes.values() for _, shape in tensors.values())
    nbytes = sum(dtype.itemsize * math.prod(shape) for tensors in shapes.values() for dtype, shape in tensors.values())
    index = {
        "metadata": {"total_parameters": numel, "total_size": nbytes},
        "weight_map": {tensor: name for name, tensors in shapes.items() for tensor in tensors},
    }
    with naming_file("write", place / INDEX):
        (place / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _describe_model(model: Any, place: Path, weights: Weights) -> None:
    """Write the files from which a model is built: its configurations, and its code if it is not in transformers."""
    if not is_transformers_model(model):
        return
    config = copy.deepcopy(model.config)
    config.dtype = str(weights.saved_dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    with naming_file("write", place):
        if getattr(model, "_auto_class", None) is not None:
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, place, config=config)
        config.save_pretrained(place)
        if model.can_generate():
            model.generation_config.save_pretrained(place)


class _Output:
    """The files on the first rank; nothing on others. After an error it does nothing more, if other ranks read along.

    Args:
        place: directory in which the files are made; None on other ranks.
        is_alone: whether there is only one rank, so that errors can be raised at once.

    Attributes:
        failure: the error, which is raised on all ranks at the end.
    """

    def __init__(self, place: Path | None, *, is_alone: bool) -> None:
        self.failure: GeminiError | None = None
        self._place = place
        self._is_alone = is_alone
        self._writer: SafetensorsWriter | None = None

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except GeminiError as error:
            self.abort()
            if self._is_alone:
                raise
            self.failure = error

    def open(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Start a file."""
        if self._place is None or self.failure is not None:
            return
        with self._noting_failure():
            with naming_file("create directory", self._place / path.parent):
                (self._place / path.parent).mkdir(parents=True, exist_ok=True)
            layout = lay_out_tensors(tensors, metadata={"format": "pt"})
            self._writer = SafetensorsWriter(self._place / path, layout)

    def append(self, name: str, values: torch.Tensor) -> None:
        """Write the next values of a tensor."""
        if self._writer is not None:
            with self._noting_failure():
                self._writer.append(name, values)

    def close(self) -> None:
        """Complete the file."""
        if self._writer is not None:
            with self._noting_failure():
                self._writer.close()
            self._writer = None

    def abort(self) -> None:
        """Close the file in its present state; idempotent."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None
