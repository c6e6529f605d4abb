"""Files to rows of tokens."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import FORGETFUL_TEMPLATE, tokenizer_of

from gemini import ConfigError
from gemini.recipe.data import IGNORED, Collator, find_files, load_rows, pack
from gemini.recipe.examples import form_of, segments_of
from gemini.recipe.settings import DataSettings

TOKENIZER = tokenizer_of()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path: Path, examples: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def text_of(example: dict[str, Any], form: str, tokenizer: Any = TOKENIZER) -> list[tuple[str, bool]]:
    segments = segments_of(example, form, tokenizer, name="data.files")
    return [(tokenizer.decode(segment.ids), segment.counts) for segment in segments]


def test_text_ends_with_the_end_of_sequence() -> None:
    assert text_of({"text": "a b"}, "text") == [("a b</s>", True)]


def test_prompts_do_not_count() -> None:
    assert text_of({"prompt": "2+2=", "completion": "4"}, "completion") == [("2+2=", False), ("4</s>", True)]


def test_instructions_without_a_chat_template() -> None:
    example = {"instruction": "add", "input": "2 2", "output": "4"}
    prompt, answer = text_of(example, "instruction", tokenizer_of(None))
    assert prompt == ("### Instruction:\nadd\n\n2 2\n\n### Response:\n", False)
    assert answer == ("4</s>", True)


def test_instructions_with_a_chat_template() -> None:
    found = text_of({"instruction": "add", "input": None, "output": "4"}, "instruction")
    assert found == [("<user>add</s><assistant>", False), ("4</s>", True)]


def test_of_messages_the_assistants_count() -> None:
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    found = text_of({"messages": [{"role": role, "content": content} for role, content in turns]}, "messages")
    assert found == [
        ("<system>be kind</s><user>hi</s><assistant>", False),
        ("hello</s>", True),
        ("<user>bye</s><assistant>", False),
        ("see you</s>", True),
    ]


def test_messages_may_begin_or_end_with_anyone() -> None:
    turns = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
    assert text_of({"messages": turns}, "messages") == [("<assistant>hello</s>", True), ("<user>bye</s>", False)]


@pytest.mark.parametrize(
    ("template", "message"), [(None, "this tokenizer has none"), (FORGETFUL_TEMPLATE, "rewrites earlier messages")]
)
def test_templates_that_cannot_be_used_are_named(template: str | None, message: str) -> None:
    turns = [{"role": role, "content": f"{role}!"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ConfigError, match=f"data.files: .*{message}"):
        segments_of({"messages": turns}, "messages", tokenizer_of(template), name="data.files")


@given(st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=9), st.integers(1, 5))
def test_packing_keeps_order_and_drops_less_than_a_row(sequences: list[list[int]], length: int) -> None:
    joined = list(chain.from_iterable(sequences))
    rows = pack(sequences, length)
    assert all(len(row) == length for row in rows)
    assert list(chain.from_iterable(rows)) == joined[: len(joined) // length * length]


def test_packed_rows_of_a_file(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd"}] * 4)
    rows = load_rows([file], DataSettings(files=[file], sequence_length=6), TOKENIZER, name="data.files")
    assert [TOKENIZER.decode(row) for row in rows["input_ids"]] == ["abcd</s>a", "bcd</s>ab", "cd</s>abc"]
    a, b, c, d = TOKENIZER("abcd")["input_ids"]
    end = TOKENIZER.eos_token_id
    assert rows["labels"][0] == [IGNORED, IGNORED, c, d, end, IGNORED]
    assert {a, b, c, d} < set(rows["input_ids"][0])


def test_rows_that_are_not_packed_are_cut(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "abcdef"}, {"text": "a"}])
    settings = DataSettings(files=[file], sequence_length=4, packing=False)
    rows = load_rows([file], settings, TOKENIZER, name="data.files")
    assert [TOKENIZER.decode(row) for row in rows["input_ids"]] == ["abcd", "a</s>"]


def test_prompts_count_if_asked(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "cd"}])
    settings = DataSettings(files=[file], sequence_length=5, train_on_prompts=True)
    rows = load_rows([file], settings, TOKENIZER, name="data.files")
    assert rows["labels"] == rows["input_ids"]


def test_text_files_are_documents_and_parquet_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line\nline")
    settings = DataSettings(files=["x"], sequence_length=10)
    rows = load_rows([str(tmp_path / "*.txt")], settings, TOKENIZER, name="data.files")
    assert [TOKENIZER.decode(row) for row in rows["input_ids"]] == ["line\nline</s>"]
    datasets.Dataset.from_dict({"text": ["0123456789"]}).to_parquet(tmp_path / "a.parquet")
    rows = load_rows([str(tmp_path / "a.parquet")], settings, TOKENIZER, name="data.files")
    assert [TOKENIZER.decode(row) for row in rows["input_ids"]] == ["0123456789"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none.jsonl"], "there is no file"),
        (["a.csv"], "expected a name that ends in .txt, .md, .json, .jsonl, .parquet"),
        (["a.jsonl", "b.txt"], "expected files of one kind, got json, text"),
    ],
)
def test_files_that_cannot_be_used_are_named(names: list[str], message: str, tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl", "b.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=f"data.files: .*{message}"):
        find_files([str(tmp_path / name) for name in names], name="data.files")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    settings = DataSettings(files=["x"])
    with pytest.raises(ConfigError, match=r"data.files: .*a.jsonl: cannot be read as json"):
        load_rows([str(tmp_path / "a.jsonl")], settings, TOKENIZER, name="data.files")


TEXT = {"text": "a text that is long enough"}


def rows_of(path: Path, content: str | bytes, name: str = "a.jsonl", **settings: Any) -> list[str]:
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    chosen = DataSettings(files=["x"], **{"sequence_length": 8, "packing": False, **settings})
    rows = load_rows([str(path / name)], chosen, TOKENIZER, name="data.files")
    return [TOKENIZER.decode(row) for row in rows["input_ids"]]


def lines(*examples: Any) -> str:
    return "".join(json.dumps(example) + "\n" for example in examples)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a.jsonl is empty"),
        ("\n\n", "a.jsonl: cannot be read as json: there are no examples"),
        (lines(TEXT, TEXT) + '{"text": \n' + lines(TEXT), "a.jsonl, line 3: Expecting value"),
        (lines(TEXT, {"body": "b"}), "example 2: text: expected a text, got None"),
        (lines({"text": 5}), "example 1: text: expected a text, got 5"),
        (lines({"text": ["a", "b"]}), r"example 1: text: expected a text, got \['a', 'b'\]"),
        (lines({"prompt": "a", "completion": None}), "example 1: completion: expected a text"),
        (lines({"messages": []}), r"example 1: messages: expected a list of {role, content}, got \[\]"),
        (lines({"messages": "hello"}), "example 1: messages: expected a list"),
        (lines({"messages": [{"role": "user"}]}), "example 1: content: expected a text, got None"),
        (b'{"text": "caf\xe9"}\n', "a.jsonl: expected text in UTF-8"),
    ],
)
def test_data_of_another_form_is_named_with_its_place(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"data.files: .*{message}"):
        rows_of(tmp_path, content)


def test_a_template_that_refuses_the_messages_is_quoted() -> None:
    tokenizer = tokenizer_of("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="data.files: .* refuses the messages: roles must alternate"):
        segments_of({"messages": [{"role": "user", "content": "a"}]}, "messages", tokenizer, name="data.files")


def test_rows_that_teach_nothing_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their loss would be 0 or NaN, and a step of theirs would shrink weights for nothing."""
    found = rows_of(tmp_path, lines({"prompt": "12345678", "completion": "9"}, {"prompt": "1", "completion": "2"}))
    assert found == ["12</s>"]
    assert "1 of 2 rows have nothing to train on in their 8 tokens" in caplog.text


