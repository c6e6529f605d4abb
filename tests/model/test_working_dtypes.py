"""An engine makes of a model's dtypes what model.to(dtype) and transformers' from_pretrained make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import gemini
from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement
from gemini.model.working_dtypes import choose_dtypes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL_ON_DISK = StaticPlacement(param_nvme=1, state_nvme=1, grad_nvme=1)


def config(dtype: torch.dtype, directory: Path | None = None, **fields: Any) -> GeminiConfig:
    if directory is not None:
        fields |= {"nvme": NVMeConfig(path=directory, budget="64MiB"), "placement": ALL_ON_DISK, "min_unit_nbytes": 0}
    return GeminiConfig(device="cpu", dtype=dtype, host_budget="64MiB", num_threads=1, tile_numel=4096, **fields)


# ---------------------------------------------------------------------- transformers


def llama_shape(**fields: Any) -> dict[str, Any]:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {"vocab_size": 64, "num_key_value_heads": 4, **shape, **fields}


DEEPSEEK = transformers.DeepseekV3Config(
    **llama_shape(moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2),
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_shape())),
    "deepseek": lambda: transformers.DeepseekV3ForCausalLM(DEEPSEEK),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **llama_shape(head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2)
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
    # Tables that are not persistent and are made in the default dtype.
    "m2m": lambda: transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(
            vocab_size=64,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
        )
    ),
    # Tables that are not persistent and are made in float32.
    "gpt-j": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64)
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_dtypes_are_those_of_from_pretrained(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    right = dtypes_of(type(model).from_pretrained(tmp_path, dtype=dtype))
    chosen = choose_dtypes(model, dtype)
    assert chosen.params | chosen.buffers == right
    with GeminiDDP(model, config(dtype)):
        assert dtypes_of(model) == right
    with gemini.load_pretrained(tmp_path, config(dtype), model_class=type(model)) as engine:
        assert dtypes_of(engine.module) == right


def test_what_these_models_keep_in_float32_is_known() -> None:
    """So that the test above cannot pass because nothing is kept any more."""
    found = {(name, dtype): choose_dtypes(MODELS[name](), dtype) for name in MODELS for dtype in (BF16, FP16)}
    kept = {key: {n for n, d in chosen.params.items() if d is FP32} for key, chosen in found.items()}
    assert kept["deepseek", BF16] == kept["deepseek", FP16] == {"model.layers.1.mlp.gate.weight"}
    assert not kept["gpt-oss", BF16]
    assert len(kept["gpt-oss", FP16]) == 5
    assert not kept["t5", BF16]
    assert len(kept["t5", FP16]) == 4
    assert found["deepseek", BF16].buffers["model.layers.1.mlp.gate.e_score_correction_bias"] is FP32


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_names_are_found_through_adapters() -> None:
    model = peft.get_peft_model(MODELS["deepseek"](), peft.LoraConfig(target_modules=["q_a_proj"]))
    chosen = choose_dtypes(model, BF16)
    assert {name for name, dtype in chosen.params.items() if dtype is FP32} == {
        "base_model.model.model.layers.1.mlp.gate.weight"
    }
    assert chosen.buffers["base_model.model.model.rotary_emb.inv_freq"] is FP32


def test_a_module_that_an_adapter_wraps_is_known_by_its_own_name() -> None:
    model = Positions()
    model._keep_in_fp32_modules_strict = ["out.weight"]  # type: ignore[assignment]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["out"]))
    kept = {name for name, dtype in choose_dtypes(wrapped, BF16).params.items() if dtype is FP32}
    assert kept == {"base_model.model.out.base_layer.weight"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_base_that_was_cast_keeps_its_buffers_beside_float32_adapters(tmp_path: Path) -> None:
    MODELS["deepseek"]().save_pretrained(tmp_path)
    base = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    right = {name: buffer.dtype for name, buffer in base.named_buffers()}
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_a_proj"]))
    assert choose_dtypes(model, BF16).buffers == {f"base_model.model.{name}": dtype for name, dtype in right.items()}


def ids() -> torch.Tensor:
    return torch.arange(32).view(4, 8)


def train(engine: GeminiDDP, num_steps: int = 3, *, optimizer: HybridAdam | None = None) -> list[float]:
    optimizer = optimizer or HybridAdam(engine.parameters(), lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = engine(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def deepseek() -> Any:
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(DEEPSEEK)
    model.model.layers[1].mlp.gate.e_score_correction_bias.uniform_(-1e-3, 1e-3)
    return model


@pytest.mark.parametrize("accumulation", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_chunks_of_two_dtypes_train_alike_in_all_places(dtype: torch.dtype, accumulation: bool, tmp_path: Path) -> None:
    found = []
    for directory in (None, tmp_path):
        with GeminiDDP(deepseek(), config(dtype, directory, gradient_accumulation=accumulation)) as engine:
            losses = train(engine)
            for tier in engine.memory_report().tiers:
                assert sum(tier.held_nbytes.values()) == sum(tier.planned_nbytes.values())
            found.append((losses, engine.master_state_dict()))
    (losses, weights), (others, other_weights) = found
    assert losses == others
    assert losses[-1] < losses[0]
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_a_weight_kept_in_float32_is_used_and_trained_at_full_precision() -> None:
    gate = "model.layers.1.mlp.gate.weight"
    with GeminiDDP(deepseek(), config(BF16)) as engine:
        assert torch.equal(engine.state_dict()[gate], deepseek().state_dict()[gate])
        train(engine)
        state, masters = engine.state_dict(), engine.master_state_dict()
    assert torch.equal(state[gate], masters[gate])
    assert not torch.equal(state[gate], state[gate].bfloat16().float())


def test_saved_and_loaded_dtypes_are_those_in_use(tmp_path: Path) -> None:
    with GeminiDDP(deepseek(), config(BF16)) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-2)
        train(engine, optimizer=optimizer)
        engine.save_pretrained(tmp_path / "model")
        engine.save_checkpoint(tmp_path / "run")
        state, losses = engine.state_dict(), train(engine, 1, optimizer=optimizer)
    right = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "model", dtype=BF16)
    assert {name: value.dtype for name, value in state.items()} == {
        name: value.dtype for name, value in right.state_dict().items()
    }
    assert all(torch.equal(state[name], value) for name, value in right.state_dict().items())
    with gemini.load_pretrained(tmp_path / "model", config(BF16)) as engine:
        found = engine.state_dict()
    assert all(found[name].dtype is state[name].dtype and torch.equal(found[name], state[name]) for name in state)
    with GeminiDDP(deepseek(), config(BF16)) as engine:
        engine.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())
    with GeminiDDP(deepseek(), config(BF16)) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-2)
        engine.load_checkpoint(tmp_path / "run")
        assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())
        assert train(engine, 1, optimizer=optimizer) == losses


# ---------------------------------------------------------------------- other models


class Positions(nn.Module):
    """Layers with a table between them."""

    def __init__(self, *, persistent: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("table", torch.linspace(0, 1, 16, dtype=dtype), persistent=persistent)
        self.register_buffer("order", torch.arange(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((self.up(x) + self.table).to(x.dtype)[..., self.order])  # type: ignore[no-any-return, operator, index]


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


def statistics_only() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4, affine=False)), nn.Conv2d(4, 4, 1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "positions": (Positions, (2, 16)),
    "batch norm": (convolution, (2, 3, 6, 6)),
    "batch norm without weights": (statistics_only, (2, 3, 6, 6)),
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("before", [FP32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_persistent_buffers_are_cast_as_model_to_casts_them(
    name: str, dtype: torch.dtype, before: torch.dtype, is_training: bool
) -> None:
    build, shape = CASES[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    # Weights beside are those that both may have: what the engine rounds half-way up is rounded before.
    right = build().to(before).to(dtype).train(is_training)
    model = build().to(before).train(is_training)
    for param, other in zip(model.parameters(), right.parameters(), strict=True):
        param.data.copy_(other)
    with GeminiDDP(model, config(dtype)) as engine:
        expected, found = right(x), engine(x)
        assert found.dtype is dtype
        assert torch.equal(found, expected)
        for key, value in right.state_dict().items():
            assert engine.state_dict()[key].dtype is value.dtype
            assert torch.equal(engine.state_dict()[key], value)


def test_a_float32_table_that_is_not_persistent_stays() -> None:
    model = Positions(persistent=False)
    exact = model.table.clone()  # type: ignore[operator]
    with GeminiDDP(model, config(BF16)) as engine:
        assert engine(torch.ones(2, 16, dtype=BF16)).dtype is BF16
        assert torch.equal(model.table, exact)  # type: ignore[arg-type]


def test_a_model_that_was_cast_before_keeps_float32_buffers() -> None:
    model = Positions().to(BF16)
    model.table = torch.linspace(0, 1, 16)
    with GeminiDDP(model, config(BF16)):
        assert model.table.dtype is FP32


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_any_module_may_say_what_stays_float32(dtype: torch.dtype, attribute: str) -> None:
    model = Positions()
    setattr(model, attribute, ["tab*e", "out"])
    kept = FP32 if dtype is FP16 or attribute.endswith("strict") else dtype
    with GeminiDDP(nn.Sequential(model), config(dtype)):
        assert dtypes_of(model) == {
            **{"up.weight": dtype, "up.bias": dtype, "out.weight": kept, "out.bias": kept},
            **{"table": kept, "order": torch.int64},
        }


def test_a_buffer_of_several_modules_stays_one() -> None:
    model = nn.Sequential(Positions(), Positions())
    model[1].table = model[0].table
    with GeminiDDP(model, config(BF16)):
        assert model[0].table.dtype is BF16
        assert model[1].table is model[0].table


def test_meta_buffers_are_filled_before_they_are_cast() -> None:
    def fill(module: nn.Module) -> None:
        if isinstance(module, Positions):
            module.table.copy_(torch.linspace(0, 1, 16))  # type: ignore[operator]
            module.order.copy_(torch.arange(16))  # type: ignore[operator]
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    with torch.device("meta"):
        model = Positions()
    with GeminiDDP(model, config(BF16), init_fn=fill):
        assert torch.equal(model.table, torch.linspace(0, 1, 16).to(BF16))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- weights that are never cast

KEPT = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
KEPT += [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool]


class Scaled(nn.Module):
    """A linear layer whose frozen weight is stored in another dtype, with a trained scale for each row."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(0, 3, (64, 64), generator=generator).float()
        self.weight = nn.Parameter(values.to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(64, generator=generator))
        self.seen: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(self.weight.dtype)
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.parametrize("is_on_disk", [False, True])
@pytest.mark.parametrize("dtype", KEPT, ids=str)
def test_frozen_weights_of_other_dtypes_keep_them_everywhere(
    dtype: torch.dtype, is_on_disk: bool, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Scaled(dtype), Scaled(dtype))

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().view(torch.uint8)

    model, right = build(), build()[0].weight
    fields = config(FP32, tmp_path if is_on_disk else None)
    with GeminiDDP(model, fields) as engine:
        chunks = [chunk for chunk in engine.runtime.layout.chunks if not chunk.is_trainable]
        assert {chunk.dtype for chunk in chunks} == {dtype}
        assert sum(chunk.working_nbytes for chunk in chunks) == 2 * 64 * 64 * dtype.itemsize
        optimizer = HybridAdam(engine.parameters(), lr=1e-2)
        plain = build()
        for _ in range(2):
            engine(torch.ones(2, 64)).sum().backward()
            optimizer.step()
        assert torch.equal(bits(engine.state_dict()["0.weight"]), bits(right))
        engine.load_state_dict({**engine.state_dict(), "1.weight": torch.zeros(64, 64).to(dtype)})
        assert not bits(engine.state_dict()["1.weight"]).any() or dtype is torch.float8_e8m0fnu
        engine.load_state_dict({**engine.state_dict(), "1.weight": right})
        assert model[0].seen == {dtype}
        engine.save_checkpoint(tmp_path / "run")
        engine.save_pretrained(tmp_path / "model", dtype="bfloat16")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved["0.weight"].dtype is dtype
    assert torch.equal(bits(saved["0.weight"]), bits(right))
    with torch.no_grad():
        plain[0].weight.copy_(torch.zeros(64, 64).to(dtype))
    with GeminiDDP(plain, config(FP32), weights=tmp_path / "model") as engine:
        assert torch.equal(bits(engine.state_dict()["0.weight"]), bits(right))
        optimizer = HybridAdam(engine.parameters(), lr=1e-2)
        engine.load_state_dict({**engine.state_dict(), "0.weight": torch.zeros(64, 64).to(dtype)})
        engine.load_checkpoint(tmp_path / "run")
        assert torch.equal(bits(engine.state_dict()["0.weight"]), bits(right))
