"""A model that saves itself in a way of its own does so, from any tier, and what it wrote opens again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from directories import plain_model, tensors_in
from model_zoo import HF_CASES
from safetensors.torch import load_file, save_file
from torch import nn
from training_harness import config_for, same_bits

from gemini import CheckpointError, GeminiDDP

Llama: Any = hf.LlamaForCausalLM


class WithFile(Llama):
    """Adds a file to what transformers writes."""

    def save_pretrained(self, directory: str, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(directory, *args, **kwargs)
        (Path(directory) / "modules.json").write_text("{}")


class Deeper(WithFile):
    pass


class Renaming(Llama):
    """Saves under other names, by its state dict."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "q_proj" not in name}


class Pipeline(nn.Sequential):
    """Is no model of transformers, and saves a part by itself and the rest beside, as sentence-transformers' does."""

    def save_pretrained(self, path: str) -> None:
        folder = Path(path) / "1_Dense"
        folder.mkdir(parents=True)
        self[0].save_pretrained(path)
        save_file(dict(self[1].state_dict()), folder / "model.safetensors")
        (Path(path) / "scale.json").write_text(json.dumps(self[1].weight.abs().sum().item()))


def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    del state[f"{prefix}layers.0.mlp.up_proj.weight"]


def hooked() -> Any:
    model = build(Llama)
    model.model.register_state_dict_post_hook(leave_out)
    return model


def build(kind: type) -> Any:
    torch.manual_seed(3)
    return kind(HF_CASES["llama"].model().config)


def pipeline() -> Pipeline:
    return Pipeline(plain_model("llama"), nn.Linear(8, 8))


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


WAYS = {
    "overridden": lambda: build(WithFile),
    "overridden above": lambda: build(Deeper),
    "state_dict": lambda: build(Renaming),
    "hook": hooked,
    "of another library": pipeline,
}


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
@pytest.mark.parametrize("way", WAYS)
def test_it_writes_what_the_plain_model_writes(way: str, place: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    WAYS[way]().save_pretrained(str(tmp_path / "plain"))
    torch.manual_seed(1)
    (tmp_path / "swap").mkdir()
    with GeminiDDP(WAYS[way](), config_for(place, tmp_path / "swap")) as engine:
        engine.save_pretrained(tmp_path / "ours")
    assert files_in(tmp_path / "ours") - {".lock"} >= files_in(tmp_path / "plain")
    assert same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "plain"))
    for name in ("modules.json", "scale.json", "1_Dense/model.safetensors"):
        if (tmp_path / "plain" / name).exists():
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_masters_are_saved_where_they_are_asked_for(tmp_path: Path) -> None:
    plain = build(WithFile)
    with GeminiDDP(build(WithFile), config_for("nvme", tmp_path, dtype=torch.bfloat16)) as engine:
        engine.save_pretrained(tmp_path / "masters", dtype="float32")
        engine.save_pretrained(tmp_path / "working")
    assert same_bits(tensors_in(tmp_path / "masters"), dict(plain.state_dict()))
    assert {t.dtype for t in tensors_in(tmp_path / "working").values()} == {torch.bfloat16}


def test_the_size_of_shards_reaches_it(tmp_path: Path) -> None:
    with GeminiDDP(build(WithFile), config_for("host")) as engine:
        engine.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert (tmp_path / "modules.json").exists()


def test_the_engine_trains_on_after_it(tmp_path: Path) -> None:
    case = HF_CASES["llama"]
    with GeminiDDP(build(WithFile), config_for("nvme", tmp_path)) as engine:
        before = engine(**case.batches(1)[0]).loss
        engine.save_pretrained(tmp_path / "ours")
        after = engine(**case.batches(1)[0]).loss
        after.backward()
        assert torch.equal(before, after)


def test_its_errors_say_whose_they_are_and_leave_the_older_files(tmp_path: Path) -> None:
    with GeminiDDP(build(WithFile), config_for("host")) as engine:
        engine.save_pretrained(tmp_path)
        older = load_file(tmp_path / "model.safetensors")

        def fail(directory: str) -> None:
            raise KeyError("nothing")

        engine.module.save_pretrained = fail
        with pytest.raises(
            CheckpointError, match=r"WithFile.save_pretrained, the model's own method, .*KeyError: 'nothing'"
        ):
            engine.save_pretrained(tmp_path)
        assert same_bits(load_file(tmp_path / "model.safetensors"), older)
        assert engine.state_dict().keys() == engine.module.state_dict().keys()
