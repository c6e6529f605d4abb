"""What users do in a training loop gives what plain torch gives, in every placement."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import HF_CASES, HIDDEN, Block, Tower, square, vector_batch
from torch import nn
from training_harness import (
    Case,
    config_for,
    distance,
    hybrid_adam,
    is_close,
    plain_adamw,
    same_bits,
    step,
    train_gemini,
    train_plain,
)

from gemini import GeminiDDP

TOWER = Case(Tower, vector_batch, square)
LLAMA = HF_CASES["llama"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


@pytest.fixture(params=["host", "nvme", "device"])
def config(request, tmp_path):
    return config_for(request.param, tmp_path)


def run_both(case: Case, config: Any, loop: Callable[[Any, torch.optim.Optimizer], list[float]]) -> None:
    """Run a training loop with plain torch and with Gemini, and compare what it returns and leaves."""
    model = case.model()
    torch.manual_seed(2)
    expected = loop(model, plain_adamw(p for p in model.parameters() if p.requires_grad))
    with GeminiDDP(case.model(), config) as engine:
        torch.manual_seed(2)
        found = loop(engine, hybrid_adam(engine.parameters()))
        weights = engine.master_state_dict()
    assert is_close(found, expected)
    assert distance(weights, model.state_dict()) < 1e-6


def inner(model: nn.Module) -> nn.Module:
    """Return the user's model."""
    return model.module if isinstance(model, GeminiDDP) else model


# ---------------------------------------------------------------- which parameters get a gradient


