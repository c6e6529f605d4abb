"""A graph whose weights have been updated since its forward is refused, as plain torch refuses it."""

from __future__ import annotations

import pytest
import torch
from model_zoo import HF_CASES
from torch_says import refusal_of
from training_harness import config_for, hybrid_adam, plain_adamw

from gemini import GeminiDDP, ModelError

GPT2 = HF_CASES["gpt2"]


def older_loss_backward(model, optimizer) -> None:
    older, newer = (GPT2.loss(model(**batch)) for batch in GPT2.batches(2))
    newer.backward()
    optimizer.step()
    older.backward()


def test_plain_torch_refuses_a_graph_older_than_the_update():
    model = GPT2.model()

    def spoil() -> None:
        saved = torch.zeros(2, requires_grad=True).exp()
        with torch.no_grad():
            saved += 1
        saved.sum().backward()

    with pytest.raises(RuntimeError, match=refusal_of(spoil)):
        older_loss_backward(model, plain_adamw(model.parameters()))


@pytest.mark.parametrize("place", ["host", "nvme", "device", "resident"])
def test_a_graph_older_than_the_update_is_refused_wherever_weights_live(place, tmp_path):
    with (
        GeminiDDP(GPT2.model(), config_for(place, tmp_path)) as engine,
        pytest.raises(ModelError, match=r"weights have changed since its forward: chunk \d+ .* was updated 1 times"),
    ):
        older_loss_backward(engine, hybrid_adam(engine.parameters()))
