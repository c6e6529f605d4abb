"""transformers' causal language models with the sliced loss: same losses, same gradients, no logits."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from live_storages import LiveStorages

import gemini.nn
from gemini import GeminiConfig, GeminiDDP, HybridAdam, ModelError, NVMeConfig, StaticPlacement

hf = pytest.importorskip("transformers")

VOCAB, HIDDEN, SEQ = 96, 32, 12
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, **NO_DROPOUT},
    "gptj": {**GPT2, **NO_DROPOUT, "rotary_dim": 4, "n_positions": 32},  # its output layer has a bias
    "llama": SHAPE,
    "qwen2": {**SHAPE, "tie_word_embeddings": True},
    "mistral": SHAPE,
    "mixtral": {**SHAPE, **EXPERTS},  # adds the router's loss
    "gemma2": {**SHAPE, "head_dim": 8, "final_logit_softcapping": 5.0},
    "cohere": {**SHAPE, "logit_scale": 0.5},
    "granite": {**SHAPE, "logits_scaling": 3.0},
    "opt": {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": HIDDEN, "dropout": 0.0},
}


def build(name: str = "gpt2", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(name, **{**CONFIGS[name], **changes})
    model = hf.AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(4)  # else all logits are nearly zero, and soft capping does nothing
    return model


def batch(num_rows: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (num_rows, SEQ), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> None:
    """Compare to 64 units in the last place of the largest number, or of `scale`: sums of about a hundred terms."""
    largest = float(expected.detach().abs().max()) if scale is None else scale
    assert float((found - expected).detach().abs().max()) <= 64 * torch.finfo(torch.float32).eps * largest


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare to the largest gradient of all: some (the bias of attention keys) are nothing but rounding."""
    assert [name for name in found if found[name] is None] == [name for name in expected if expected[name] is None]
    grads = {name: grad for name, grad in expected.items() if grad is not None}
    scale = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        assert_close(found[name], grad, scale)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize(("slicing", "slice_size"), [("rows", 5), ("vocabulary", 17)])
def test_loss_and_gradients_are_the_models_own(name: str, slicing: Any, slice_size: int, keep_logits: bool) -> None:
    model = build(name)
    expected = model(**batch())
    expected.loss.backward()
    wanted = gradients(model)

    gemini.nn.use_sliced_loss(model, slicing=slicing, slice_size=slice_size, keep_logits=keep_logits)
    output = model(**batch())
    output.loss.backward()

    assert output.logits is None
    assert "logits" not in output
    assert output.loss.dtype is expected.loss.dtype
    assert_close(output.loss, expected.loss)
    assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("num_items", [7, torch.tensor(7)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_num_items_in_batch_is_honoured(name: str, num_items: Any) -> None:
    model = build(name)
    expected = model(**batch(), num_items_in_batch=num_items).loss
    assert expected != model(**batch()).loss

    gemini.nn.use_sliced_loss(model)

    assert_close(model(**batch(), num_items_in_batch=num_items).loss, expected.detach())


def test_labels_that_are_shifted_already_are_honoured() -> None:
    model, inputs = build("llama"), batch()
    shifted = torch.randint(0, VOCAB, inputs["labels"].shape, generator=torch.Generator().manual_seed(4))
    expected = model(**inputs, shift_labels=shifted).loss

    gemini.nn.use_sliced_loss(model)

    assert_close(model(**inputs, shift_labels=shifted).loss, expected.detach())


def test_positional_labels_tuples_and_signature_stay() -> None:
    model = build()
    ids, labels = batch().values()
    parameters = inspect.signature(model.forward).parameters
    position = list(parameters).index("labels")
    expected = model(ids, return_dict=False, use_cache=False, labels=labels)

    gemini.nn.use_sliced_loss(model)
    output = model(ids, *[None] * (position - 1), labels, use_cache=False, return_dict=False)

    assert inspect.signature(model.forward).parameters == parameters
    assert len(output) == len(expected) - 1
    assert_close(output[0], expected[0])


def test_without_labels_nothing_changes() -> None:
    model, ids = build().eval(), batch()["input_ids"]
    expected = model(ids).logits
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)

    gemini.nn.use_sliced_loss(model)

    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)


def test_a_failing_forward_leaves_the_model_whole() -> None:
    model = build()
    gemini.nn.use_sliced_loss(model)
    inputs = batch()
    inputs["labels"][0, 5] = VOCAB
    with pytest.raises(IndexError, match="outside the vocabulary"):
        model(**inputs)

    assert model(inputs["input_ids"]).logits.shape == (2, SEQ, VOCAB)


def test_the_plain_loss_can_be_had_back() -> None:
    model = build()
    expected = model(**batch())
    gemini.nn.use_sliced_loss(model)
    gemini.nn.use_sliced_loss(model, slicing="rows", slice_size=2)

    gemini.nn.use_plain_loss(model)

    assert "forward" not in vars(model)
    assert torch.equal(model(**batch()).logits, expected.logits)


def test_a_copy_of_the_model_computes_with_its_own_weights() -> None:
    model = build()
    gemini.nn.use_sliced_loss(model)
    twin = copy.deepcopy(model)
    expected = model(**batch()).loss
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()

    assert torch.equal(twin(**batch()).loss, expected)
    assert not torch.equal(model(**batch()).loss, expected)


