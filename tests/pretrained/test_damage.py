"""What cannot be loaded or saved is refused by name, with what to do, and leaves things as they were."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from directories import config_of, plain_model, rewrite, same_outputs, tensors_in
from faults import flip_bit
from model_zoo import HF_CASES
from safetensors.torch import load_file, save_file
from torch import nn
from training_harness import config_for, same_bits

import gemini
from gemini import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    GeminiDDP,
    OffloadIOError,
    OutOfTierMemoryError,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored")
    plain_model("llama").save_pretrained(path / "single")
    plain_model("llama").save_pretrained(path / "sharded", max_shard_size="30KB")
    return path


@pytest.fixture
def single(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored / "single", tmp_path / "single"))


@pytest.fixture
def sharded(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored / "sharded", tmp_path / "sharded"))


def load(path: Path) -> None:
    with gemini.load_pretrained(path, config_for("host")):
        pass


def cut_short(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 5)


# ---------------------------------------------------------------- directories


def test_a_name_of_the_hub_is_told_from_a_directory() -> None:
    with pytest.raises(CheckpointError, match="org/model is not a directory; .* huggingface_hub.snapshot_download"):
        load(Path("org/model"))


def empty(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def adapter(path: Path) -> None:
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "config.json").rename(path / "adapter_config.json")


def interrupted(path: Path, place: str) -> None:
    (path / place).mkdir()
    (path / "model.safetensors").rename(path / place / "model.safetensors")


def quantized(path: Path) -> None:
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": "fp8"}}))


def without_config(path: Path) -> None:
    (path / "config.json").unlink()


def configured(**fields: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        text = json.dumps(config_of(path) | fields)
        (path / "config.json").write_text(text)

    return change


def of_another_dtype(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    assert data.count(b'"F32"')
    (path / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F4 "', 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            empty,
            r"not a checkpoint that can be loaded: expected model\.safetensors, or model\.safetensors\.index\.json",
        ),
        (pickled, r"pickled \(\.bin\): convert them"),
        (adapter, "it is a PEFT adapter: load the base model"),
        (lambda path: interrupted(path, ".saved"), r"a save was interrupted .* move the files in \.saved up"),
        (lambda path: interrupted(path, ".saving"), r"interrupted; the files in \.saving are not complete: save again"),
        (quantized, "is quantized, .* dequantize it"),
        (without_config, r"has no config\.json to build the model from: give model_config="),
        (
            configured(model_type="none"),
            r"transformers cannot read .*/config\.json \(ValueError: .* type `none`",
        ),
        (
            configured(model_type="none", auto_map={"AutoConfig": "code.Config"}),
            "custom code .* build the model",
        ),
        (configured(hidden_size="many"), r"transformers cannot read .*/config\.json \(.*'hidden_size' expected int"),
        (
            configured(hidden_size=-32),
            r"transformers cannot build a model from .* \(RuntimeError: .* negative",
        ),
        (
            lambda path: (path / "generation_config.json").write_text("{"),
            r"transformers cannot read .*/generation_config\.json \(OSError: .* not a valid JSON",
        ),
        (
            of_another_dtype,
            "model.safetensors: .* has dtype F4 , expected one of .* BF16, .*: store it as",
        ),
        (lambda path: cut_short(path / "model.safetensors"), r"model\.safetensors is damaged: its header promises"),
        (lambda path: (path / "model.safetensors").write_bytes(b"no"), "not a safetensors file, or is truncated"),
    ],
)
def test_a_directory_that_cannot_be_loaded_says_why(change: Callable[[Path], object], message: str, single: Path):
    change(single)

    with pytest.raises(CheckpointError, match=message):
        load(single)


def test_a_path_that_cannot_be_looked_at_is_named() -> None:
    with pytest.raises(OffloadIOError, match="cannot read a{300}: File name too long"):
        load(Path("a" * 300))


def rewrite_index(path: Path, text: str) -> None:
    (path / "model.safetensors.index.json").write_text(text)


def move_entry(path: Path) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    rewrite_index(path, json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: next(path.glob("model-00002*")).unlink(), "model-00002-of-.* is missing from the checkpoint"),
        (lambda path: cut_short(next(path.glob("model-00003*"))), "model-00003-of-.* is damaged: its header promises"),
        (lambda path: rewrite_index(path, "{"), "index.json is damaged: it is not JSON"),
        (lambda path: rewrite_index(path, "[]"), "index.json is damaged: expected an object, found list"),
        (lambda path: rewrite_index(path, '{"weight_map": {"a": 1}}'), "expected the file of each tensor"),
        (lambda path: rewrite_index(path, '{"weight_map": {"a": "/a"}}'), "names /a, which is not in its directory"),
        (lambda path: rewrite_index(path, '{"weight_map": {"a": "b/../../a"}}'), "names b/../../a, which is not in"),
        (move_entry, r"model-0000.* has no tensor model\.norm\.weight, although model\.safetensors\.index\.json lists"),
    ],
)
def test_a_directory_of_shards_that_is_damaged_says_where(
    change: Callable[[Path], object], message: str, sharded: Path
) -> None:
    change(sharded)

    with pytest.raises(CheckpointError, match=message):
        load(sharded)


@pytest.mark.parametrize("shape", [(32,), (5,), (64,)])
def test_of_a_tensor_in_two_files_that_of_the_index_counts(shape: tuple[int, ...], sharded: Path) -> None:
    expected = tensors_in(sharded)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    name = "model.norm.weight"
    files = {}
    for tensor, file in sorted(index["weight_map"].items(), key=lambda item: item[0] != name):
        files[tensor] = file  # the file with a stray copy is opened last
    stray = sharded / list(files.values())[-1]
    assert stray.name != files[name]
    save_file({**load_file(stray), name: torch.full(shape, 7.0)}, stray)
    rewrite_index(sharded, json.dumps(index | {"weight_map": files}))

    with gemini.load_pretrained(sharded, config_for("host")) as engine:
        assert same_bits(engine.master_state_dict(), expected)


# ---------------------------------------------------------------- models


def test_a_tensor_of_another_shape_is_named_with_both(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}))

    with pytest.raises(
        CheckpointMismatchError, match=r"model\.norm\.weight has shape \(31,\), the model expects \(32,"
    ):
        load(single)


def test_a_flipped_bit_of_a_value_is_taken_as_it_is(single: Path) -> None:
    flip_bit(single / "model.safetensors", (single / "model.safetensors").stat().st_size - 1)

    load(single)


def test_values_that_would_be_cut_off_are_refused(tmp_path: Path) -> None:
    save_file({"0.weight": torch.rand(4), "0.num_batches_tracked": torch.tensor(2.5)}, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointMismatchError, match=r"_tracked has torch\.float32, the model expects torch\.int64"):
        GeminiDDP(nn.Sequential(nn.BatchNorm1d(4)), config_for("host"), weights=tmp_path)


def test_a_model_stays_tied_if_no_engine_is_built(tmp_path: Path) -> None:
    model = plain_model("gpt2")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))
    tied, before = dict(model.all_tied_weights_keys), {name: t.clone() for name, t in model.state_dict().items()}

    with pytest.raises(OutOfTierMemoryError):
        GeminiDDP(model, config_for("host", host_budget="1KiB"), weights=tmp_path)

    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.all_tied_weights_keys == tied
    assert same_bits(model.state_dict(), before)


def test_a_checkpoint_of_another_model_is_refused(single: Path) -> None:
    with torch.device("meta"):
        model = HF_CASES["convnext"].build()

    with pytest.raises(CheckpointMismatchError, match="none of its 30 tensors, lm_head.weight, .* is in the model"):
        GeminiDDP(model, config_for("host"), weights=single)


def test_an_expert_that_is_missing_names_what_cannot_be_made(tmp_path: Path) -> None:
    plain_model("mixtral").save_pretrained(tmp_path)
    lost = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(lost))

    with pytest.raises(CheckpointMismatchError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load(tmp_path)


def test_a_class_that_is_not_named_must_be_given(single: Path) -> None:
    model_config = hf.LlamaConfig()

    with pytest.raises(ConfigError, match="no model class named in config.json: give model_class="):
        gemini.load_pretrained(single, config_for("host"), model_config=model_config)


# ---------------------------------------------------------------- saving


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_drive_leaves_the_older_model_as_it_was(single: Path) -> None:
    before, names = tensors_in(single), sorted(path.name for path in single.iterdir())

    with GeminiDDP(plain_model("gpt2"), config_for("host")) as engine, file_size_limit(20_000):
        with pytest.raises(OffloadIOError, match=r"model\.safetensors: File too large"):
            engine.save_pretrained(single)
        assert sorted(path.name for path in single.iterdir()) == names
        assert same_bits(tensors_in(single), before)


def test_shards_of_an_older_model_go_and_other_files_stay(sharded: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    model = plain_model("gpt2")

    with GeminiDDP(plain_model("gpt2"), config_for("host")) as engine:
        engine.save_pretrained(sharded)

    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in sharded.iterdir()} == names
    assert same_outputs(hf.AutoModelForCausalLM.from_pretrained(sharded), model, HF_CASES["gpt2"])


def test_a_save_that_fails_while_files_are_moved_is_refused_and_keeps_the_new_ones(sharded: Path) -> None:
    with GeminiDDP(plain_model("gpt2"), config_for("host")) as engine:
        (sharded / "model.safetensors").mkdir()  # cannot be replaced by a file
        with pytest.raises(OffloadIOError, match=r"cannot complete .*\.saved"):
            engine.save_pretrained(sharded)
        (sharded / "model.safetensors").rmdir()
        expected = tensors_in(sharded / ".saved")
        with file_size_limit(1000), pytest.raises(OffloadIOError, match="File too large"):
            engine.save_pretrained(sharded)

    assert expected
    assert same_bits(tensors_in(sharded), expected)


def test_what_is_asked_for_must_make_sense(tmp_path: Path) -> None:
    with GeminiDDP(plain_model("gpt2"), config_for("host")) as engine:
        with pytest.raises(ConfigError, match="dtype: expected None .* got .int8."):
            engine.save_pretrained(tmp_path, dtype="int8")
        with pytest.raises(ConfigError, match="max_shard_size: cannot read 'many' as bytes"):
            engine.save_pretrained(tmp_path, max_shard_size="many")
        (tmp_path / "file").touch()
        with pytest.raises(OffloadIOError, match="cannot create directory .*file: File exists"):
            engine.save_pretrained(tmp_path / "file")
