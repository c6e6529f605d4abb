"""Training files: what is right is read, what is wrong is named with its line."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gemini import ConfigError
from gemini.recipe.settings import Settings
from gemini.recipe.settings_file import parse_settings, read_settings, write_template

KNOWN = {"model": {"path": "m"}, "data": {"files": ["a.jsonl", "b: c.jsonl"]}, "output": {"path": "runs/a"}}
BASE = "model:\n  path: m\ndata: {files: [a]}\noutput: {path: r}\n"


def test_the_template_has_the_defaults() -> None:
    assert parse_settings(write_template(KNOWN), source="f") == Settings.model_validate(KNOWN)


def test_the_template_says_what_each_default_is() -> None:
    """With every comment taken away that has a value, the file means the same."""
    lines = write_template(KNOWN).splitlines()
    open_again = [re.sub(r"^( *)# (\w+: (?!null))", r"\1\2", line) for line in lines]
    kept = [line for line in open_again if not re.match(r" *(#|lora:|nvme:|rank:|alpha:|dropout:|target)", line)]
    assert parse_settings("\n".join(kept), source="f") == Settings.model_validate(KNOWN)
    assert sum(": " in line.split("  #")[0] for line in kept) > 20


def test_optional_sections_can_be_uncommented_as_they_stand() -> None:
    text = write_template(KNOWN)
    opened = re.sub(r"^  # (nvme:|  \w+:)", r"  \1", text, flags=re.MULTILINE)
    settings = parse_settings(opened, source="f")
    assert settings.memory.nvme is not None
    assert settings.memory.nvme.budget == "100GiB"


def test_numbers_as_people_write_them() -> None:
    settings = parse_settings(BASE + "training: {learning_rate: 1e-4, betas: [0.9, 0.95]}", source="f")
    assert settings.training.learning_rate == 1e-4
    assert settings.training.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f:1: model is missing: what is trained"),
        ("3", "f:1: expected keys with values"),
        ("a: [1", "f:1: this is not YAML"),
        ("model:\n\tpath: 3", "f:2: this is not YAML: found character"),
        ("a: 1\na: 2", "f:2: a is given twice"),
        (BASE + "training:\n  seed: 1\n  seed: 2", "f:7: seed is given twice"),
        (
            BASE + "training:\n  seed: 1\n  lerning_rate: 2",
            "f:7: training.lerning_rate: .* did you mean learning_rate?",
        ),
        (BASE + "trainig: {}", "f:5: trainig: there is no such setting; did you mean training?"),
        (BASE + "training:\n  xyz: 2", "f:6: training.xyz: there is no such setting; expected one of steps, epochs"),
        (BASE + "training:\n  learning_rate: fast", "f:6: training.learning_rate: .* valid number.* got 'fast'"),
        (BASE + "training:\n  batch_size: 0", "f:6: training.batch_size: .* greater than or equal to 1, got 0"),
        (BASE + "training: {betas: [0.9]}", "f:5: training.betas: "),
        (BASE + "memory:\n  host_budget: 3 apples", 'f:6: memory.host_budget: .*write for example "6GiB"'),
        (BASE + "memory:\n  nvme:\n    path: a", "f:6: memory.nvme.budget is missing: maximum size of the swap file"),
        (BASE + "memory:\n  nvme:", "f:5: memory: nvme is empty"),
        (BASE + "memory: {host_budget: 16G}", "f:5: memory.host_budget: cannot read '16G' as bytes; write .* 1048576$"),
        (BASE + "memory: {host_budget: true}", "f:5: memory.host_budget: expected a value, not true or false"),
        (BASE + "memory: {host_budget: 1.5}", "f:5: memory.host_budget: expected bytes as an int or a str"),
        (BASE + "memory: {device: tpu}", 'f:5: memory.device: expected "cpu", "cuda"'),
        (BASE + "memory: {nvme: {path: a, budget: 1GB, endurance: lots}}", "f:5: memory.nvme.endurance: cannot read"),
        (BASE + "training: {steps: true}", "f:5: training.steps: expected a value, not true or false"),
        (BASE + "training: {learning_rate: .inf}", "f:5: training.learning_rate: .* finite"),
        (BASE + "training: {epochs: .inf}", "f:5: training.epochs: .* finite"),
        (BASE + "training: {betas: [1, 1]}", "f:5: training.betas.0: .* less than 1, got 1"),
        (BASE + "training: {seed: 4294967296}", "f:5: training.seed: .* less than 4294967296"),
        (BASE + "training: {seed: " + "9" * 5000 + "}", "f(:5)?: .*(5000 digits|less than)"),
        (BASE + "training: {seed: 2001-13-45}", "f: this is not YAML: month must be"),
        (BASE.replace("path: r", "path: ''"), "f:4: output.path: is empty"),
        ("model: &a [*a]", "f: expected sections and settings, got endlessly nested values"),
        ("[" * 2000, "f: expected sections and settings, got endlessly nested values"),
        ("? [a, b]\n: 3", "f:1: expected the name of a setting before the colon"),
        (BASE.replace("path: m", "lora: {}"), "f:1: model: expected either path or config"),
        (BASE.replace("path: m", "path: m\n  config: c"), "f:1: model: expected either path or config"),
        (BASE.replace("path: m", "config: c"), "f:1: model: tokenizer: expected a directory"),
        (BASE.replace("path: m", "path: m\n  lora: {target_modules: 3}"), "f:3: model.lora.target_modules: "),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings(text, source="f")


def test_all_mistakes_are_told_at_once() -> None:
    text = BASE + "training:\n  steps: x\n  epochs: y\n"
    with pytest.raises(ConfigError, match=r"(?s)f:6: training\.steps.*f:7: training\.epochs"):
        parse_settings(text, source="f")


def test_sections_of_which_all_is_commented_out_have_their_defaults() -> None:
    settings = parse_settings(BASE + "training:\n  # steps: 3\nmemory:\n", source="f")
    assert settings == parse_settings(BASE, source="f")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["model", "data", "path", "nvme", "lora", "training", "betas", "x"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_anything_is_read_or_refused(values: Any) -> None:
    with suppress(ConfigError):
        parse_settings(yaml.safe_dump(values), source="f")


def test_a_long_value_is_not_told_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(f"model: [{'xyz, ' * 1000}]", source="f")
    assert len(str(caught.value)) < 600


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("model: {}".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"a\.yaml: expected text in UTF-8: invalid start byte at byte 0"):
        read_settings(path)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BASE, encoding="utf-8-sig")
    assert read_settings(path).output.path == Path("r")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none.yaml"):
        read_settings(tmp_path / "none.yaml")