def test_logits_are_never_whole() -> None:
    model, num_rows = build(vocab_size=4000), 16
    inputs = batch(num_rows)
    gemini.nn.use_sliced_loss(model, slicing="vocabulary", slice_size=100)

    with LiveStorages(*model.parameters()) as live:
        model(**inputs).loss.backward()

    assert live.largest_nbytes <= 4 * 4000 * HIDDEN < 4 * num_rows * SEQ * 4000


# ---------------------------------------------------------------- refusals


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="GPT2Model: expected a causal language model"):
        gemini.nn.use_sliced_loss(build().transformer)


def test_an_output_layer_that_is_no_linear_is_refused() -> None:
    model = build()
    model.lm_head = torch.nn.Sequential(model.lm_head)

    with pytest.raises(ModelError, match="GPT2LMHeadModel: expected an output layer .* got Sequential"):
        gemini.nn.use_sliced_loss(model)


def test_another_loss_is_refused() -> None:
    model = build()
    model.loss_function = torch.nn.functional.mse_loss

    with pytest.raises(ModelError, match="GPT2LMHeadModel: its loss is mse_loss"):
        gemini.nn.use_sliced_loss(model)


def test_a_loss_that_takes_more_than_is_known_is_refused() -> None:
    """As a next version of transformers may have it: left out, the argument would change the loss unnoticed."""

    def ForCausalLMLoss(logits, labels, vocab_size, label_smoothing=0.1, **kwargs):
        raise AssertionError

    model = build()
    model.loss_function = ForCausalLMLoss
    with pytest.raises(ModelError, match="GPT2LMHeadModel: its loss takes label_smoothing, which is unknown here"):
        gemini.nn.use_sliced_loss(model)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda logits: logits + 1, "does arithmetic on its logits"),
        (lambda logits: 1 / logits, "does arithmetic on its logits"),
        (lambda logits: logits[..., :-1, :], r"reads logits\[...\]"),
        (lambda logits: logits.view(-1, VOCAB), "reads logits.view"),
        (lambda logits: logits * torch.ones(VOCAB), "scales its logits by something other than a number"),
        (lambda logits: logits / torch.ones((), requires_grad=True), "scales its logits by a trainable tensor"),
        (lambda logits: torch.softmax(logits, -1), "calls softmax on its logits"),
        (lambda logits: torch.tensor(1.0) + logits, "calls .*add.* on its logits"),
    ],
)
def test_a_model_that_needs_its_logits_is_refused_by_name(use: Any, message: str) -> None:
    model = build("llama")
    gemini.nn.use_sliced_loss(model)

    model.forward._loss = lambda logits, **_: use(logits)  # as if the model's own code did it

    with pytest.raises(ModelError, match=f"LlamaForCausalLM {message}.*linear_cross_entropy"):
        model(**batch())


# ---------------------------------------------------------------- wrapped


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # peft's calls
def test_peft_before_and_after() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)

    def wrapped() -> Any:
        model = build("llama")
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    plain, before, after = wrapped(), build("llama"), wrapped()
    gemini.nn.use_sliced_loss(before)
    torch.manual_seed(3)
    before = peft.get_peft_model(before, config)
    gemini.nn.use_sliced_loss(after)
    expected = plain(**batch())
    expected.loss.backward()
    wanted = gradients(plain)

    for model in (before, after):
        output = model(**batch())
        output.loss.backward()
        assert output.logits is None
        assert_close(output.loss, expected.loss)
        assert_same_gradients(gradients(model), wanted)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_an_adapter_on_the_output_layer_is_refused_rather_than_left_out() -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    gemini.nn.use_sliced_loss(model)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))

    with pytest.raises(ModelError, match="LlamaForCausalLM: expected an output layer"):
        model(**batch())


def train(engine: Any, optimizer: Any, num_steps: int = 3) -> list[float]:
    losses = []
    for seed in range(num_steps):
        loss = engine(**batch(seed=seed), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["host", "nvme", "device"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_training_under_the_engine_learns_as_plain_torch_does(name: str, place: str, when: str, tmp_path: Any) -> None:
    """GPT-2's and Gemma's output layers are tied to the embedding; blocks are checkpointed."""
    placements: dict[str, Any] = {
        "host": {"device": "cpu"},
        "nvme": {
            "device": "cpu",
            "nvme": NVMeConfig(path=tmp_path, budget="64MiB", direct=False),
            "placement": StaticPlacement(param_nvme=1, state_nvme=1, grad_nvme=1),
        },
        "device": {"device": "simulated", "placement": StaticPlacement(), "device_budget": "64MiB"},
    }
    config = GeminiConfig(
        dtype=torch.float32,
        host_budget="128MiB",
        tile_numel=4096,
        min_unit_nbytes=0,
        num_threads=2,
        **placements[place],
    )
    plain, model = build(name), build(name)
    for each in (plain, model):
        enable = getattr(each, "activation_checkpointing_enable", None) or each.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    gemini.nn.use_sliced_loss(plain, slice_size=17)
    if when == "before":
        gemini.nn.use_sliced_loss(model, slice_size=17)

    with GeminiDDP(model, config) as engine:
        if when == "after":
            gemini.nn.use_sliced_loss(engine, slice_size=17)
        losses = train(engine, HybridAdam(engine.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.1))
        found = engine.master_state_dict()

    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.1))
    assert losses[0] == expected[0]
    assert losses == pytest.approx(expected, rel=1e-6)
    differences = [(found[key] - value).norm() for key, value in plain.state_dict().items()]
    assert torch.stack(differences).norm() <= 1e-6 * torch.stack([value.norm() for value in found.values()]).norm()
