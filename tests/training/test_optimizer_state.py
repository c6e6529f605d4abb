"""What an optimizer starts from: loaded state, state that a checkpoint lacks, and another optimizer's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_zoo import HF_CASES
from training_harness import Case, config_for, distance, hybrid_adam, plain_adamw, step

from gemini import GeminiDDP

CASE = HF_CASES["gpt2"]


def moments(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    return optimizer.state_dict()["state"]


def weights_of_plain(case: Case, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return torch.optim.AdamW's weights of three steps: one, then `state` is loaded, then two."""
    model = case.model()
    optimizer = plain_adamw(model.parameters())
    for index, batch in enumerate(case.batches(3)):
        if index == 1:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(state)})
        step(model, optimizer, case, batch)
    return model.state_dict()


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
@pytest.mark.parametrize("kept", [0, 1])
def test_parameters_that_a_checkpoint_has_no_state_of_start_anew(place, kept, tmp_path):
    """A checkpoint from before the first step, or of parameters some of which had never had a gradient."""
    with GeminiDDP(CASE.model(), config_for(place, tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for index, batch in enumerate(CASE.batches(3)):
            if index == 1:
                saved = optimizer.state_dict()
                saved["state"] = {key: saved["state"][key] for key in list(saved["state"])[:kept]}
                expected = weights_of_plain(CASE, saved["state"])
                optimizer.load_state_dict(saved)
            step(engine, optimizer, CASE, batch)
        found = engine.master_state_dict()
    assert distance(found, {name: expected[name] for name in found}) < 1e-6


def test_a_new_optimizer_keeps_nothing_that_an_earlier_one_loaded():
    batch = CASE.batches(1)[0]
    with GeminiDDP(CASE.model(), config_for("host")) as engine:
        step(engine, first := hybrid_adam(engine.parameters()), CASE, batch)
        expected = moments(first)
    with GeminiDDP(CASE.model(), config_for("host")) as engine:
        hybrid_adam(engine.parameters()).load_state_dict(first_state(expected, engine))
        step(engine, second := hybrid_adam(engine.parameters()), CASE, batch)
        found = moments(second)
    assert all(torch.equal(found[key]["exp_avg_sq"], expected[key]["exp_avg_sq"]) for key in expected)


def first_state(state: dict[int, Any], engine: GeminiDDP) -> dict[str, Any]:
    return {**hybrid_adam(engine.parameters()).state_dict(), "state": state}


def test_a_scheduler_resumes_from_loaded_groups():
    with GeminiDDP(CASE.model(), config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        step(engine, optimizer, CASE, CASE.batches(1)[0])
        scheduler.step()
        saved = optimizer.state_dict()
        resumed = hybrid_adam(engine.parameters())
        resumed.load_state_dict(saved)
        torch.optim.lr_scheduler.LambdaLR(resumed, lambda epoch: 0.5**epoch, last_epoch=0)
        initial = optimizer.param_groups[0]["initial_lr"]
        assert resumed.param_groups[0]["initial_lr"] == initial
        assert resumed.param_groups[0]["lr"] == 0.5 * initial


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
def test_a_run_goes_over_to_torch_and_back(place, tmp_path):
    """Six steps of AdamW: torch's, engine's, torch's in turn, two each, beside torch's alone."""
    batches = CASE.batches(6)
    straight = CASE.model()
    reference = plain_adamw(straight.parameters())
    for batch in batches:
        step(straight, reference, CASE, batch)

    plain = CASE.model()
    adamw = plain_adamw(plain.parameters())
    for batch in batches[:2]:
        step(plain, adamw, CASE, batch)
    with GeminiDDP(copy.deepcopy(plain), config_for(place, tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters(), lr=0.5)
        optimizer.load_state_dict(adamw.state_dict())
        for batch in batches[2:4]:
            step(engine, optimizer, CASE, batch)
        plain.load_state_dict(engine.master_state_dict())
        adamw.load_state_dict(optimizer.state_dict())
    for batch in batches[4:]:
        step(plain, adamw, CASE, batch)

    assert distance(plain.state_dict(), straight.state_dict()) < 1e-6
    found = moments(adamw)
    for index, expected in moments(reference).items():
        assert found[index]["step"] == 6
        assert distance(found[index], expected) < 1e-5
