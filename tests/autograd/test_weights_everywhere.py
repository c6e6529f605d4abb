"""A managed parameter reads as its value and takes writes wherever code looks at it: what users' programs do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training_harness import PLACEMENTS, config_for

from gemini import GeminiDDP, HybridAdam, ModelError

W = 16
ADAM = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.parametrize("place", PLACEMENTS)


class Temperature(nn.Module):
    """Clamps its temperature at the start of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.6))
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x / self.temperature


class WeightNorms(nn.Module):
    """Renormalises embeddings in forward, as nn.Embedding(max_norm=...) does, and weights of a unit through .data."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, W, max_norm=1.0)
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed((x.abs() * 10).long() % 50).sum(1)
        for layer in self.layers:
            layer.weight.data.clamp_(-0.2, 0.2)
            x = torch.tanh(layer(x))
        return x


class Codebook(nn.Module):
    """A frozen codebook, a unit of its own, that its parent moves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(W, W) for _ in range(2))
        self.codes = nn.Embedding(16, W).requires_grad_(False)
        self.decoder = nn.ModuleList(nn.Linear(W, W) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.encoder:
            x = torch.tanh(layer(x))
        nearest = self.codes((x @ self.codes.weight.t()).argmax(1))
        with torch.no_grad():
            self.codes.weight.copy_(0.9 * self.codes.weight + 0.1 * x.mean(0))
        x = x + (nearest - x).detach()
        for layer in self.decoder:
            x = torch.tanh(layer(x))
        return x


class Penalized(nn.Module):
    """Reads all weights in forward, more than there are slots."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + sum(param.square().sum() for param in self.parameters())


class Features(nn.Module):
    """A block that is used through a method beside forward, and has weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(W, W) * 0.1)
        self.linear = nn.Linear(W, W)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) + self.linear(x)


class Methods(nn.Module):
    """Calls methods of its blocks; has none of forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Features() for _ in range(6))
        self.out = nn.Linear(W, W)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block.features(x)
        return self.out(x) * self.blocks[0].weight.mean()


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: Any, *params: torch.Tensor) -> torch.Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.block.parts(x), gradient)
        return x.grad, None


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))

    forward = parts


class Reversible(nn.Module):
    """Runs blocks without a graph, and parts of them again in a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Parts() for _ in range(3))
        self.out = nn.Linear(W, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for layer in self.layers:
            x = x + _RunAgain.apply(x, layer)
        return self.out(x)


class ReadsItself(nn.Module):
    """Looks at weights of other modules in forward, in ways that keep what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(4))
        self.empty = nn.Parameter(torch.zeros(0, W))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.layers[0].weight.t()
        row = self.layers[3].weight[2]
        for layer in self.layers:
            x = torch.tanh(layer(x) @ turned) + row * self.scale
        return x + self.empty.sum() + torch.stack([layer.bias for layer in self.layers]).mean(0)


def trained(
    build: Callable[[], nn.Module],
    *,
    place: str | None,
    folder: Path,
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, x: model(x),
    before_step: Callable[[nn.Module], object] = lambda model: None,
    after_step: Callable[[nn.Module], object] = lambda model: None,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a few steps; without a placement plain PyTorch does. Return losses and weights."""
    torch.manual_seed(0)
    model = build()
    generator = torch.Generator().manual_seed(1)
    losses = []

    def steps(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(4):
            loss = call(model, torch.randn(4, W, generator=generator).to(dtype)).float().square().mean()
            loss.backward()
            before_step(model)
            optimizer.step()
            optimizer.zero_grad()
            after_step(model)
            losses.append(loss.item())

    if place is None:
        steps(torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], **ADAM))
        return losses, model.state_dict()
    with GeminiDDP(model, config_for(place, folder, dtype=dtype)) as engine:
        steps(HybridAdam(engine.parameters(), **ADAM))
        assert engine.memory_report().num_skipped_steps == 0
        return losses, engine.master_state_dict()


def assert_close(seen: tuple[list[float], dict[str, Any]], right: tuple[list[float], dict[str, Any]]) -> None:
    assert seen[0] == pytest.approx(right[0], rel=1e-5)
    for name, value in right[1].items():
        torch.testing.assert_close(seen[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [Temperature, WeightNorms, Codebook, Penalized, Reversible, ReadsItself])
def test_reads_and_writes_in_forward_and_backward_train_as_plain_torch(build: Any, place: str, tmp_path: Path) -> None:
    right = trained(build, place=None, folder=tmp_path)
    assert_close(trained(build, place=place, folder=tmp_path), right)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("build", [Temperature, WeightNorms, Codebook, ReadsItself])
def test_half_precision_writes_have_the_same_bits_everywhere(
    build: Any, dtype: torch.dtype, place: str, tmp_path: Path
) -> None:
    (tmp_path / "memory").mkdir()
    right = trained(build, place="host", folder=tmp_path / "memory", dtype=dtype)
    seen = trained(build, place=place, folder=tmp_path, dtype=dtype)
    assert seen[0] == right[0]
    assert all(torch.equal(seen[1][name], value) for name, value in right[1].items())


def test_methods_beside_forward_train(place: str, tmp_path: Path) -> None:
    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        return model.encode(x)

    right = trained(Methods, place=None, folder=tmp_path, call=call)
    assert_close(trained(Methods, place=place, folder=tmp_path, call=call), right)


@pytest.mark.parametrize("when", ["before_step", "after_step"])
@pytest.mark.parametrize(
    "write",
    [
        lambda param: param.clamp_(-0.05, 0.05),
        lambda param: param.data.mul_(0.9),
        lambda param: param.data.view(-1)[:1].fill_(0.01),
        lambda param: param.detach().add_(0.01),
        lambda param: param.__setitem__(..., param * 0.9),
        lambda param: setattr(param, "data", param.data * 0.9),
        lambda param: nn.init.constant_(param, 0.02),
        lambda param: torch.mul(param, 0.9, out=param),
        lambda param: param.copy_(torch.full_like(param, 0.03)),
    ],
    ids=["operator", "data", "view", "detach", "setitem", "assign data", "init", "out", "copy_"],
)
def test_writes_between_steps_reach_weight_and_master(write: Any, when: str, place: str, tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for param in model.parameters():
                write(param)

    hooks: Any = {when: change}
    right = trained(Temperature, place=None, folder=tmp_path, **hooks)
    assert_close(trained(Temperature, place=place, folder=tmp_path, **hooks), right)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_elements_that_a_write_leaves_alone_keep_the_rest_of_their_master(
    dtype: torch.dtype, place: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    with GeminiDDP(nn.Sequential(nn.Linear(W, W)), config_for(place, tmp_path, dtype=dtype)) as engine:
        weight = engine.module[0].weight
        before = engine.master_state_dict()["0.weight"]
        with torch.no_grad():
            weight[3] = 0.25
            weight.clamp_(max=0.125)
            weight.data.add_(0)
        after = engine.master_state_dict()["0.weight"]
    changed = before.to(dtype) > 0.125
    changed[3] = True
    assert torch.equal(after[~changed], before[~changed])
    assert not torch.equal(before, before.to(dtype).float())  # there is something to lose
    assert set(after[changed].tolist()) == {0.125}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_copied_in_keeps_its_precision_in_the_master(dtype: torch.dtype, place: str, tmp_path: Path) -> None:
    values = torch.randn(W, W)
    with GeminiDDP(nn.Sequential(nn.Linear(W, W)), config_for(place, tmp_path, dtype=dtype)) as engine:
        with torch.no_grad():
            engine.module[0].weight.copy_(values)
        assert torch.equal(engine.module[0].weight, values.to(dtype))
        assert torch.equal(engine.master_state_dict()["0.weight"], values)


def test_averages_follow_the_weights(place: str, tmp_path: Path) -> None:
    averages = {}

    def train(place: str | None) -> None:
        averaged: Any = None

        def average(model: nn.Module) -> None:
            averaged.update_parameters(model)

        def build() -> nn.Module:
            nonlocal averaged
            model = Penalized()
            averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            return model

        trained(build, place=place, folder=tmp_path, after_step=average)
        averages[place] = averaged.module.state_dict()

    train(None)
    train(place)
    for name, value in averages[None].items():
        torch.testing.assert_close(averages[place][name], value, rtol=1e-4, atol=1e-6)


def test_saved_forms_of_parts_hold_the_weights(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(W, W), nn.Linear(W, W)), nn.Linear(W, W))
    model[0][1].weight = model[0][0].weight  # tied
    right = {name: value.clone() for name, value in model[0].state_dict().items()}
    with GeminiDDP(model, config_for(place, tmp_path)):
        part = model[0]
        forms = {"state_dict": part.state_dict(), "parameters": dict(part.named_parameters(remove_duplicate=False))}
        for state in forms.values():
            file = io.BytesIO()
            torch.save(state, file)
            loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            assert all(torch.equal(loaded[name], value) for name, value in right.items())
        (tmp_path / "saved").mkdir()
        save_file({n: v for n, v in part.state_dict().items() if n != "1.weight"}, tmp_path / "saved/a.safetensors")
        save_file({n: v.data for n, v in part.named_parameters()}, tmp_path / "saved/b.safetensors")
        copied = copy.deepcopy(part.state_dict())
        copied["0.weight"].zero_()  # a copy of the copy is the caller's
    for file_name in ("a", "b"):
        loaded = load_file(tmp_path / f"saved/{file_name}.safetensors")
        assert all(torch.equal(loaded[name], right[name]) for name in loaded)
        assert set(loaded) == {"0.weight", "0.bias", "1.bias"}


def test_a_write_to_a_state_dict_that_would_be_lost_is_refused(place: str, tmp_path: Path) -> None:
    with GeminiDDP(nn.Sequential(nn.Linear(W, W)), config_for(place, tmp_path)) as engine:
        state = engine.module.state_dict()
        for write in (
            lambda: state["0.weight"].zero_(),
            lambda: state["0.weight"].data.fill_(1),
            lambda: state["0.weight"][0].mul_(2),
        ):
            with pytest.raises(ModelError, match=r"0\.weight in a state dict .* is a copy"):
                write()


def test_views_that_are_kept_show_what_the_weight_is_now(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with GeminiDDP(nn.Sequential(nn.Linear(W, W), nn.Linear(W, W)), config_for(place, tmp_path)) as engine:
        weight = engine.module[0].weight
        optimizer = HybridAdam(engine.parameters(), lr=0.1)
        kept = weight.data
        row = weight.detach()[2]
        engine(torch.ones(2, W)).sum().backward()
        optimizer.step()
        now = engine.state_dict()["0.weight"]
        assert torch.equal(kept.clone(), now)
        assert torch.equal(row + 0, now[2])
        assert kept.numpy().tolist() == now.tolist()
        row.fill_(3)
        assert engine.state_dict()["0.weight"][2].eq(3).all()
        with pytest.raises(ValueError, match="read-only"):
            kept.numpy()[0] = 1  # numpy's own writes would not reach the weight


def test_a_view_in_the_graph_is_not_read_once_the_weight_has_changed(place: str, tmp_path: Path) -> None:
    with GeminiDDP(nn.Sequential(nn.Linear(W, W), nn.Linear(W, W)), config_for(place, tmp_path)) as engine:
        flat = engine.module[0].weight.view(-1)
        flat.square().sum().backward()
        assert engine.module[0].weight.grad is not None
        HybridAdam(engine.parameters()).step()
        with pytest.raises(ModelError, match="view of it in the graph is read after the weight has changed"):
            flat.sum()


def test_a_weight_written_between_forward_and_its_backward_is_refused_as_by_torch(place: str, tmp_path: Path) -> None:
    with GeminiDDP(nn.Sequential(nn.Linear(W, W), nn.Linear(W, W)), config_for(place, tmp_path)) as engine:
        loss = engine(torch.ones(2, W)).sum()
        with torch.no_grad():
            engine.module[1].weight.mul_(2)
        with pytest.raises(ModelError, match=r"1\.weight was written in place between a forward"):
            loss.backward()
        engine.zero_grad()
        for write in (lambda param: param.detach().mul_(2), lambda param: param.detach()[0].zero_()):
            loss = engine(torch.ones(2, W, requires_grad=True)).sum()
            write(engine.module[1].weight)
            with pytest.raises(ModelError, match=r"1\.weight was written in place between a forward"):
                loss.backward()
            engine.zero_grad()
        engine(torch.ones(2, W)).sum().backward()


def test_gradients_show_and_refuse_to_be_changed(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(W, W), nn.Linear(W, W))
    x = torch.randn(2, W)
    plain(x).square().sum().backward()
    with GeminiDDP(copy.deepcopy(plain), config_for(place, tmp_path)) as engine:
        params = list(engine.parameters())
        assert all(param.grad is None for param in params)
        engine(x).square().sum().backward()
        for param, right in zip(params, plain.parameters(), strict=True):
            assert torch.equal(param.grad.clone(), right.grad)
        for change in (
            lambda: torch.nn.utils.clip_grad_norm_(params, 0.1),
            lambda: torch.nn.utils.clip_grad_value_(params, 0.1),
            lambda: params[0].grad.zero_(),
            lambda: params[0].grad.data.mul_(2),
        ):
            with pytest.raises(ModelError, match=r"would change the gradient of 0\.weight in place"):
                change()
        params[0].grad += 1
        params[1].grad = None
        params[2].grad = params[2].grad * 0.5
        plain[0].weight.grad += 1
        plain[0].bias.grad = None
        plain[1].weight.grad *= 0.5
        torch.optim.AdamW(plain.parameters(), **ADAM).step()
        HybridAdam(params, **ADAM).step()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(engine.state_dict()[name], value, rtol=1e-5, atol=1e-7)
        assert all(param.grad is None for param in params)


def test_the_model_holds_its_weights_after_close_and_another_engine_goes_on(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(W, W), nn.BatchNorm1d(W), nn.Linear(W, W))
    twin = copy.deepcopy(model)
    x = torch.randn(4, W)
    for each, optimizer in ((twin, torch.optim.AdamW(twin.parameters(), **ADAM)), (model, None)):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            engine = GeminiDDP(model, config_for(place, tmp_path / folder)) if optimizer is None else None
            used = optimizer or HybridAdam(engine.parameters(), **ADAM)
            (engine or each)(x).square().mean().backward()
            used.step()
            used.zero_grad()
            if engine is not None:
                engine.close()
                assert {type(param) for param in model.parameters()} == {nn.Parameter}
            else:
                optimizer = torch.optim.AdamW(twin.parameters(), **ADAM)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    copy.deepcopy(model)(x).sum().backward()  # a plain model again


def test_a_model_that_no_memory_could_take_back_refuses_to_be_used(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(W, W))
    monkeypatch.setattr("gemini.weights.handback.KEPT_FREE", 1.0)
    with GeminiDDP(model, config_for(place, tmp_path)):
        pass
    for use in (lambda: model(torch.ones(1, W)), lambda: model[0].weight.sum(), lambda: model[0].weight.data.clone()):
        with pytest.raises(ModelError, match="closed"):
            use()
    with pytest.raises(ModelError, match="could not hand them back; load the model anew"):
        GeminiDDP(model, config_for(place, tmp_path))


def test_linear_layers_and_losses_outside_of_forward_train(place: str, tmp_path: Path) -> None:
    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = x
        for layer in model.layers:
            hidden = torch.tanh(layer(hidden))
        logits = F.linear(hidden, model.layers[0].weight, model.layers[1].bias) * model.scale
        return logits + 0.1 * sum(param.abs().sum() for param in model.parameters())

    right = trained(ReadsItself, place=None, folder=tmp_path, call=call)
    assert_close(trained(ReadsItself, place=place, folder=tmp_path, call=call), right)


def test_a_gradient_is_read_by_any_code(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(W, W))
    x = torch.randn(2, W)
    plain(x).square().sum().backward()
    right = plain[0].weight.grad
    with GeminiDDP(copy.deepcopy(plain), config_for(place, tmp_path)) as engine:
        engine(x).square().sum().backward()
        gradient = engine.module[0].weight.grad
        other = torch.zeros(W, W)
        other.data = gradient
        for seen in (
            gradient.detach().clone(),
            gradient.type(torch.float64).float(),
            gradient.as_subclass(torch.Tensor),
            torch.zeros(W, W).add_(gradient),
            torch.from_dlpack(gradient.clone()),
            other + 0,
            torch.as_tensor(gradient) + 0,
        ):
            assert torch.equal(seen, right)
        engine(x).square().sum().backward()
        assert torch.equal(gradient + 0, 2 * right)  # what waits now
        HybridAdam(engine.parameters()).step()
        assert gradient.isfinite().all()


def _double_by_an_operator(param: torch.Tensor) -> None:
    torch.ops.aten.mul_.Tensor(param.data, torch.tensor(2.0))


def _double_by_lists(param: torch.Tensor) -> None:
    torch._foreach_add_([param, param.data[:0]], [param.detach().clone(), param.data[:0]])


@pytest.mark.parametrize("double", [_double_by_an_operator, _double_by_lists])
def test_operators_under_other_names_write_too(double: Any, place: str, tmp_path: Path) -> None:
    with GeminiDDP(nn.Sequential(*(nn.Linear(W, W) for _ in range(4))), config_for(place, tmp_path)) as engine:
        before = engine.state_dict()["0.weight"]
        with torch.no_grad():
            double(engine.module[0].weight)
            engine(torch.ones(1, W))
        assert torch.equal(engine.state_dict()["0.weight"], 2 * before)


def test_running_statistics_that_are_parameters_are_kept(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).requires_grad_(False)
    x = torch.randn(8, 4)
    with GeminiDDP(copy.deepcopy(plain), config_for(place, tmp_path)) as engine:
        for model in (plain, engine.module):
            F.batch_norm(x, model[0].bias, model[1].bias, training=True)
            model[3](x)
        engine(x)
        for name, value in plain.state_dict().items():
            assert torch.equal(engine.state_dict()[name], value)


def test_what_cannot_be_honoured_is_refused_at_that_line(place: str, tmp_path: Path) -> None:
    with GeminiDDP(nn.Sequential(nn.Linear(W, W), nn.Linear(W, W)), config_for(place, tmp_path)) as engine:
        weight = engine.module[0].weight
        for use in (
            lambda: weight.detach().requires_grad_(),
            lambda: nn.Parameter(weight.data),
            lambda: weight.t_(),
            lambda: weight.data.transpose_(0, 1),
            lambda: weight.share_memory_(),
        ):
            with torch.no_grad(), pytest.raises(ModelError, match=r"parameter 0\.weight of a GeminiDDP"):
                use()
        nn.Parameter(weight.data, requires_grad=False)
        loss = engine(torch.ones(1, W, requires_grad=True)).sum()
        engine.module[1].weight.data = engine.module[1].weight.data * 2
        with pytest.raises(ModelError, match=r"1\.weight was written in place between a forward"):
            loss.backward()


def test_other_tensors_are_written_with_gradients(place: str, tmp_path: Path) -> None:
    with GeminiDDP(nn.Sequential(nn.Linear(W, W)), config_for(place, tmp_path)) as engine:
        engine(torch.ones(1, W)).square().sum().backward()
        gradient = engine.module[0].weight.grad
        right = gradient.clone()
        momentum = torch.zeros(W, W)
        momentum.mul_(0.9).add_(gradient)
        momentum.copy_(gradient)
        momentum.lerp_(gradient, 0.5)
        torch._foreach_add_([momentum], [gradient])
        momentum += gradient
        assert torch.equal(momentum, 3 * right)
    assert gradient.isfinite().all()  # after close, too
