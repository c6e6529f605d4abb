"""Which modules become units, on tiny models of many families, and that this is enough to run them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from gemini.chunk.layout import ChunkLayout, UnitSpec, build_layout
from gemini.chunk.units import choose_units, reachable_param_names
from gemini.model.module_tree import ModuleTree, describe_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SMALL_NBYTES = 600
"""Between a norm (128 bytes) and an embedding (3200 bytes) of the tiny models, in float32."""

IDS = torch.arange(8).view(1, 8)
PIXELS = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
BLOCK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "vocab_size": 50,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 32, "vocab_size": 50}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16, **NO_TOKENS))


def llama() -> nn.Module:
    config = hf.LlamaConfig(vocab_size=50, num_key_value_heads=1, **NO_TOKENS, **BLOCK)
    return hf.LlamaForCausalLM(config)


def opt() -> nn.Module:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            ffn_dim=8,
            num_attention_heads=2,
            vocab_size=50,
            word_embed_proj_dim=16,
            max_position_embeddings=16,
        )
    )


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=50, max_position_embeddings=16, **BLOCK))


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=16, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=50)
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **BLOCK))


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(vocab_size=50, num_local_experts=4, num_key_value_heads=2, **NO_TOKENS, **BLOCK)
    return hf.MixtralForCausalLM(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        **ENCODER_DECODER, **TOKENS, num_mel_bins=8, max_source_positions=16, max_target_positions=16
    )
    return hf.WhisperForConditionalGeneration(config)


def clip() -> nn.Module:
    text = {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 3, **BLOCK}
    vision = {"image_size": 32, "patch_size": 8, **BLOCK}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def swin() -> nn.Module:
    return hf.SwinForImageClassification(
        hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4)
    )


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2))


def resnet() -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def deberta() -> nn.Module:
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(max_position_embeddings=16, **RELATIVE, **BLOCK))


def albert() -> nn.Module:
    return hf.AlbertForMaskedLM(
        hf.AlbertConfig(vocab_size=50, embedding_size=8, max_position_embeddings=16, **BLOCK | {"num_hidden_layers": 3})
    )


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4, **NO_TOKENS)
    )


def torch_transformer() -> nn.Module:
    return nn.Transformer(16, 2, 2, 2, 8, batch_first=True)


def lora_llama() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


def compiled_blocks() -> nn.Module:
    model = llama()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


@dataclass(frozen=True)
class Case:
    """A tiny model, its inputs and the units expected beside the root."""

    build: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    units: str


TEXT = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
SEQUENCES = {"src": torch.linspace(-1, 1, 64).view(1, 4, 16), "tgt": torch.linspace(1, -1, 64).view(1, 4, 16)}
LLAMA_UNITS = "model.embed_tokens model.layers.0 model.layers.1 lm_head"
CASES = [
    Case(gpt2, TEXT, "transformer.wte transformer.wpe transformer.h.0 transformer.h.1 lm_head"),
    Case(llama, TEXT, LLAMA_UNITS),
    Case(
        opt,
        TEXT,
        "model.decoder.embed_tokens model.decoder.embed_positions model.decoder.layers.0 model.decoder.layers.1 "
        "lm_head",
    ),
    Case(bert, TEXT, "bert.embeddings bert.encoder.layer.0 bert.encoder.layer.1 cls"),
    Case(
        t5,
        BOTH,
        "shared encoder.embed_tokens encoder.block.0 encoder.block.1 "
        "decoder.embed_tokens decoder.block.0 decoder.block.1 lm_head",
    ),
    Case(vit, {"pixel_values": PIXELS}, "vit.embeddings vit.layers.0 vit.layers.1"),
    Case(mixtral, TEXT, LLAMA_UNITS),
    Case(
        whisper,
        {"input_features": torch.linspace(-1, 1, 8 * 32).view(1, 8, 32), "decoder_input_ids": IDS},
        "model.encoder.conv1 model.encoder.conv2 model.encoder.embed_positions model.encoder.layers.0 "
        "model.encoder.layers.1 model.decoder.embed_tokens model.decoder.embed_positions model.decoder.layers.0 "
        "model.decoder.layers.1 proj_out",
    ),
    Case(
        clip,
        {"input_ids": IDS, "pixel_values": PIXELS},
        "text_model.embeddings text_model.encoder.layers.0 text_model.encoder.layers.1 "
        "vision_model.embeddings vision_model.encoder.layers.0 vision_model.encoder.layers.1",
    ),
    Case(
        swin,
        {"pixel_values": PIXELS},
        "swin.embeddings swin.encoder.layers.0 swin.encoder.layers.1.blocks.0 swin.encoder.layers.1.blocks.1",
    ),
    Case(
        convnext,
        {"pixel_values": PIXELS},
        "convnext.embeddings convnext.encoder.stages.0.layers.0 convnext.encoder.stages.1.downsampling_layer.1 "
        "convnext.encoder.stages.1.layers.0 convnext.encoder.stages.1.layers.1",
    ),
    Case(
        resnet,
        {"pixel_values": PIXELS},
        "resnet.embedder.embedder resnet.encoder.stages.0.layers.0.layer.0 resnet.encoder.stages.0.layers.0.layer.1 "
        "resnet.encoder.stages.1.layers.0.shortcut resnet.encoder.stages.1.layers.0.layer.0 "
        "resnet.encoder.stages.1.layers.0.layer.1",
    ),
    Case(
        deberta,
        TEXT,
        "deberta.embeddings deberta.encoder.layer.0 deberta.encoder.layer.1 deberta.encoder.rel_embeddings pooler",
    ),
    Case(
        albert,
        TEXT,
        "albert.embeddings albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query "
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.key "
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.value "
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense predictions",
    ),
    Case(mamba, TEXT, "backbone.embeddings backbone.layers.0 backbone.layers.1 lm_head"),
    Case(torch_transformer, SEQUENCES, "encoder.layers.0 encoder.layers.1 decoder.layers.0 decoder.layers.1"),
    Case(lora_llama, TEXT, " ".join(f"base_model.model.{name}" for name in LLAMA_UNITS.split())),
    Case(compiled_blocks, TEXT, LLAMA_UNITS),
]


def describe(model: nn.Module) -> ModuleTree:
    return describe_model(model, working_dtype=torch.float32)


def units_of(model: nn.Module, *, max_small_nbytes: int = SMALL_NBYTES) -> list[str]:
    return list(choose_units(describe(model), max_small_nbytes=max_small_nbytes))


@pytest.fixture(params=CASES, ids=lambda case: case.build.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_units_of_known_models_are_their_blocks_embeddings_and_heads(case: Case) -> None:
    assert units_of(case.build()) == case.units.split()


def test_layout_does_not_depend_on_the_instance(case: Case) -> None:
    first = build_layout(describe(case.build()), max_small_nbytes=SMALL_NBYTES)
    second = build_layout(describe(case.build()), max_small_nbytes=SMALL_NBYTES)
    assert first == second


def test_each_module_finds_its_params_in_a_unit_around_it_or_in_the_root(case: Case) -> None:
    tree = describe(case.build())
    layout = build_layout(tree, max_small_nbytes=SMALL_NBYTES)
    unit_by_name = {unit.module_name: unit for unit in layout.units}
    pending = [("", set(layout.root.chunk_ids))]
    while pending:
        name, available = pending.pop()
        available = available | set(unit_by_name[name].chunk_ids if name in unit_by_name else ())
        node = tree.node_by_name[name]
        assert {layout.place_by_name[param].chunk_id for param in node.param_names} <= available, name
        pending.extend((child, available) for child in node.child_names)


def test_params_are_wholly_packed_each_once(case: Case) -> None:
    tree = describe(case.build())
    layout = build_layout(tree, max_small_nbytes=SMALL_NBYTES)
    names = Counter(place.spec.name for chunk in layout.chunks for place in chunk.places)
    assert names == Counter(entry.spec.name for entry in tree.params)


class Poison:
    """Keeps every weight NaN except in chunks whose unit is running: what an evicting runtime would do."""

    def __init__(self, model: nn.Module, layout: ChunkLayout) -> None:
        self.params = dict(model.named_parameters())
        self.saved = {name: param.detach().clone() for name, param in self.params.items()}
        self.layout = layout
        self.holds: Counter[int] = Counter()
        for param in self.params.values():
            param.data.fill_(torch.nan)
        self.enter(layout.root)
        for unit in layout.units[1:]:
            module = model.get_submodule(unit.module_name)
            module.register_forward_pre_hook(lambda *_, unit=unit: self.enter(unit))
            module.register_forward_hook(lambda *_, unit=unit: self.leave(unit))

    def enter(self, unit: UnitSpec) -> None:
        for chunk_id in unit.chunk_ids:
            self.holds[chunk_id] += 1
            for place in self.layout.chunks[chunk_id].places:
                self.params[place.spec.name].data.copy_(self.saved[place.spec.name])

    def leave(self, unit: UnitSpec) -> None:
        for chunk_id in unit.chunk_ids:
            self.holds[chunk_id] -= 1
            if self.holds[chunk_id] == 0:
                for place in self.layout.chunks[chunk_id].places:
                    self.params[place.spec.name].data.fill_(torch.nan)


def first_output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.to_tuple()[0]


# DeBERTa's encoder reads the weight of a unit that it never calls. Fetching it on that use is up to the hooks of the
# engine, which are not part of this test.
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.build is not deberta], ids=lambda case: case.build.__name__
)
def test_forward_needs_no_weight_outside_the_units_it_is_in(case: Case) -> None:
    assert_runs_poisoned(case.build().eval(), case.inputs)


def test_training_forward_of_torch_transformer_needs_no_weight_outside_its_units() -> None:
    # Its evaluation path reads the children's weights directly, its training path calls the children.
    assert_runs_poisoned(torch_transformer().train(), SEQUENCES)


def assert_runs_poisoned(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for param in module.parameters(recurse=False):
            nn.init.normal_(param, std=0.1)
    expected = run_seeded(model, inputs)
    Poison(model, build_layout(describe(model), max_small_nbytes=SMALL_NBYTES))
    assert torch.equal(run_seeded(model, inputs), expected)
    assert not expected.isnan().any()


def run_seeded(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return first_output(model, inputs)


class Block(nn.Module):
    """A block with a small Sequential and a row of experts inside."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.experts = nn.ModuleList(Expert() for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((expert(x) for expert in self.experts), self.mlp(x))


