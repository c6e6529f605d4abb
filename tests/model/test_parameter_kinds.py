"""Parameters that only look like plain tensors are refused by name; those that are plain are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from gemini import GeminiConfig, GeminiDDP, HybridAdam, ModelError

CONFIG = GeminiConfig(device="cpu", dtype=torch.float32, host_budget="64MiB", num_threads=1)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def with_weight(weight: torch.Tensor) -> nn.Module:
    model = two_layers()
    model[0].weight = weight
    return model


class MovesItself(nn.Parameter):
    """As bitsandbytes' Params4bit and Int8Params: plain data, which `to` and `cuda` quantise."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return super().to(*args, **kwargs)


class ComputesItself(nn.Parameter):
    """As diffusers' GGUFParameter: plain bytes, which torch functions give another meaning."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Labelled(nn.Parameter):
    """A parameter that knows something about itself and is otherwise torch's own."""

    label = "frozen in March"


def fake_weight() -> torch.Tensor:
    with FakeTensorMode():
        return nn.Parameter(torch.empty(8, 8))


def quantised_weight() -> torch.Tensor:
    with pytest.warns(UserWarning, match="quantize_per_tensor"):
        quantised = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
    return nn.Parameter(quantised, requires_grad=False)


UNUSUAL: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "subclass": (lambda: nn.Parameter(TwoTensor(torch.randn(8, 8), torch.randn(8, 8))), "is a TwoTensor .*dequantize"),
    "frozen subclass": (
        lambda: nn.Parameter(TwoTensor(torch.randn(8, 8), torch.randn(8, 8)), requires_grad=False),
        "is a TwoTensor .*dequantize",
    ),
    "moves itself": (lambda: MovesItself(torch.randn(8, 8)), "is a MovesItself .*dequantize"),
    "computes itself": (lambda: ComputesItself(torch.randn(8, 8)), "is a ComputesItself .*dequantize"),
    "fake": (fake_weight, "is a FakeTensor"),
    "quantised by torch": (quantised_weight, "dtype torch.qint8, whose scales"),
    "sparse": (lambda: nn.Parameter(torch.eye(8).to_sparse()), r"layout torch.sparse_coo: .*to_dense\(\)"),
    "compressed": (lambda: nn.Parameter(torch.eye(8).to_sparse_csr()), "layout torch.sparse_csr"),
    "half a byte": (
        lambda: nn.Parameter(torch.zeros(8, 8, dtype=torch.float4_e2m1fn_x2), requires_grad=False),
        "dtype torch.float4_e2m1fn_x2: .*torch.uint8",
    ),
    "bits": (lambda: nn.Parameter(torch.zeros(8, 8, dtype=torch.bits8), requires_grad=False), "dtype torch.bits8"),
    "trainable float8": (
        lambda: nn.Parameter(torch.zeros(8, 8, dtype=torch.float8_e4m3fn)),
        "trainable with dtype torch.float8_e4m3fn: .*freeze it",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_parameter_that_is_no_plain_tensor_is_refused_by_name(kind: str) -> None:
    make, message = UNUSUAL[kind]
    model = with_weight(make())
    weight = model[0].weight  # type: ignore[index]
    with pytest.raises(ModelError, match=f"parameter 0.weight .*{message}"):
        GeminiDDP(model, CONFIG)
    assert model[0].weight is weight  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_parameter_is_refused_by_name() -> None:
    model = two_layers()
    model.register_parameter("ragged", nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])))
    with pytest.raises(ModelError, match="parameter ragged is a nested tensor"):
        GeminiDDP(model, CONFIG)


def test_a_harmless_subclass_trains_as_a_plain_parameter_does() -> None:
    found = []
    for model in (two_layers(), with_weight(Labelled(two_layers()[0].weight.detach().clone()))):
        with GeminiDDP(model, CONFIG) as engine:
            optimizer = HybridAdam(engine.parameters(), lr=1e-2)
            engine(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            found.append(engine.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["0.weight"], two_layers()[0].weight)
