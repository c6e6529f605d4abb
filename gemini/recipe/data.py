"""Turns text into rows of token ids. Hugging Face's datasets reads the files and caches the results."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from gemini.errors import ConfigError
from gemini.recipe.examples import Segment, form_of, segments_of
from gemini.recipe.settings import DataSettings

__all__ = ["IGNORED", "Collator", "find_files", "load_rows", "pack"]

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token whose prediction does not count, as in transformers."""

_KINDS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(files: Sequence[str], settings: DataSettings, tokenizer: Any, *, name: str) -> Any:
    """Read files and turn them into rows.

    Args:
        files: patterns of file names.
        settings: settings of the data.
        tokenizer: transformers' tokenizer, with an end-of-sequence token.
        name: name of the setting, for messages.

    Returns:
        A datasets.Dataset of rows with `input_ids` and `labels`, lists of the same number of ints: `sequence_length`
        with packing, otherwise at most that. Rows without a token to learn are left out, with a warning.

    Raises:
        ConfigError: no file is found, files have another form, or they contain nothing to learn.
    """
    kind, paths = find_files(files, name=name)
    examples = _read_examples(kind, paths, name=name)
    form = form_of(examples.column_names, settings.form, name=name)
    length = settings.sequence_length

    def encode(columns: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        examples = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        encoded = [
            _join(segments_of(example, form, tokenizer, name=f"{name}: example {index + 1}"), settings)
            for index, example in zip(indices, examples, strict=True)
        ]
        ids, labels = [ids for ids, _ in encoded], [labels for _, labels in encoded]
        if settings.packing:
            return {"input_ids": pack(ids, length), "labels": pack(labels, length)}
        return {"input_ids": [each[:length] for each in ids], "labels": [each[:length] for each in labels]}

    options = {"remove_columns": examples.column_names, "desc": f"{name}: tokens"}
    try:
        rows = examples.map(encode, batched=True, with_indices=True, **options)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: {', '.join(paths)}: expected text in UTF-8: {error.reason}") from error
    if not len(rows):
        raise ConfigError(f"{name}: expected at least {length} tokens, for one row of sequence_length, found fewer")
    return _without_idle_rows(rows, length=length, name=name)


def _read_examples(kind: str, paths: list[str], *, name: str) -> Any:
    import datasets

    empty = [path for path in paths if not Path(path).stat().st_size]
    if empty:
        raise ConfigError(f"{name}: {empty[0]} is empty")
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        return datasets.load_dataset(kind, data_files=list(map(glob.escape, paths)), split="train", **options)
    except Exception as error:  # errors of many types, because files may hold anything
        reason = _first_broken_line(paths) or " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in reason:
            reason = "there are no examples"
        raise ConfigError(f"{name}: {', '.join(paths)}: cannot be read as {kind}: {reason}") from error


def _first_broken_line(paths: Sequence[str]) -> str | None:
    """Return the first invalid line of JSON lines files, which their readers do not name; None if there is none."""
    for path in paths:
        if Path(path).suffix.lower() != ".jsonl":
            continue
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        json.loads(line)
                except ValueError as error:
                    return f"{path}, line {number}: {error}"
    return None


def _without_idle_rows(rows: Any, *, length: int, name: str) -> Any:
    """Leave out rows without a token whose prediction counts, for example rows filled by a prompt."""

    def teaches(labels: list[list[int]]) -> list[bool]:
        return [any(label != IGNORED for label in each[1:]) for each in labels]  # no token predicts the first one

    kept = rows.filter(teaches, batched=True, input_columns="labels", desc=f"{name}: rows")
    if not len(kept):
        raise ConfigError(
            f"{name}: no row has tokens to train on within its first {length} tokens: prompts do not count; raise "
            "data.sequence_length, or set data.train_on_prompts"
        )
    if len(kept) < len(rows):
        logger.warning(
            "%s: %d of %d rows have nothing to train on in their %d tokens, for example because a prompt fills "
            "them; they are left out",
            *(name, len(rows) - len(kept), len(rows), length),
        )
    return kept


def find_files(patterns: Sequence[str], *, name: str) -> tuple[str, list[str]]:
    """Find files and their kind.

    Args:
        patterns: names of files, with or without wildcards.
        name: name of the setting, for messages.

    Returns:
        The kind, "text", "json" or "parquet", and the files sorted by name.

    Raises:
        ConfigError: a pattern finds no file, or the files have several kinds or an unknown one.
    """
    paths: set[str] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
        if not found:
            raise ConfigError(f"{name}: there is no file {pattern}")
        paths.update(found)
    kinds = {path: _KINDS.get(Path(path).suffix.lower()) for path in sorted(paths)}
    unknown = [path for path, kind in kinds.items() if kind is None]
    if unknown:
        raise ConfigError(f"{name}: {unknown[0]}: expected a name that ends in {', '.join(_KINDS)}")
    if len(set(kinds.values())) > 1:
        raise ConfigError(f"{name}: expected files of one kind, got {', '.join(sorted(map(str, set(kinds.values()))))}")
    return str(kinds[min(kinds)]), list(kinds)


def _join(segments: Sequence[Segment], settings: DataSettings) -> tuple[list[int], list[int]]:
    """Return an example's tokens and labels."""
    ids = [segment.ids for segment in segments]
    counts = [segment.counts or settings.train_on_prompts for segment in segments]
    labels = [each if c else [IGNORED] * len(each) for each, c in zip(ids, counts, strict=True)]
    return list(chain.from_iterable(ids)), list(chain.from_iterable(labels))


def pack(sequences: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    """Concatenate sequences and cut them into rows; an incomplete last row is dropped.

    Args:
        sequences: sequences of any lengths.
        length: length of a row.

    Returns:
        The rows.
    """
    joined = list(chain.from_iterable(sequences))
    return [joined[begin : begin + length] for begin in range(0, len(joined) - length + 1, length)]


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes a batch of rows, padded to the longest."""

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels` and, if anything was padded, `attention_mask`, each int64 [rows, tokens]."""
        longest = max(len(row["input_ids"]) for row in rows)

        def stack(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[filler] * (longest - len(row[name]))] for row in rows])

        batch = {"input_ids": stack("input_ids", self.pad_id), "labels": stack("labels", IGNORED)}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        if int(lengths.min()) < longest:
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch
