"""Views of weights that are away, in the hands of code that goes past torch's functions, and of function transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_harness import PLACEMENTS, config_for

from gemini import GeminiDDP, HybridAdam, ModelError

W = 16

pytestmark = pytest.mark.parametrize("place", PLACEMENTS)

Tensors = Callable[[torch.Tensor], torch.Tensor]

READS: dict[str, Tensors] = {
    "vmap": lambda view: torch.vmap(lambda row: row * 2)(view),
    "grad": lambda view: torch.func.grad(lambda x: x.square().sum())(view),
    "jacrev": lambda view: torch.func.jacrev(lambda x: x.square().sum(0))(view),
    "jvp": lambda view: torch.func.jvp(lambda x: x.square(), (view,), (torch.ones(W, W),))[1],
    "vmap of grad": lambda view: torch.vmap(torch.func.grad(lambda row: row.square().sum()))(view),
    "captured": lambda view: torch.func.grad(lambda x: (x * view.t()).sum())(torch.ones(W, W)),
    "torch.tensor": lambda view: torch.tensor(view),
    "torch.stack": lambda view: torch.stack([view, view]),
    "Variable": lambda view: torch.autograd.Variable(view) + 0,
    "new tensor": lambda view: view.new_tensor(view),
    "operator": lambda view: torch.ops.aten.mul.Tensor(view, 2),
    "numpy's function": lambda view: torch.from_numpy(view.numpy() * 2),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(W, W) for _ in range(4)))


def away(engine: GeminiDDP) -> torch.Tensor:
    """Return the first weight, after others have taken what slots there are."""
    for layer in engine.module[1:]:
        layer(torch.ones(1, W))
    return engine.module[0].weight


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning", "ignore:.*jit.script")  # torch's
@pytest.mark.parametrize("read", READS)
def test_a_view_is_its_values_to_any_code(read: str, place: str, tmp_path: Path) -> None:
    right = READS[read](model()[0].weight.detach())
    with GeminiDDP(model(), config_for(place, tmp_path)) as engine:
        assert torch.equal(READS[read](away(engine).data), right)
        assert torch.equal(READS[read](away(engine).detach()[:]), right)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_gradients_of_weights_come_out_of_transforms(transform: Any, place: str, tmp_path: Path) -> None:
    """The weight is captured: its gradient is that of a second derivative."""

    def loss(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return transform(lambda x: torch.tanh(x @ layer.weight.t()).square().sum())(x).square().sum()  # type: ignore

    plain, x = model(), torch.randn(3, W)
    loss(plain[0], x).backward()  # type: ignore[no-untyped-call]
    with GeminiDDP(model(), config_for(place, tmp_path)) as engine:
        away(engine)
        loss(engine.module[0], x).backward()  # type: ignore[no-untyped-call]
        assert torch.equal(engine.module[0].weight.grad + 0, plain[0].weight.grad)


def test_a_write_within_a_transform_is_refused(place: str, tmp_path: Path) -> None:
    with GeminiDDP(model(), config_for(place, tmp_path)) as engine:
        weight = away(engine)
        before = weight.detach().clone()

        def write(x: torch.Tensor) -> torch.Tensor:
            weight.data.mul_(2)
            return x

        with pytest.raises(ModelError, match=r"0\.weight of a GeminiDDP: written in place within a transform"):
            torch.vmap(write)(torch.ones(2))
        assert torch.equal(weight, before)
        engine(torch.ones(1, W)).sum().backward()
        HybridAdam(engine.parameters()).step()  # goes on


def test_memory_of_a_view_that_has_none_is_not_handed_out(place: str, tmp_path: Path) -> None:
    with GeminiDDP(model(), config_for(place, tmp_path)) as engine:
        weight = away(engine)
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            torch.utils.dlpack.to_dlpack(weight.data)
        shares = torch.zeros(W, W)
        shares.data = weight.data
        with pytest.raises(RuntimeError, match="unsupported operation|Cannot access data pointer"):
            shares.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", ["data", "slice", "ellipsis", "lists", "data by lists", "one value"])
def test_what_is_copied_into_all_of_a_weight_keeps_its_precision(
    copies: str, dtype: torch.dtype, place: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    values, others = torch.randn(W, W), torch.randn(W, W)
    with GeminiDDP(model(), config_for(place, tmp_path, dtype=dtype)) as engine, torch.no_grad():
        first, second = engine.module[0].weight, engine.module[1].weight
        if copies == "data":
            first.data.copy_(values)
        elif copies == "slice":
            first[:] = values
        elif copies == "ellipsis":
            first.data[...] = values
        elif copies == "lists":
            torch._foreach_copy_([first, second], [values, others])
            assert torch.equal(engine.master_state_dict()["1.weight"], others)
        elif copies == "data by lists":
            torch._foreach_copy_([first.data], [values])
        else:
            values = values[:1].expand(W, W)
            first.copy_(values[0])
        assert torch.equal(engine.master_state_dict()["0.weight"], values)
        assert torch.equal(first, values.to(dtype))


def test_a_part_that_is_copied_has_the_weights_own_precision(place: str, tmp_path: Path) -> None:
    """As in plain torch in half precision, and the rest of the master stays."""
    torch.manual_seed(0)
    values = torch.randn(W, W)
    with GeminiDDP(model(), config_for(place, tmp_path, dtype=torch.bfloat16)) as engine, torch.no_grad():
        before = copy.deepcopy(engine.master_state_dict()["0.weight"])
        engine.module[0].weight.data[1:].copy_(values[1:])
        after = engine.master_state_dict()["0.weight"]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1:], values[1:].bfloat16().float())


def test_views_and_arrays_of_a_gradient_are_read_only(place: str, tmp_path: Path) -> None:
    with GeminiDDP(model(), config_for(place, tmp_path)) as engine:
        engine(torch.ones(1, W)).sum().backward()
        gradient = engine.module[0].weight.grad
        with pytest.raises(
            ModelError, match=r"gradient of 0\.weight .* assign the new values to the parameter's \.grad"
        ):
            gradient[0] += 1
        assert torch.equal(gradient.detach_() + 0, gradient.clone())
        with pytest.raises(ValueError, match="read-only"):
            gradient.numpy()[0] = 1