class Expert(nn.Module):
    """Two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Stage(nn.Module):
    """A row of experts behind a downsampling."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.down = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Expert() for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return x


class Tower(nn.Module):
    """A row of blocks that are made of modules themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Stage(1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_block_is_not_split_by_the_rows_inside_it() -> None:
    assert units_of(nn.Sequential(*(Block() for _ in range(3)))) == ["0", "1", "2"]


def test_blocks_are_not_split_where_only_some_hold_experts() -> None:
    assert units_of(nn.ModuleList([Block(0), Block(8), Block(8)])) == ["0", "1", "2"]


def test_stages_of_a_pyramid_are_cut_into_their_blocks() -> None:
    units = units_of(nn.Sequential(Stage(2), Stage(6)), max_small_nbytes=2000)
    assert units == ["0.blocks.0", "0.blocks.1", *(f"1.blocks.{index}" for index in range(6))]


def test_plain_sequential_has_a_unit_for_each_layer() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    assert units_of(model) == ["0", "2", "4"]


def test_norms_between_convolutions_belong_to_the_root() -> None:
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())]
    assert units_of(nn.Sequential(*layers)) == ["0", "3", "6"]


def test_nested_sequential_is_cut_at_its_groups() -> None:
    def group() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())

    model = nn.Sequential(nn.Sequential(group(), group()), nn.Sequential(group(), group()), nn.Linear(16, 16))
    assert units_of(nn.Sequential(group(), group(), nn.Linear(16, 16))) == ["0", "1", "2"]
    assert units_of(model) == ["0", "1", "2"]


def test_sequential_of_sequentials_of_blocks_is_cut_into_blocks() -> None:
    model = nn.Sequential(nn.Sequential(Expert(), Expert()), nn.Sequential(Expert(), Expert()))
    assert units_of(model) == ["0.0", "0.1", "1.0", "1.1"]


def test_row_of_towers_is_cut_into_the_blocks_of_each() -> None:
    units = units_of(nn.ModuleDict({"image": Tower(), "text": Tower()}))
    assert units == [f"{tower}.blocks.{index}" for tower in ("image", "text") for index in range(3)]


def test_single_leaf_is_the_root_unit_alone() -> None:
    assert units_of(nn.Linear(64, 64)) == []


def test_attention_is_never_cut() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.first = nn.Linear(16, 16)
            self.second = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.attention(x, x, x)[0]))

    assert units_of(Model()) == ["attention", "first", "second"]


def test_modules_read_by_their_parent_are_units_like_any_other() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(16, 16)
            self.table = nn.Embedding(50, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) @ self.table.weight.T

    assert units_of(Model()) == ["body", "table"]


def test_module_under_two_names_is_one_unit_at_the_first() -> None:
    block = Expert()
    model = nn.ModuleDict({"first": nn.ModuleList([block, Expert()]), "second": nn.ModuleList([Expert(), block])})
    assert units_of(model) == ["first.0", "first.1", "second.0"]


def test_small_head_in_a_sequential_belongs_to_the_root() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    assert units_of(Model(), max_small_nbytes=1000) == ["blocks.0", "blocks.1"]


def test_reachable_params_are_in_parameter_order() -> None:
    tree = describe(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert reachable_param_names(tree, "") == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert reachable_param_names(tree, "1") == ("1.weight", "1.bias")