class Routed(nn.Module):
    """Two of four experts, depending on the batch; one parameter is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(4))
        self.unused = nn.Linear(HIDDEN, HIDDEN)
        self.shift = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = int(x[0, 0, 0] > 0) + int(x[0, 0, 1] > 0)
        return self.experts[first + 1](self.experts[first](x)) + self.shift


ROUTED = Case(Routed, vector_batch, square)


def test_tied_weights_stay_tied(config):
    case = HF_CASES["gpt2"]
    with GeminiDDP(case.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for batch in case.batches(3):
            step(engine, optimizer, case, batch)
        weights = engine.state_dict()
    assert distance(weights, train_plain(case).weights) < 1e-6
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


def test_routed_experts_train_as_in_plain_torch(config):
    found, expected = train_gemini(ROUTED, config, 6), train_plain(ROUTED, 6)
    assert is_close(found.losses, expected.losses)
    assert distance(found.weights, expected.weights) < 1e-6


def test_unused_parameters_are_neither_decayed_nor_given_state(config):
    with GeminiDDP(ROUTED.model(), config) as engine:
        before = engine.master_state_dict()
        optimizer = hybrid_adam(engine.parameters())
        for batch in ROUTED.batches(2):
            step(engine, optimizer, ROUTED, batch)
        after = engine.master_state_dict()
        with_state = {id(param) for param in optimizer.state}
    assert torch.equal(after["unused.weight"], before["unused.weight"])
    assert not any(id(param) in with_state for param in engine.module.unused.parameters())
    assert not torch.equal(after["shift"], before["shift"])


def test_frozen_parameters_stay_as_they_are(config):
    def build() -> nn.Module:
        model = Tower()
        for name, param in model.named_parameters():
            param.requires_grad_("norm" in name or name.startswith("blocks.2"))
        return model

    case = Case(build, vector_batch, square)
    found, expected, initial = train_gemini(case, config), train_plain(case), case.model().state_dict()
    assert is_close(found.losses, expected.losses)
    assert distance(found.weights, expected.weights) < 1e-6
    assert torch.equal(found.weights["blocks.0.up.weight"], initial["blocks.0.up.weight"])


def test_lora_trains_as_in_plain_torch(config):
    peft = pytest.importorskip("peft")

    def build() -> nn.Module:
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        return peft.get_peft_model(LLAMA.build(), lora)

    case = Case(build, LLAMA.batch)
    found, expected = train_gemini(case, config), train_plain(case)
    assert is_close(found.losses, expected.losses)
    assert distance(found.weights, expected.weights) < 1e-6


# ---------------------------------------------------------------- forwards and backwards in any order


def test_several_forwards_before_one_backward(config):
    def loop(model, optimizer):
        losses = []
        first, *others = TOWER.batches(4)
        for batch in others:
            loss = square(model(**batch)) + square(model(**first))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    run_both(TOWER, config, loop)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_forward_between_backward_and_step_changes_nothing(config, mode):
    def loop(model, optimizer):
        losses = []
        for batch in TOWER.batches(3):
            loss = square(model(**batch))
            loss.backward()
            with mode():
                losses += [loss.item(), square(model(**batch)).item()]
            optimizer.step()
            optimizer.zero_grad()
        return losses

    run_both(TOWER, config, loop)


def test_evaluating_and_generating_amid_training_changes_nothing(config):
    def loop(model, optimizer):
        losses = []
        for batch in LLAMA.batches(3):
            losses.append(step(model, optimizer, LLAMA, batch))
            model.eval()
            with torch.no_grad():
                losses.append(model(**batch).loss.item())
                tokens = inner(model).generate(batch["input_ids"][:1, :4], max_new_tokens=4, do_sample=False)
            losses.append(float(tokens.sum()))
            model.train()
        return losses

    run_both(LLAMA, config, loop)


@pytest.mark.parametrize("num_micro_batches", [2, 3])
def test_gradients_accumulate_over_micro_batches(config, num_micro_batches):
    def loop(model, optimizer):
        losses = []
        for index, batch in enumerate(TOWER.batches(3 * num_micro_batches), 1):
            loss = square(model(**batch)) / num_micro_batches
            loss.backward()
            losses.append(loss.item())
            if index % num_micro_batches == 0:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    run_both(TOWER, config, loop)


def test_zero_grad_without_a_step_drops_the_gradients(config):
    def loop(model, optimizer):
        losses = []
        for batch in TOWER.batches(3):
            (1000 * square(model(**batch))).backward()
            optimizer.zero_grad()
            losses.append(step(model, optimizer, TOWER, batch))
        return losses

    run_both(TOWER, config, loop)


def test_two_backward_passes_through_one_graph_add_up(config):
    def loop(model, optimizer):
        losses = []
        for batch in TOWER.batches(3):
            output = model(**batch)
            square(output).backward(retain_graph=True)
            output.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(square(output).item())
        return losses

    run_both(TOWER, config, loop)


# ---------------------------------------------------------------- clipping, schedules, groups


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_by_the_optimizer_equals_torchs(config, max_norm):
    model, norms = TOWER.model(), []
    optimizer = plain_adamw(model.parameters())
    for batch in TOWER.batches(3):
        square(model(**batch)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer, found = hybrid_adam(engine.parameters(), max_grad_norm=max_norm), []
        for batch in TOWER.batches(3):
            step(engine, optimizer, TOWER, batch)
            found.append(optimizer.last_grad_norm)
        assert found == pytest.approx(norms, rel=1e-6)
        assert distance(engine.master_state_dict(), model.state_dict()) < 1e-6


def test_clipping_by_the_engine_equals_torchs(config):
    norms: dict[type, list[float]] = {GeminiDDP: [], Tower: []}

    def loop(model, optimizer):
        losses = []
        for batch in TOWER.batches(3):
            loss = square(model(**batch))
            loss.backward()
            clip = getattr(model, "clip_grad_norm_", lambda n: nn.utils.clip_grad_norm_(model.parameters(), n))
            norms[type(model)].append(float(clip(1e-3)))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    run_both(TOWER, config, loop)
    assert norms[GeminiDDP] == pytest.approx(norms[Tower], rel=1e-6)


def test_learning_rate_schedulers_work(config):
    def loop(model, optimizer):
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4)
        losses = []
        for batch in TOWER.batches(4):
            losses.append(step(model, optimizer, TOWER, batch))
            warmup.step()
        return losses

    run_both(TOWER, config, loop)


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if p.ndim > 1 and "down" not in name], "weight_decay": 0.3},
        {"params": [p for name, p in named if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-3},
        {"params": [p for name, p in named if "down.weight" in name], "lr": 0.0, "betas": (0.5, 0.9)},
    ]


def test_parameter_groups_cut_across_chunks(config):
    model = TOWER.model()
    optimizer = plain_adamw(grouped(model))
    expected = [step(model, optimizer, TOWER, batch) for batch in TOWER.batches(3)]
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(grouped(engine))
        found = [step(engine, optimizer, TOWER, batch) for batch in TOWER.batches(3)]
        assert is_close(found, expected)
        assert distance(engine.master_state_dict(), model.state_dict()) < 1e-6


# ---------------------------------------------------------------- state in and out


def test_optimizer_state_goes_over_to_torch_and_back(config):
    first, second = TOWER.batches(6)[:3], TOWER.batches(6)[3:]
    whole = train_plain(TOWER, 6)
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for batch in first:
            step(engine, optimizer, TOWER, batch)
        weights, state = engine.master_state_dict(), optimizer.state_dict()
        model = TOWER.model()
        model.load_state_dict(weights)
        plain = plain_adamw(model.parameters())
        plain.load_state_dict({**plain.state_dict(), "state": state["state"]})
        step(model, plain, TOWER, second[0])
        engine.load_state_dict(model.state_dict())
        optimizer.load_state_dict(plain.state_dict())
        for batch in second[1:]:
            step(engine, optimizer, TOWER, batch)
        assert distance(engine.master_state_dict(), whole.weights) < 1e-6


def test_a_run_goes_on_bit_by_bit_from_saved_state(config, tmp_path):
    batches = TOWER.batches(4)
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for batch in batches[:2]:
            step(engine, optimizer, TOWER, batch)
        weights, state = engine.master_state_dict(), optimizer.state_dict()
        expected = [step(engine, optimizer, TOWER, batch) for batch in batches[2:]]
        final = engine.master_state_dict()
    with GeminiDDP(TOWER.model(seed=7), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        engine.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert [step(engine, optimizer, TOWER, batch) for batch in batches[2:]] == expected
        assert same_bits(engine.master_state_dict(), final)


def test_loading_weights_amid_training_reaches_the_next_forward(config):
    other = TOWER.model(seed=7)
    with GeminiDDP(TOWER.model(), config) as engine, torch.no_grad():
        (batch,) = TOWER.batches(1)
        engine(**batch)
        engine.load_state_dict(other.state_dict())
        assert torch.equal(engine(**batch), other(**batch))


# ---------------------------------------------------------------- shapes of models


class Uneven(nn.Module):
    """One unit is larger than all others together."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), nn.Linear(HIDDEN, 50 * HIDDEN), nn.Linear(50 * HIDDEN, HIDDEN), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class InPlace(Block):
    """Overwrites its input, which its predecessor's graph does not need."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x.add_(self.down(F.relu_(self.up(self.norm(x.clone())))))


class InPlaceTower(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlace() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clone())


class Prompt(nn.Module):
    """Returns a view of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(SEQ := 16, HIDDEN))
        self.length = SEQ

    def forward(self, length: int) -> torch.Tensor:
        return self.table[:length]


