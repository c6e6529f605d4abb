"""What is counted ahead of training, beside what can be counted by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers

from gemini import GeminiConfig
from gemini.recipe.forecast import forecast_batch
from gemini.recipe.model import save_activation_memory

HIDDEN, INNER, LAYERS, VOCAB, LENGTH = 32, 64, 3, 272, 16


def build(*, is_frozen: bool = False) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    if is_frozen:
        model.requires_grad_(False)
        model.model.embed_tokens.requires_grad_()
    return model.train()


def matrices_flops() -> int:
    """Return twice the elements of the matrices that a token is multiplied with."""
    return 2 * (LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER) + VOCAB * HIDDEN)


@pytest.mark.parametrize("has_checkpoints", [False, True])
def test_operations_of_a_token_are_those_of_the_model_and_not_of_saving_memory(has_checkpoints: bool) -> None:
    model = build()
    found = forecast_batch(
        model,
        GeminiConfig(device="cpu", dtype=torch.float32),
        num_rows=2,
        sequence_length=LENGTH,
        save_memory=partial(save_activation_memory, model, has_checkpoints=has_checkpoints),
    )
    assert found is not None
    attention = LAYERS * 4 * LENGTH * HIDDEN  # scores, and their product with the values
    assert found.flops_per_token == pytest.approx(3 * matrices_flops() + 3.5 * attention, rel=0.01)
    trained = found.rehearsal.work
    again = trained.forward + trained.backward - 2 * LENGTH * found.flops_per_token
    assert (again > 0) is has_checkpoints


def test_frozen_weights_have_no_gradients_to_compute() -> None:
    model = build(is_frozen=True)
    config = GeminiConfig(device="cpu", dtype=torch.float32)
    found = forecast_batch(model, config, num_rows=1, sequence_length=LENGTH, save_memory=lambda: None)
    assert found is not None
    attention = LAYERS * 4 * LENGTH * HIDDEN
    assert found.flops_per_token == pytest.approx(2 * matrices_flops() + 3.5 * attention, rel=0.01)


def test_a_model_that_cannot_be_rehearsed_is_trained_all_the_same() -> None:
    class Peeking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Embedding(4, 4)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
            int(self.layer(input_ids).sum())

    called = []
    config = GeminiConfig(device="cpu", dtype=torch.float32)
    found = forecast_batch(Peeking(), config, num_rows=1, sequence_length=4, save_memory=lambda: called.append(True))
    assert found is None
    assert called == [True]
