"""A Hugging Face checkpoint as the first values of a model: each parameter is read when its home is written.

If a parameter is stored as the model computes with it, one tile is in memory at a time. If it must be converted, the
sources and targets of the conversion are in memory.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from gemini.errors import CheckpointMismatchError
from gemini.files.safetensors import TensorEntry, checksum_of
from gemini.model.flat_values import FlatValues
from gemini.model.names import canonical_buffers, canonical_names, named_buffers, named_modules, named_params
from gemini.pretrained.conversions import (
    Conversion,
    ignored_names,
    import_transformers,
    is_transformers_model,
    match_names,
)
from gemini.pretrained.files import CheckpointFiles
from gemini.pretrained.state_names import base_model_of, state_names
from gemini.ranks.agreement import agree_on_loading
from gemini.ranks.sharding import Sharding

__all__ = ["LoadingReport", "PretrainedWeights", "open_pretrained"]

logger = logging.getLogger(__name__)

COMPARED_NUMEL = 1 << 20
"""Number of elements that are compared at once."""
SAMPLED_NUMEL = 64
"""Number of elements of each tensor by which ranks compare their checkpoints."""
NAMES_SHOWN = 8
"""Maximum number of names in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingReport:
    """The differences between a checkpoint and a model; the names are those that transformers reports."""

    path: Path
    """Directory of the checkpoint."""
    missing_keys: tuple[str, ...]
    """Names only in the model, not in the checkpoint: they keep the model's or its own initialisation's values."""
    unexpected_keys: tuple[str, ...]
    """Names in the checkpoint without a place in the model; they were ignored."""
    untied_keys: tuple[str, ...]
    """Names tied in the model as built, but with different values in the checkpoint: they are no longer tied."""


def open_pretrained(model: torch.nn.Module, path: Path, sharding: Sharding) -> PretrainedWeights:
    """Open a checkpoint for a model; reads only weights that may be tied, and with several ranks a few samples.

    Args:
        model: a model on any device. If the checkpoint has different values for weights that the model ties, they are
            no longer tied, as in transformers.
        path: the checkpoint's directory.
        sharding: the ranks that share the model, all of which call.

    Returns:
        The weights; the caller closes them.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or a file is missing.
        CheckpointMismatchError: it belongs to another model; or another rank has another checkpoint, or none.
        ConfigError: the model needs transformers, which is too old.
        OffloadIOError: a file cannot be opened or read.
        CollectiveError: a rank did not take part.
    """
    with ExitStack() as on_error:
        weights, failure = None, None
        samples: list[str] = []
        try:
            files = on_error.enter_context(CheckpointFiles(path))
            weights = on_error.enter_context(PretrainedWeights(model, files))
            samples += () if sharding.is_alone else _samples(files)
        except Exception as error:  # conversions may raise anything; other ranks must not wait for this one
            failure = error
        agree_on_loading(sharding, failure, samples, what="checkpoints")
        assert weights is not None
        _log(weights.report, model)
        on_error.pop_all()
    return weights


def _samples(files: CheckpointFiles) -> Iterator[str]:
    """Yield what distinguishes checkpoints: each tensor's name, dtype, shape and first elements."""
    for name, entry in sorted(files.entries.items()):
        first = files.read(name, 0, min(entry.numel, SAMPLED_NUMEL))
        yield f"{name} {entry.dtype} {entry.shape} {checksum_of(first)}"


class PretrainedWeights:
    """The values of a model's parameters and buffers in a checkpoint; see `open_pretrained`.

    A context manager that closes the checkpoint's files; after an error the model is as before.

    Args:
        model: the model that gets the values.
        files: the checkpoint's files; closed with this.

    Attributes:
        report: the differences between checkpoint and model.
    """

    def __init__(self, model: torch.nn.Module, files: CheckpointFiles) -> None:
        self._files = files
        self._converted: dict[str, torch.Tensor] = {}  # results of the last conversion that were not taken yet
        self._undo = ExitStack()
        """Undoes the changes to the model."""
        base = base_model_of(model)
        names = state_names(model)
        tensors = {
            **dict(named_params(model, remove_duplicate=False)),
            **dict(named_buffers(model)),
        }
        state = {name: tensors[places[0]] for name, places in names.items()}
        conversions, unexpected = _match(base, state, files)
        self._conversion_of = {target: each for each in conversions for target in each.targets if target in state}
        self._check_shapes(state)
        canonical = canonical_names(model)
        untied = self._untie(model, names, canonical)
        canonical = (canonical_names(model) if untied else canonical) | canonical_buffers(model)
        self._name_in_state = {
            canonical.get(place, place): name for name in self._conversion_of for place in names[name]
        }
        missing: dict[str, str] = {}  # one name of tied weights
        for name, places in names.items():
            weight = canonical.get(places[0], places[0])
            if weight not in self._name_in_state:
                missing.setdefault(weight, name)
        ignored = ignored_names(base, missing.values(), attribute="_keys_to_ignore_on_load_missing")
        self.report = LoadingReport(
            path=files.path,
            missing_keys=tuple(name for name in missing.values() if name not in ignored),
            unexpected_keys=tuple(name for name in unexpected if name not in _harmless(base, unexpected)),
            untied_keys=untied,
        )

    def _check_shapes(self, state: Mapping[str, torch.Tensor]) -> None:
        if not self._conversion_of and state:
            raise CheckpointMismatchError(
                f"{self._files.path}: none of its {len(self._files.entries)} tensors, "
                f"{_shown([*self._files.entries])}, is in the model, which expects {_shown([*state])}; load the "
                "checkpoint of this model"
            )
        for name in self._conversion_of:
            expected, found = state[name], self._on_meta(name)
            if found.shape != expected.shape:
                raise CheckpointMismatchError(
                    f"{self._files.path}: {name} has shape {tuple(found.shape)}, the model expects "
                    f"{tuple(expected.shape)}: build the model from the checkpoint's config.json, or load another "
                    "checkpoint"
                )
            if not torch.can_cast(found.dtype, expected.dtype):
                raise CheckpointMismatchError(
                    f"{self._files.path}: {name} has {found.dtype}, the model expects {expected.dtype}, which "
                    "would lose digits: load another checkpoint, or convert this one"
                )

    def _on_meta(self, name: str) -> torch.Tensor:
        """Return a weight's dtype and shape in the checkpoint, after conversion, without its values."""
        conversion = self._conversion_of[name]
        stored = {source: _meta_twin(self._files.entries[source]) for source in conversion.sources}
        return stored[conversion.sources[0]] if conversion.convert is None else conversion.convert(stored)[name]

    def _untie(
        self, model: torch.nn.Module, names: Mapping[str, list[str]], canonical: Mapping[str, str]
    ) -> tuple[str, ...]:
        """Separate tied parameters that have different values in the checkpoint; return their names."""
        modules = dict(named_modules(model, remove_duplicate=False))
        first: dict[str, str] = {}
        untied = []
        for name, places in names.items():
            param = canonical.get(places[0])
            if param is None or name not in self._conversion_of:
                continue
            if first.setdefault(param, name) == name or self._are_equal(first[param], name):
                continue
            for place in places:
                owner, _, key = place.rpartition(".")
                module = modules[owner]
                old = module._parameters[key]
                assert old is not None
                module._parameters[key] = torch.nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
                self._undo.callback(module._parameters.__setitem__, key, old)
            untied.append(name)
        tied = getattr(base_model_of(model), "all_tied_weights_keys", {})
        for name in untied:
            if name in tied:
                self._undo.callback(tied.__setitem__, name, tied.pop(name))
        return tuple(untied)

    def _are_equal(self, one: str, other: str) -> bool:
        conversions = (self._conversion_of[one], self._conversion_of[other])
        if conversions[0].sources == conversions[1].sources:
            return True
        left, right = (self._values_in_state(name) for name in (one, other))
        numel = self._on_meta(one).numel()
        runs = (slice(begin, min(begin + COMPARED_NUMEL, numel)) for begin in range(0, numel, COMPARED_NUMEL))
        return all(torch.equal(left[run].float(), right[run].float()) for run in runs)

    def values_of(self, name: str) -> FlatValues | None:
        """Return a parameter's values by its canonical name; None if the checkpoint has none."""
        found = self._name_in_state.get(name)
        return None if found is None else self._values_in_state(found)

    def buffer_of(self, name: str) -> torch.Tensor | None:
        """Return a buffer's value in its shape, on the CPU; None if the checkpoint has none."""
        found = self._name_in_state.get(name)
        if found is None:
            return None
        return self._values_in_state(found)[:].view(self._on_meta(found).shape)

    def identity_of(self, name: str) -> str | None:
        """Return a text that identifies a parameter's values by sources, files and times; None if there are none."""
        found = self._name_in_state.get(name)
        if found is None:
            return None
        conversion = self._conversion_of[found]
        stored = [(source, *self._files.identity_of(source)) for source in conversion.sources]
        if conversion.convert is None:
            return repr(stored)
        transformers, _ = import_transformers("loading a transformers model's checkpoint")
        return repr((stored, found, transformers.__version__))

    def _values_in_state(self, name: str) -> FlatValues:
        conversion = self._conversion_of[name]
        if conversion.convert is None:
            return _StoredValues(self._files, conversion.sources[0])
        if name not in self._converted:
            self._converted = {}
            entries = self._files.entries
            stored = {source: self._files.read(source).view(entries[source].shape) for source in conversion.sources}
            self._converted = conversion.convert(stored)
        return self._converted.pop(name).contiguous().view(-1)

    def close(self) -> None:
        """Close the checkpoint's files; idempotent."""
        self._converted = {}
        self._files.close()

    def __enter__(self) -> PretrainedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._undo.close()
        self.close()