class Prompted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ModuleList(Prompt() for _ in range(4))
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        prompts = [prompt(x.shape[1]) for prompt in self.prompts]
        return self.block(x + prompts[0] * prompts[1] + prompts[2] * prompts[3])


class DropsLayers(Tower):
    """Leaves out other blocks in every step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if torch.rand(()) < 0.6:
                x = block(x)
        return self.head(x)


class PartlyEmpty(Tower):
    """Has parameters without elements, in units of their own and beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.head.none = nn.Parameter(torch.zeros(3, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.none.sum() + self.head.none.sum()


@pytest.mark.parametrize("build", [Uneven, InPlaceTower, Prompted, DropsLayers, PartlyEmpty])
def test_awkward_models_train_as_in_plain_torch(config, build):
    case = Case(build, vector_batch, square)
    found, expected = train_gemini(case, config, 5), train_plain(case, 5)
    assert is_close(found.losses, expected.losses)
    assert distance(found.weights, expected.weights) < 1e-6


# ---------------------------------------------------------------- after an exception


class Fails(torch.autograd.Function):
    """An identity whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("backward failed on purpose")


class Fragile(Tower):
    """Fails in the middle, when told to."""

    fails_in = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 1 and self.fails_in == "forward":
                raise ValueError("forward failed on purpose")
            if index == 1 and self.fails_in == "interrupt":
                raise KeyboardInterrupt("interrupted on purpose")
            if index == 1 and self.fails_in == "backward":
                x = Fails.apply(x)
        return self.head(x)


@pytest.mark.parametrize("where", ["forward", "backward", "interrupt"])
def test_training_goes_on_after_an_exception_as_in_plain_torch(config, where):
    case = Case(Fragile, vector_batch, square)

    def loop(model, optimizer):
        losses = []
        for index, batch in enumerate(case.batches(4)):
            inner(model).fails_in = where if index == 1 else ""
            if index == 1:
                with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt), match="on purpose"):
                    step(model, optimizer, case, batch)
                optimizer.zero_grad()
            else:
                losses.append(step(model, optimizer, case, batch))
        return losses

    run_both(case, config, loop)


def build_fragile() -> nn.Module:
    model = Fragile(num_blocks=2)
    model.head.unused = nn.Parameter(torch.zeros(1))  # so that the gradients of its chunk are never complete
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["nvme", "device", "mixed", "resident"])
def test_gradients_of_a_backward_that_failed_wait_with_the_same_bits_everywhere(place, dtype, tmp_path):
    case = Case(build_fragile, vector_batch, square)
    (batch,) = case.batches(1)

    def norm(config: Any) -> float:
        with GeminiDDP(case.model(), config) as engine:
            for fails_in in ("backward", "", ""):
                engine.module.fails_in = fails_in
                loss = square(engine(batch["x"].to(dtype)))
                with pytest.raises(RuntimeError, match="on purpose") if fails_in else nullcontext():
                    loss.backward()
            return engine.clip_grad_norm_(1.0).item()

    assert norm(config_for(place, tmp_path, dtype=dtype)) == norm(config_for("host", dtype=dtype))
