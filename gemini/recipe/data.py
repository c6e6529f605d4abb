"""Text to rows of token ids: files are read by Hugging Face's datasets, which also keeps what was made of them."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from gemini.errors import ConfigError
from gemini.recipe.settings import DataSettings

__all__ = ["IGNORED", "Collator", "Segment", "find_files", "form_of", "load_rows", "pack", "segments_of"]

IGNORED = -100
"""The label of a token whose prediction does not count, as in transformers."""

_KINDS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_COLUMNS = {
    "messages": {"messages"},
    "instruction": {"instruction", "output"},
    "completion": {"prompt", "completion"},
    "text": {"text"},
}
"""What each form needs; the first that fits is taken."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of an example."""

    ids: list[int]
    counts: bool
    """Whether the model is to learn to write it."""


def load_rows(files: Sequence[str], settings: DataSettings, tokenizer: Any, *, name: str) -> Any:
    """Read files and turn them into rows.

    Args:
        files: patterns of file names.
        settings: how.
        tokenizer: transformers', with an end-of-sequence token.
        name: of the setting, for messages.

    Returns:
        A datasets.Dataset of rows with `input_ids` and `labels`, lists of as many ints: `sequence_length` with
        packing, else at most that.

    Raises:
        ConfigError: there are no such files, or they are not in the form.
    """
    import datasets

    kind, paths = find_files(files, name=name)
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        examples = datasets.load_dataset(kind, data_files=paths, split="train", **options)
    except Exception as error:  # of many types: the files may hold anything
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"{name}: {', '.join(paths)}: cannot be read as {kind}: {reason}") from error
    form = form_of(examples.column_names, settings.form, name=name)
    length = settings.sequence_length

    def encode(columns: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        examples = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        encoded = [_join(segments_of(example, form, tokenizer, name=name), settings) for example in examples]
        ids, labels = [ids for ids, _ in encoded], [labels for _, labels in encoded]
        if settings.packing:
            return {"input_ids": pack(ids, length), "labels": pack(labels, length)}
        return {"input_ids": [each[:length] for each in ids], "labels": [each[:length] for each in labels]}

    rows = examples.map(encode, batched=True, remove_columns=examples.column_names, desc=f"{name}: tokens")
    if not len(rows):
        raise ConfigError(f"{name}: expected at least {length} tokens, for one row of sequence_length, found fewer")
    return rows


def find_files(patterns: Sequence[str], *, name: str) -> tuple[str, list[str]]:
    """Find files, and what they are.

    Args:
        patterns: names of files; may have wildcards.
        name: of the setting, for messages.

    Returns:
        The kind, "text", "json" or "parquet", and the files in the order of their names.

    Raises:
        ConfigError: a pattern finds nothing, or they are of several kinds or of an unknown one.
    """
    paths: set[str] = set()
    for pattern in patterns:
        found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        if not found:
            raise ConfigError(f"{name}: there is no file {pattern}")
        paths.update(found)
    kinds = {path: _KINDS.get(Path(path).suffix) for path in sorted(paths)}
    unknown = [path for path, kind in kinds.items() if kind is None]
    if unknown:
        raise ConfigError(f"{name}: {unknown[0]}: expected a name that ends in {', '.join(_KINDS)}")
    if len(set(kinds.values())) > 1:
        raise ConfigError(f"{name}: expected files of one kind, got {', '.join(sorted(map(str, set(kinds.values()))))}")
    return str(kinds[min(kinds)]), list(kinds)


def form_of(columns: Iterable[str], asked: str, *, name: str) -> str:
    """Return the form of examples.

    Args:
        columns: names of theirs.
        asked: what the settings say, perhaps "auto".
        name: of the setting, for messages.

    Returns:
        "messages", "instruction", "completion" or "text".

    Raises:
        ConfigError: the columns that it needs are not there.
    """
    present = set(columns)
    if asked != "auto" and not _COLUMNS[asked] <= present:
        raise ConfigError(
            f"{name}: form {asked} needs the columns {', '.join(sorted(_COLUMNS[asked]))}; there are "
            f"{', '.join(sorted(present))}"
        )
    fitting = [form for form, needed in _COLUMNS.items() if needed <= present and asked in ("auto", form)]
    if not fitting:
        expected = "; ".join(f"{form}: {', '.join(sorted(needed))}" for form, needed in _COLUMNS.items())
        raise ConfigError(f"{name}: no form fits the columns {', '.join(sorted(present))}; expected one of {expected}")
    return fitting[0]


def segments_of(example: Mapping[str, Any], form: str, tokenizer: Any, *, name: str) -> list[Segment]:
    """Cut an example into what the model is given and what it is to learn to write, as tokens.

    Args:
        example: one, with the columns of its form.
        form: as from `form_of`.
        tokenizer: transformers'.
        name: of the setting, for messages.

    Returns:
        Its segments, in order, the end-of-sequence token or the chat template's own end included.

    Raises:
        ConfigError: messages, and the tokenizer has no chat template or one that rewrites what was said before.
    """
    if form == "messages":
        return _segments_of_chat(example["messages"], tokenizer, name=name)
    end = [tokenizer.eos_token_id]
    if form == "text":
        return [Segment(_encode(tokenizer, example["text"], is_first=True) + end, counts=True)]
    if form == "completion":
        prompt, answer = example["prompt"], example["completion"]
    else:
        question = "\n\n".join(filter(None, (example["instruction"], example.get("input"))))
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": example["output"]}]
            return _segments_of_chat(turns, tokenizer, name=name)
        prompt, answer = f"### Instruction:\n{question}\n\n### Response:\n", example["output"]
    return [
        Segment(_encode(tokenizer, prompt, is_first=True), counts=False),
        Segment(_encode(tokenizer, answer, is_first=False) + end, counts=True),
    ]


def _encode(tokenizer: Any, text: str, *, is_first: bool) -> list[int]:
    """Return a text's tokens; those that the tokenizer puts at a beginning only there, those at an end never."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = is_first and tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False)
    return [tokenizer.bos_token_id, *ids] if starts else ids


def _segments_of_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, name: str) -> list[Segment]:
    """Cut a conversation where the assistant begins and ends, by what each message adds to the one before."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"{name}: messages need a tokenizer with a chat template, and this one has none")

    def render(count: int, *, asks: bool) -> list[int]:
        tokens = tokenizer.apply_chat_template(
            list(messages[:count]), add_generation_prompt=asks, tokenize=True, return_dict=False
        )
        return list(tokens)

    segments: list[Segment] = []
    before: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            if i:
                before = _extend(segments, before, render(i, asks=True), counts=False, name=name)
        elif i + 1 < len(messages):
            continue
        before = _extend(segments, before, render(i + 1, asks=False), counts=message["role"] == "assistant", name=name)
    return segments


def _extend(segments: list[Segment], before: list[int], now: list[int], *, counts: bool, name: str) -> list[int]:
    """Add what the tokens of a conversation have that they had not before."""
    if now[: len(before)] != before:
        raise ConfigError(
            f"{name}: the tokenizer's chat template rewrites earlier messages when later ones are added, so that the "
            "assistant's own cannot be told apart: use the form completion, or text"
        )
    segments.append(Segment(now[len(before) :], counts=counts))
    return now


def _join(segments: Sequence[Segment], settings: DataSettings) -> tuple[list[int], list[int]]:
    """Return an example's tokens and labels."""
    ids = [segment.ids for segment in segments]
    counts = [segment.counts or settings.train_on_prompts for segment in segments]
    labels = [each if c else [IGNORED] * len(each) for each, c in zip(ids, counts, strict=True)]
    return list(chain.from_iterable(ids)), list(chain.from_iterable(labels))


def pack(sequences: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    """Put sequences one after another and cut them into rows; what does not fill one is dropped.

    Args:
        sequences: of any lengths.
        length: of a row.

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
