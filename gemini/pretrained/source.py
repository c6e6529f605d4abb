"""A Hugging Face checkpoint as the first values of a model: each parameter is read when its home is written.

Of a parameter that is stored as the model computes with it, a tile's worth is in memory at a time; of one that has to
be converted, what the conversion takes and gives.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from gemini.chunk.flat_values import FlatValues
from gemini.errors import CheckpointMismatchError
from gemini.model_names import canonical_buffers, canonical_names
from gemini.pretrained.conversions import Conversion, ignored_names, is_transformers_model, match_names
from gemini.pretrained.files import CheckpointFiles
from gemini.pretrained.state_names import base_model_of, state_names

__all__ = ["LoadingReport", "PretrainedWeights", "open_pretrained"]

logger = logging.getLogger(__name__)

COMPARED_NUMEL = 1 << 20
"""Elements of two tensors that are compared at once."""
NAMES_SHOWN = 8
"""Names in a message at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingReport:
    """What of a checkpoint and a model did not belong together; the names are those that transformers reports."""

    path: Path
    """The checkpoint."""
    missing_keys: tuple[str, ...]
    """Of the model, not in the checkpoint: they have the values that the model had or its own initialisation gave."""
    unexpected_keys: tuple[str, ...]
    """In the checkpoint, without a place in the model: they were passed over."""
    untied_keys: tuple[str, ...]
    """Tied in the model as it was built, but with values of their own in the checkpoint: they are tied no more."""


def open_pretrained(model: torch.nn.Module, path: Path) -> PretrainedWeights:
    """Open a checkpoint for a model; reads no weights but those that may or may not be tied.

    Args:
        model: on the meta device or not. If the checkpoint has different values for weights that it ties, they are
            tied no more, as transformers has it.
        path: the checkpoint's directory.

    Returns:
        The weights, to be closed.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or a file is missing.
        CheckpointMismatchError: it is of another model.
        ConfigError: the model is of transformers, which is too old.
        OffloadIOError: a file cannot be opened or read.
    """
    files = CheckpointFiles(path)
    try:
        weights = PretrainedWeights(model, files)
        _log(weights.report, model)
    except BaseException:
        files.close()
        raise
    return weights


class PretrainedWeights:
    """The values of a model's parameters and buffers in a checkpoint; see `open_pretrained`.

    Args:
        model: whose they are to be.
        files: the checkpoint; this closes it.

    Attributes:
        report: what did not belong together.
    """

    def __init__(self, model: torch.nn.Module, files: CheckpointFiles) -> None:
        self._files = files
        self._converted: dict[str, torch.Tensor] = {}  # what the last conversion gave and nobody has taken yet
        base = base_model_of(model)
        names = state_names(model)
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
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
        missing: dict[str, str] = {}  # of tied weights one name
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
                f"{_shown([*self._files.entries])}, has a place in the model, which expects {_shown([*state])}; is it "
                "of this model?"
            )
        for name in self._conversion_of:
            expected, found = tuple(state[name].shape), self._shape_of(name)
            if found != expected:
                raise CheckpointMismatchError(
                    f"{self._files.path}: {name} has shape {found}, the model expects {expected}: build the model from "
                    "the checkpoint's config.json, or load another checkpoint"
                )

    def _shape_of(self, name: str) -> tuple[int, ...]:
        conversion = self._conversion_of[name]
        entries = self._files.entries
        if conversion.convert is None:
            return entries[conversion.sources[0]].shape
        stored = {s: torch.empty(entries[s].shape, dtype=entries[s].dtype, device="meta") for s in conversion.sources}
        return tuple(conversion.convert(stored)[name].shape)

    def _untie(
        self, model: torch.nn.Module, names: Mapping[str, list[str]], canonical: Mapping[str, str]
    ) -> tuple[str, ...]:
        """Give tied parameters that have different values in the checkpoint one each; return their names."""
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
                module = model.get_submodule(owner)
                old = module._parameters[key]
                assert old is not None
                module._parameters[key] = torch.nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
            untied.append(name)
        tied = getattr(base_model_of(model), "all_tied_weights_keys", {})
        for name in untied:
            tied.pop(name, None)
        return tuple(untied)

    def _are_equal(self, one: str, other: str) -> bool:
        conversions = (self._conversion_of[one], self._conversion_of[other])
        if conversions[0].sources == conversions[1].sources:
            return True
        left, right = (self._values_in_state(name) for name in (one, other))
        numel = math.prod(self._shape_of(one))
        runs = (slice(begin, min(begin + COMPARED_NUMEL, numel)) for begin in range(0, numel, COMPARED_NUMEL))
        return all(torch.equal(left[run].float(), right[run].float()) for run in runs)

    def values_of(self, name: str) -> FlatValues | None:
        """Return a parameter's values by its canonical name; None: the checkpoint has none."""
        found = self._name_in_state.get(name)
        return None if found is None else self._values_in_state(found)

    def buffer_of(self, name: str) -> torch.Tensor | None:
        """Return a buffer's value in its shape, on the CPU; None: the checkpoint has none."""
        found = self._name_in_state.get(name)
        if found is None:
            return None
        return self._values_in_state(found)[:].view(self._shape_of(found))

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
        self.close()


@dataclass(frozen=True, slots=True)
class _StoredValues:
    """A tensor in a file, read when it is asked for."""

    files: CheckpointFiles
    name: str

    def __getitem__(self, run: slice, /) -> torch.Tensor:
        return self.files.read(self.name, run.start or 0, run.stop)


def _match(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], files: CheckpointFiles
) -> tuple[list[Conversion], list[str]]:
    """Return which tensors become which weights, and the names for which the model has no place."""
    if is_transformers_model(model):
        entries = files.entries.items()
        stored = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries}
        return match_names(model, state, stored)
    same = [Conversion((name,), (name,)) for name in files.entries if name in state]
    return same, [name for name in files.entries if name not in state]


def _harmless(model: torch.nn.Module, unexpected: list[str]) -> set[str]:
    """Return the names that a model without a place for them has always had in its checkpoints."""
    ignored = ignored_names(model, unexpected, attribute="_keys_to_ignore_on_load_unexpected")
    buffers = [name for name, _ in model.named_buffers()]
    for name in ("rotary_emb.inv_freq", "position_ids"):  # were persistent in earlier versions of transformers
        if any(buffer.endswith(name) for buffer in buffers):
            ignored |= {each for each in unexpected if re.search(rf"(^|\.){re.escape(name)}$", each)}
    return ignored


def _log(report: LoadingReport, model: torch.nn.Module) -> None:
    what = []
    if report.missing_keys:
        what.append(f"missing, and left as they are or newly initialised: {_shown(report.missing_keys)}")
    if report.unexpected_keys:
        what.append(f"unexpected, and passed over: {_shown(report.unexpected_keys)}")
    if report.untied_keys:
        what.append(f"tied in the model but not in the checkpoint, and tied no more: {_shown(report.untied_keys)}")
    if what:
        name = type(base_model_of(model)).__name__
        logger.warning("%s was loaded from %s, but for what is %s", name, report.path, "; ".join(what))


def _shown(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
