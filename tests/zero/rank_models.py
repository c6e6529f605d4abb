"""Models with habits that matter to many ranks."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from model_zoo import HF_CASES, HIDDEN, Block, square, vector_batch
from torch import nn
from training_harness import Case


class Experts(nn.Module):
    """Runs one of two experts, chosen by what it is given; a third one is never used by anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.unused = Block(), Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) if float(x.detach().mean()) > 0 else self.right(x)


class Routed(nn.Module):
    """Blocks of which ranks use different parts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Patchy(nn.Module):
    """Blocks that use all they have, or all but a bias, depending on what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PatchyBlock() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_full = float(x.detach().mean()) > 0
        for block in self.blocks:
            x = block(x, is_full)
        return x


class PatchyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor, is_full: bool) -> torch.Tensor:
        return self.inner(x) * self.scale if is_full else self.inner(x)


class Lender(nn.Module):
    """Uses its weight; its bias is others' to use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.linear(x, self.inner.weight)


class Borrower(nn.Module):
    def __init__(self, lender: Lender) -> None:
        super().__init__()
        self.own = Block()
        self.lender = [lender]  # not a module of this one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) + self.lender[0].inner.bias


class Lenders(nn.Module):
    """Half of each lender's gradient arrives long before the other half, and before that of chunks in between."""

    def __init__(self) -> None:
        super().__init__()
        self.lenders = nn.ModuleList(Lender() for _ in range(4))
        self.blocks = nn.ModuleList(Borrower(lender) for lender in self.lenders)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in (*self.lenders, *self.blocks):
            x = module(x)
        return x


class Tiny(nn.Module):
    """Chunks far smaller than a block of 4096 bytes, one frozen, and an uneven one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 511), nn.Linear(511, 3, bias=False)])
        self.blocks[0].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[..., :3]
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class WideHead(nn.Module):
    """A layer of one parameter alone, far larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), nn.Linear(HIDDEN, 64 * HIDDEN, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Adapted(nn.Module):
    """Frozen blocks, each with a trained update of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AdaptedBlock() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class AdaptedBlock(nn.Module):
    def __init__(self, width: int = 160, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(HIDDEN, width), nn.GELU(), nn.Linear(width, HIDDEN)).requires_grad_(False)
        self.down = nn.Linear(HIDDEN, rank, bias=False)
        self.up = nn.Linear(rank, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.base(x) + self.up(self.down(x))


class Reader(nn.Module):
    """A lookup and more blocks than there are slots."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        return x


def token_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randint(0, 64, (4, 8), generator=generator)}


class WithNothing(nn.Module):
    """A block that has a parameter without elements besides."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks[0].nothing = nn.Parameter(torch.empty(2, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x))


def checkpointed(*, use_reentrant: bool) -> Case:
    """Return GPT-2 with activation checkpoints."""

    def build() -> nn.Module:
        model = HF_CASES["gpt2"].build()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
        return model

    return dataclasses.replace(HF_CASES["gpt2"], build=build)


RANK_CASES = {
    "checkpointed": checkpointed(use_reentrant=False),
    "checkpointed_reentrant": checkpointed(use_reentrant=True),
    "adapted": Case(Adapted, vector_batch, square),
    "routed": Case(Routed, vector_batch, square),
    "patchy": Case(Patchy, vector_batch, square),
    "lenders": Case(Lenders, vector_batch, square),
    "wide_head": Case(WideHead, vector_batch, square),
    "reader": Case(Reader, token_batch, square),
    "with_nothing": Case(WithNothing, vector_batch, square),
    "tiny": Case(Tiny, vector_batch, square),
}
