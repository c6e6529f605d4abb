"""Models built on the meta device come to life in their homes, the same for every placement and layout."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from model_zoo import HAND_CASES, HF_CASES
from torch import nn
from training_harness import Case, Run, config_for, same_bits, train_gemini

from gemini import GeminiConfig, GeminiDDP, ModelError

HF_NAMES = ("gpt2", "llama", "bert", "opt", "t5", "vit", "mixtral", "gemma", "qwen3_moe")
CASES = {name: HF_CASES[name] for name in HF_NAMES}
CASES |= {name: HAND_CASES[name] for name in ("tower", "conv_net", "recurrent", "borrowers", "torch_transformer")}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def on_meta(case: Case) -> Case:
    def build() -> nn.Module:
        with torch.device("meta"):
            return case.build()

    return Case(build, case.batch, case.loss)


@cache
def in_host(name: str) -> Run:
    return train_gemini(on_meta(CASES[name]), config_for("host", min_unit_nbytes=1 << 20))  # the coarsest layout


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize("name", CASES)
def test_a_meta_model_trains_the_same_for_every_placement_and_layout(name, tmp_path):
    run = train_gemini(on_meta(CASES[name]), config_for("mixed", tmp_path))
    assert run.losses == in_host(name).losses
    assert same_bits(run.weights, in_host(name).weights)


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize("name", CASES)
def test_a_meta_model_has_the_buffers_and_the_spread_of_one_built_as_usual(name):
    usual = CASES[name].model()
    with GeminiDDP(on_meta(CASES[name]).model(), config_for("host")) as engine:
        buffers = dict(engine.module.named_buffers())
        weights = engine.master_state_dict()
    assert same_bits(buffers, dict(usual.named_buffers()))
    for param_name, param in ((name, param) for name, param in usual.named_parameters() if param.numel() >= 32):
        assert weights[param_name].std(correction=0) == pytest.approx(float(param.std(correction=0)), rel=0.5, abs=1e-3)
        assert weights[param_name].mean() == pytest.approx(float(param.mean()), abs=0.1)


def test_the_seed_decides_the_weights_of_a_meta_model():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        config = GeminiConfig(device="cpu", dtype=torch.float32, host_budget="64MiB", seed=seed)
        with GeminiDDP(on_meta(CASES["llama"]).model(), config) as engine:
            return engine.master_state_dict()

    assert same_bits(weights(1), weights(1))
    assert not same_bits(weights(1), weights(2))


def test_building_an_engine_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    for case in (CASES["llama"], on_meta(CASES["llama"])):
        model = case.model()
        torch.manual_seed(3)
        with GeminiDDP(model, config_for("host")):
            assert torch.equal(torch.rand(4), expected)


def test_parameters_that_are_real_already_keep_their_values():
    model = on_meta(CASES["tower"]).model()
    real = nn.Parameter(torch.full((64, 32), 0.5))
    model.blocks[1].up.weight = real
    with GeminiDDP(model, config_for("host")) as engine:
        weights = engine.master_state_dict()
    assert (weights["blocks.1.up.weight"] == 0.5).all()
    assert weights["blocks.0.up.weight"].std() > 0.01


class Unfilled(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        if what == "parameter":
            self.scale = nn.Parameter(torch.ones(4))
        else:
            self.register_buffer("scale", torch.ones(4))


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_a_meta_tensor_that_nothing_fills_is_refused(what):
    with torch.device("meta"):
        model = Unfilled(what)
    with pytest.raises(ModelError, match=rf"{what} \.?scale was built on the meta device .* init_fn"):
        GeminiDDP(model, config_for("host"))


def test_init_fn_fills_what_the_model_does_not():
    def init(module: nn.Module) -> None:
        if isinstance(module, Unfilled):
            module.scale.fill_(3.0)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    with torch.device("meta"):
        model = Unfilled("parameter")
    with GeminiDDP(model, config_for("host"), init_fn=init) as engine:
        assert torch.equal(engine.state_dict()["scale"], torch.full((4,), 3.0))
