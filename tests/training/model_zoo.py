"""Tiny models of many families, Hugging Face's and hand-written ones with awkward habits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from training_harness import Case

VOCAB, SEQ, HIDDEN, BATCH = 128, 16, 32, 2


def quiet(config: Any, dropout: float = 0.0) -> Any:
    """Set every dropout of a Hugging Face configuration, nested ones included."""
    for name, value in list(vars(config).items()):
        if isinstance(value, hf.PretrainedConfig):
            quiet(value, dropout)
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, dropout)
    return config


def ids(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(5, VOCAB, (BATCH, SEQ), generator=generator)


def text_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    tokens = ids(generator)
    return {"input_ids": tokens, "labels": tokens}


def image_batch(generator: torch.Generator, size: int = 16) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, 4, (BATCH,), generator=generator)
    return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=generator), "labels": labels}


def clip_batch(generator: torch.Generator) -> dict[str, Any]:
    tokens = ids(generator)
    tokens[:, -1] = VOCAB - 1
    pixels = torch.randn(BATCH, 3, 16, 16, generator=generator)
    return {"input_ids": tokens, "pixel_values": pixels, "return_loss": True}


def speech_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(BATCH, 8, 2 * SEQ, generator=generator), "labels": ids(generator)}


def vector_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(BATCH, SEQ, HIDDEN, generator=generator)}


def token_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": ids(generator)}


def picture_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(4, 3, 16, 16, generator=generator)}


def square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


# ---------------------------------------------------------------- Hugging Face

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
VISION = {"image_size": 16, "patch_size": 8, "num_channels": 3, **ENCODER}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True}


def hf_case(model_name: str, config_name: str, batch: Any = text_batch, **fields: Any) -> Case:
    dropout = fields.pop("dropout", 0.0)

    def build() -> nn.Module:
        return getattr(hf, model_name)(quiet(getattr(hf, config_name)(**fields), dropout))

    return Case(build, batch)


def clip_config(**fields: Any) -> dict[str, Any]:
    text = {**ENCODER, "eos_token_id": VOCAB - 1}
    return {"text_config": text, "vision_config": VISION, "projection_dim": 16, **fields}


GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 3, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
CONVNEXT = {"num_channels": 3, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "num_labels": 4}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

HF_CASES = {
    "gpt2": hf_case("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt2_dropout": hf_case("GPT2LMHeadModel", "GPT2Config", dropout=0.1, **GPT2),
    "llama": hf_case("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "opt": hf_case("OPTForCausalLM", "OPTConfig", ffn_dim=64, word_embed_proj_dim=HIDDEN, **ENCODER),
    "bert": hf_case("BertForMaskedLM", "BertConfig", **ENCODER),
    "t5": hf_case(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "vit": hf_case("ViTForImageClassification", "ViTConfig", image_batch, num_labels=4, **VISION),
    "mixtral": hf_case("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **DECODER),
    "whisper": hf_case(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        speech_batch,
        num_mel_bins=8,
        max_source_positions=SEQ,
        max_target_positions=32,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **SEQ2SEQ,
    ),
    "bart": hf_case("BartForConditionalGeneration", "BartConfig", max_position_embeddings=32, **SEQ2SEQ),
    "clip": hf_case("CLIPModel", "CLIPConfig", clip_batch, **clip_config()),
    "deberta": hf_case(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
        position_buckets=8,
        **ENCODER,
    ),
    "swin": hf_case("SwinForImageClassification", "SwinConfig", image_batch, num_labels=4, drop_path_rate=0, **SWIN),
    "convnext": hf_case("ConvNextForImageClassification", "ConvNextConfig", image_batch, patch_size=2, **CONVNEXT),
    "mamba": hf_case(
        "MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=HIDDEN, state_size=4, num_hidden_layers=3
    ),
    "qwen3_moe": hf_case("Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, head_dim=8, **EXPERTS, **DECODER),
    "gemma": hf_case("GemmaForCausalLM", "GemmaConfig", head_dim=8, **DECODER),
    "falcon": hf_case("FalconForCausalLM", "FalconConfig", ffn_hidden_size=64, **ENCODER),
    "bloom": hf_case("BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=3, n_head=4),
    "albert": hf_case("AlbertForMaskedLM", "AlbertConfig", embedding_size=16, **ENCODER),
}


# ---------------------------------------------------------------- written by hand


class Block(nn.Module):
    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Blocks and a head; the plainest model there is."""

    def __init__(self, num_blocks: int = 4, width: int = HIDDEN) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 16, 16]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
                for a, b in pairwise(widths)
            )
        )
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.stages(x), 1).flatten(1))


class TorchTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(HIDDEN, 4, 2, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x.flip(1))


class Attentions(nn.Module):
    """nn.MultiheadAttention, which uses its projection's weight without calling it, at the top and in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": nn.MultiheadAttention(HIDDEN, 4, batch_first=True), "mlp": Block()})
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = block["mlp"](x + block["attention"](x, x, x, need_weights=False)[0])
        return x


class TiedByHand(nn.Module):
    """Uses the embedding's weight as a function argument instead of tying a head to it."""

    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embed.weight)


class Borrower(nn.Module):
    """A block that reads the weight of a module it shares with the model."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.own = Block()
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.own(x), self.shared.weight)


class Borrowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.blocks = nn.ModuleList(Borrower(shared) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Hidden(nn.Module):
    """A block that reads the weight of a module registered elsewhere, through a list no one sees."""

    def __init__(self, lender: nn.Module) -> None:
        super().__init__()
        self.own = Block()
        self.lender = [lender]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.own(x), self.lender[0].weight)


class HiddenBorrowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lenders = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.blocks = nn.ModuleList(Hidden(lender) for lender in self.lenders)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for lender in self.lenders:
            x = lender(x)
        for block in self.blocks:
            x = block(x)
        return x


class ParameterBags(nn.Module):
    """Parameters in a ParameterList and a ParameterDict, used by the model and by blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.randn(HIDDEN) for _ in range(3))
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.randn(HIDDEN)), "b": nn.Parameter(torch.randn(1))})
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale, block in zip(self.scales, self.blocks, strict=True):
            x = block(x * scale + self.shifts["a"])
        return x * self.shifts["b"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(HIDDEN, HIDDEN, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


HAND_CASES = {
    "tower": Case(Tower, vector_batch, square),
    "conv_net": Case(ConvNet, picture_batch, square),
    "torch_transformer": Case(TorchTransformer, vector_batch, square),
    "attentions": Case(Attentions, vector_batch, square),
    "tied_by_hand": Case(TiedByHand, token_batch, square),
    "tied_by_hand_large": Case(lambda: TiedByHand(4096), token_batch, square),
    "borrowers": Case(Borrowers, vector_batch, square),
    "hidden_borrowers": Case(HiddenBorrowers, vector_batch, square),
    "parameter_bags": Case(ParameterBags, vector_batch, square),
    "recurrent": Case(Recurrent, vector_batch, square),
}
ZOO = {**HF_CASES, **HAND_CASES}