def test_data_that_teaches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no row has tokens to train on within its first 8 tokens"):
        rows_of(tmp_path, lines({"prompt": "12345678", "completion": "9"}))


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "A.JSONL"])
def test_names_are_taken_as_they_are(name: str, tmp_path: Path) -> None:
    (tmp_path / "ab.jsonl").write_text("not this one")
    assert rows_of(tmp_path, lines({"text": "a"}), name=name) == ["a</s>"]


def test_too_little_data_is_said(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    with pytest.raises(ConfigError, match="expected at least 1024 tokens"):
        load_rows([file], DataSettings(files=[file]), TOKENIZER, name="data.files")


@pytest.mark.parametrize(
    ("columns", "asked", "expected"),
    [
        (["text"], "auto", "text"),
        (["messages", "text"], "auto", "messages"),
        (["messages", "text"], "text", "text"),
        (["instruction", "output", "input"], "auto", "instruction"),
        (["prompt", "completion"], "auto", "completion"),
    ],
)
def test_forms_are_known_by_their_columns(columns: list[str], asked: str, expected: str) -> None:
    assert form_of(columns, asked, name="data.files") == expected


@pytest.mark.parametrize(
    ("asked", "message"), [("auto", "no form fits the columns body"), ("text", "form text needs the columns text")]
)
def test_columns_of_no_form_are_refused(asked: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        form_of(["body"], asked, name="data.files")


def test_batches_are_padded() -> None:
    collator = Collator(pad_id=9)
    batch = collator([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    full = collator([{"input_ids": [1, 2], "labels": [1, 2]}])
    assert "attention_mask" not in full
    assert full["input_ids"].dtype is torch.int64
