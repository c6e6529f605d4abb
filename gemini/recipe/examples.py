"""Turns examples into tokens, divided into what the model is given and what it learns to write."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemini.errors import ConfigError

__all__ = ["Segment", "form_of", "segments_of"]

_COLUMNS = {
    "messages": {"messages"},
    "instruction": {"instruction", "output"},
    "completion": {"prompt", "completion"},
    "text": {"text"},
}
"""Columns that each form needs; the first form that fits is chosen."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of an example."""

    ids: list[int]
    counts: bool
    """Whether the model learns to write it."""


def form_of(columns: Iterable[str], asked: str, *, name: str) -> str:
    """Return the form of examples.

    Args:
        columns: names of the examples' columns.
        asked: the form in the settings, possibly "auto".
        name: name of the setting, for messages.

    Returns:
        "messages", "instruction", "completion" or "text".

    Raises:
        ConfigError: the columns that the form needs are missing.
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
    """Divide an example into what the model is given and what it learns to write, as tokens.

    Args:
        example: an example with the columns of its form.
        form: a form from `form_of`.
        tokenizer: transformers' tokenizer.
        name: name of the setting, for messages.

    Returns:
        Its segments in order, including the end-of-sequence token or the end of the chat template.

    Raises:
        ConfigError: a column has no text where it is needed; or the form is messages, and the tokenizer has no chat
            template, or has one that rewrites earlier messages.
    """
    if form == "messages":
        return _segments_of_chat(_messages_of(example, name=name), tokenizer, name=name)
    end = [tokenizer.eos_token_id]
    if form == "text":
        return [Segment(_encode(tokenizer, _text_of(example, "text", name=name), is_first=True) + end, counts=True)]
    if form == "completion":
        prompt, answer = (_text_of(example, column, name=name) for column in ("prompt", "completion"))
    else:
        question, answer = (_text_of(example, column, name=name) for column in ("instruction", "output"))
        if example.get("input"):
            question += "\n\n" + _text_of(example, "input", name=name)
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return _segments_of_chat(turns, tokenizer, name=name)
        prompt = f"### Instruction:\n{question}\n\n### Response:\n"
    return [
        Segment(_encode(tokenizer, prompt, is_first=True), counts=False),
        Segment(_encode(tokenizer, answer, is_first=False) + end, counts=True),
    ]


def _text_of(fields: Mapping[str, Any], key: str, *, name: str) -> str:
    """Return the text of a column or message; a tokenizer would silently accept some other types."""
    value = fields.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"{name}: {key}: expected a text, got {reprlib.repr(value)}")
    return value


def _messages_of(example: Mapping[str, Any], *, name: str) -> Sequence[Mapping[str, Any]]:
    messages = example["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise ConfigError(f"{name}: messages: expected a list of {{role, content}}, got {reprlib.repr(messages)}")
    for message in messages:
        for key in ("role", "content"):
            _text_of(message, key, name=name)
    return messages


def _encode(tokenizer: Any, text: str, *, is_first: bool) -> list[int]:
    """Return a text's tokens. Special tokens of a beginning are added only there, those of an end never."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = is_first and tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False)
    return [tokenizer.bos_token_id, *ids] if starts else ids


def _segments_of_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, name: str) -> list[Segment]:
    """Divide a conversation where the assistant's messages begin and end, by the text that each message adds."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"{name}: messages need a tokenizer with a chat template; this tokenizer has none")

    def render(count: int, *, asks: bool) -> list[int]:
        try:
            tokens = tokenizer.apply_chat_template(
                list(messages[:count]), add_generation_prompt=asks, tokenize=True, return_dict=False
            )
        except Exception as error:  # errors of the template's own choice, too
            raise ConfigError(f"{name}: the tokenizer's chat template refuses the messages: {error}") from error
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
    """Append the tokens of a conversation that are new since the previous call."""
    if now[: len(before)] != before:
        raise ConfigError(
            f"{name}: the tokenizer's chat template rewrites earlier messages when later ones are added, so the "
            "assistant's tokens cannot be identified: use the form completion or text"
        )
    segments.append(Segment(now[len(before) :], counts=counts))
    return now
