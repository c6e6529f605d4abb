"""Which modules a parent's code uses without calling them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemini.chunk.call_paths import find_bypassed_modules


def consume(x: Tensor, module: nn.Module) -> Tensor:
    return x @ module.weight


class Base(nn.Module):
    """A leaf, and a child that holds another leaf and has entries of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(2, 2)
        self.child = Child()
        self.row = nn.ModuleList([nn.Linear(2, 2)])


class Child(nn.Module):
    """A module with a leaf and a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leaf(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.leaf(x)

    def describe(self) -> str:
        return "child"


class Calls(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.leaf(*(x,))
        for layer in self.row:
            x = layer(x)
        return self.child(x) if self.child is not None else x


class ReadsMetadata(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.child(x.to(self.leaf.weight.dtype).to(device=self.leaf.weight.device))


class ReadsWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.leaf.weight)


class ReadsThroughName(Base):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.leaf
        return x @ layer.weight


class ReadsInClosure(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda y: y @ self.leaf.weight)(x)


class ReadsInHelper(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self._project(x)

    def _project(self, x: Tensor) -> Tensor:
        return x @ self.leaf.weight


class ReadsInProperty(Base):
    @property
    def table(self) -> Tensor:
        return self.leaf.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


class ReadsInSuper(ReadsWeight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ReadsUnderGrad(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.leaf.weight


class HandsOn(Base):
    def forward(self, x: Tensor) -> Tensor:
        return consume(x, self.leaf)


class CallsGrandchild(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.child.leaf(x)


class CallsForward(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.child.forward(x)


class CallsOtherMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.child.encode(x)


class CallsHarmlessMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert self.child.describe()
        return self.child(x)


class Recursive(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward(x[1:]) if len(x) else x @ self.leaf.weight


@pytest.mark.parametrize(
    ("model_class", "expected"),
    [
        (Calls, []),
        (ReadsMetadata, []),
        (CallsHarmlessMethod, []),
        (ReadsWeight, ["leaf"]),
        (ReadsThroughName, ["leaf"]),
        (ReadsInClosure, ["leaf"]),
        (ReadsInHelper, ["leaf"]),
        (ReadsInProperty, ["leaf"]),
        (ReadsInSuper, ["leaf"]),
        (ReadsUnderGrad, ["leaf"]),
        (HandsOn, ["leaf"]),
        (Recursive, ["leaf"]),
        (CallsGrandchild, ["child"]),
        (CallsForward, ["child"]),
        (CallsOtherMethod, ["child"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_only_modules_used_without_a_call_are_found(model_class: type[nn.Module], expected: list[str]) -> None:
    model = model_class()
    bypassed = find_bypassed_modules(model.modules())
    assert [name for name, module in model.named_modules() if id(module) in bypassed] == expected


def test_out_projection_of_torch_attention_is_found() -> None:
    model = nn.MultiheadAttention(4, 2)
    assert find_bypassed_modules(model.modules()) == {id(model.out_proj)}