@dataclass(frozen=True, slots=True)
class _StoredValues:
    """A tensor in a file, read on demand."""

    files: CheckpointFiles
    name: str

    def __getitem__(self, run: slice, /) -> torch.Tensor:
        return self.files.read(self.name, run.start or 0, run.stop)


def _meta_twin(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _match(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], files: CheckpointFiles
) -> tuple[list[Conversion], list[str]]:
    """Return which tensors become which weights, and the names for which the model has no place."""
    if is_transformers_model(model):
        return match_names(model, state, {name: _meta_twin(entry) for name, entry in files.entries.items()})
    same = [Conversion((name,), (name,)) for name in files.entries if name in state]
    return same, [name for name in files.entries if name not in state]


def _harmless(model: torch.nn.Module, unexpected: list[str]) -> set[str]:
    """Return the names that a model without a place for them has always had in its checkpoints."""
    ignored = ignored_names(model, unexpected, attribute="_keys_to_ignore_on_load_unexpected")
    buffers = [name for name, _ in model.named_buffers()]
    for name in ("rotary_emb.inv_freq", "position_ids"):  # these were persistent in earlier versions of transformers
        if any(buffer.endswith(name) for buffer in buffers):
            ignored |= {each for each in unexpected if re.search(rf"(^|\.){re.escape(name)}$", each)}
    return ignored


def _log(report: LoadingReport, model: torch.nn.Module) -> None:
    what = []
    if report.missing_keys:
        what.append(f"missing, and unchanged or newly initialised: {_shown(report.missing_keys)}")
    if report.unexpected_keys:
        what.append(f"unexpected, and ignored: {_shown(report.unexpected_keys)}")
    if report.untied_keys:
        what.append(f"tied in the model but not in the checkpoint, and no longer tied: {_shown(report.untied_keys)}")
    if what:
        name = type(base_model_of(model)).__name__
        logger.warning("%s was loaded from %s, except weights that are %s", name, report.path, "; ".join(what))


def _shown(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
