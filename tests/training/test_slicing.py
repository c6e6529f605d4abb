"""A batch that passes through blocks in slices trains as in plain torch, moves weights once and takes less memory."""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import HIDDEN, VOCAB, ZOO, Block, Tower, square
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_says import refusal_of
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
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gemini import ConfigError, GeminiDDP, ModelError, OutOfTierMemoryError
from gemini.assembly.blueprint import draw_blueprint
from gemini.nn import use_sliced_loss
from gemini.offload.arena import HostArena
from gemini.slicing.slicer import find_repeated
from gemini.tiers import MemoryTier

SEQ = 8

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")]


def without_cache(case: Case) -> Case:
    def build() -> nn.Module:
        model = case.build()
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "use_cache"):
                module.config.use_cache = False
        return model

    return Case(build, case.batch, case.loss)


def vectors(num_rows: int) -> Callable[[torch.Generator], dict[str, torch.Tensor]]:
    return lambda generator: {"x": torch.randn(num_rows, SEQ, HIDDEN, generator=generator)}


def texts(num_rows: int) -> Callable[[torch.Generator], dict[str, torch.Tensor]]:
    """Return batches with padding, so that each row has a mask of its own."""

    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        tokens = torch.randint(5, VOCAB, (num_rows, SEQ), generator=generator)
        mask = torch.ones_like(tokens)
        mask[::2, -3:] = 0
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    return batch


TOWER = Case(Tower, vectors(6), square)
LLAMA = Case(without_cache(ZOO["llama"]).build, texts(6))
GPT2 = Case(without_cache(ZOO["gpt2"]).build, texts(6))


def assert_trains_as_in_plain_torch(case: Case, config: Any, num_steps: int = 3) -> None:
    found, expected = train_gemini(case, config, num_steps), train_plain(case, num_steps)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert distance(found.weights, expected.weights) < 1e-6


# ---------------------------------------------------------------- against plain torch

REFUSED = {
    "albert": "has no repeated blocks",  # one block, used several times
    "conv_net": "is a BatchNorm2d",
    "qwen3_moe": "output_router_logits=True",
    "recurrent": "is a LSTM",
}
UNDIVIDED = {"bloom"}
"""Passes its blocks a tensor with a row for each head of each row, which torch then refuses."""
RANDOM = {"gpt2_dropout"}


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("name", sorted(set(ZOO) - set(REFUSED) - UNDIVIDED - RANDOM))
def test_every_kind_of_model_trains_as_in_plain_torch(name):
    assert_trains_as_in_plain_torch(without_cache(ZOO[name]), config_for("device", num_batch_slices=2), num_steps=2)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_whose_rows_are_not_independent_are_refused(name):
    with pytest.raises((ConfigError, ModelError), match=REFUSED[name]):
        train_gemini(without_cache(ZOO[name]), config_for("host", num_batch_slices=2), 1)


def test_a_tensor_that_nobody_can_divide_ends_the_step():
    with pytest.raises(RuntimeError, match=refusal_of(lambda: torch.zeros(2).expand(3))):
        train_gemini(without_cache(ZOO["bloom"]), config_for("host", num_batch_slices=2), 1)


@pytest.mark.quick_cases(12)
@pytest.mark.parametrize("case", [TOWER, LLAMA, GPT2], ids=["tower", "llama", "gpt2"])
@pytest.mark.parametrize("num_batch_slices", [2, 4, 6, 9])
@pytest.mark.parametrize("place", ["host", "nvme", "device", "mixed", "resident"])
def test_batches_of_several_rows_train_as_in_plain_torch(place, num_batch_slices, case, tmp_path):
    assert_trains_as_in_plain_torch(case, config_for(place, tmp_path, num_batch_slices=num_batch_slices))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_rows=st.integers(1, 9).filter(lambda rows: rows != SEQ), num_batch_slices=st.integers(2, 10))
def test_any_batch_in_any_number_of_slices_gives_the_whole_batchs_gradients(num_rows, num_batch_slices):
    case = Case(LLAMA.build, texts(num_rows))
    plain = case.model()
    (batch,) = case.batches(1)
    plain(**batch).loss.backward()
    with GeminiDDP(case.model(), config_for("device", num_batch_slices=num_batch_slices)) as engine:
        found = gradients_of(engine, case.loss(engine(**batch)))
    assert distance(found, {name: param.grad for name, param in plain.named_parameters()}) < 1e-6


def gradients_of(engine: GeminiDDP, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run backward and return the gradients that reached host memory."""
    loss.backward()
    store, layout = engine.runtime.gradients, engine.runtime.layout
    store.finish()
    found = {}
    for chunk in layout.chunks:
        if chunk.is_trainable:
            for position in store.arrived(chunk.chunk_id):
                place = chunk.places[position]
                flat = store.home_of(chunk.chunk_id).host_buffer.view(torch.float32)[place.begin : place.end]
                found[place.spec.name] = flat.view(place.spec.shape).clone()
    return found


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["nvme", "device", "mixed", "resident"])
def test_placement_changes_no_bit(place, dtype, tmp_path):
    expected = train_gemini(LLAMA, config_for("host", dtype=dtype, num_batch_slices=3))
    found = train_gemini(LLAMA, config_for(place, tmp_path, dtype=dtype, num_batch_slices=3))
    assert found.losses == expected.losses
    assert same_bits(found.weights, expected.weights)


class Strided(nn.Module):
    """Gives its blocks what `arrange` makes of the batch."""

    def __init__(self, arrange: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.arrange = arrange
        self.enter = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(SEQ, SEQ), nn.LayerNorm(SEQ)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.arrange(self.enter(x))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x[..., 3 : 3 + SEQ],
        lambda x: x[::2, 2:, ::4],
        lambda x: x[:, :1, :SEQ].expand(-1, 5, -1),
    ],
    ids=["transposed", "narrowed", "every other", "expanded"],
)
@pytest.mark.parametrize("num_batch_slices", [3, 4])
def test_placement_changes_no_bit_of_strided_batches(arrange, num_batch_slices):
    case = Case(lambda: Strided(arrange), vectors(4), square)
    expected = train_gemini(case, config_for("host", num_batch_slices=num_batch_slices))
    found = train_gemini(case, config_for("device", num_batch_slices=num_batch_slices))
    assert same_bits(found.weights, expected.weights)


@pytest.mark.parametrize("overlap", ["off", "next-forward", "speculative"])
@pytest.mark.parametrize("place", ["nvme", "mixed"])
def test_overlapped_updates_change_no_bit(place, overlap, tmp_path):
    expected = train_gemini(LLAMA, config_for("host", overlap="off", num_batch_slices=3), 4)
    found = train_gemini(LLAMA, config_for(place, tmp_path, overlap=overlap, num_batch_slices=3), 4)
    assert found.losses == expected.losses
    assert same_bits(found.weights, expected.weights)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_slices_are_summed_in_float32():
    model = nn.Sequential(*(Scale() for _ in range(2)))
    num_rows = 257
    with GeminiDDP(model, config_for("host", dtype=torch.bfloat16, num_batch_slices=num_rows)) as engine:
        output = engine(torch.ones(num_rows, HIDDEN, dtype=torch.bfloat16))
        found = gradients_of(engine, output.sum())
    # 257 ones: in bfloat16 the sum would stay at 256; rounded once it is 256 or 258.
    assert found["1.weight"].tolist() == [torch.tensor(257.0).bfloat16().item()] * HIDDEN
    model = nn.Sequential(*(Scale() for _ in range(2)))
    with GeminiDDP(model, config_for("host", dtype=torch.bfloat16, num_batch_slices=600)) as engine:
        output = engine(torch.ones(600, HIDDEN, dtype=torch.bfloat16))
        assert gradients_of(engine, output.sum())["1.weight"].tolist() == [600.0] * HIDDEN


# ---------------------------------------------------------------- what users do


@pytest.fixture(params=["host", "device"])
def config(request):
    return config_for(request.param, num_batch_slices=3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_slices_replace_activation_checkpointing(config, use_reentrant):
    def build() -> nn.Module:
        model = LLAMA.build()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        return model

    assert_trains_as_in_plain_torch(Case(build, LLAMA.batch), config)


def count_calls(case: Case, config: Any) -> list[int]:
    """Return how many rows each call of the first MLP was given in one step."""
    with GeminiDDP(case.model(), config) as engine:
        optimizer, rows = hybrid_adam(engine.parameters()), []
        engine.module.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        step(engine, optimizer, case, case.batches(1)[0])
    return rows


def test_every_slice_runs_twice_and_no_more(config):
    def build() -> nn.Module:
        model = LLAMA.build()
        model.gradient_checkpointing_enable()
        return model

    assert count_calls(LLAMA, config) == [2] * 6
    assert count_calls(Case(build, LLAMA.batch), config) == [2] * 6


def test_lora_trains_as_in_plain_torch(config):
    peft = pytest.importorskip("peft")

    def build() -> nn.Module:
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        return peft.get_peft_model(LLAMA.build(), lora)

    assert_trains_as_in_plain_torch(Case(build, LLAMA.batch), config)


def test_frozen_blocks_stay_as_they_are(config):
    def build() -> nn.Module:
        model = Tower()
        for name, param in model.named_parameters():
            param.requires_grad_(name.startswith(("blocks.1.norm", "blocks.3")))
        return model

    assert_trains_as_in_plain_torch(Case(build, TOWER.batch, square), config)


def test_the_loss_may_run_in_slices_too(config):
    def build() -> nn.Module:
        model = LLAMA.build()
        use_sliced_loss(model, slice_size=16)
        return model

    assert_trains_as_in_plain_torch(Case(build, LLAMA.batch), config)


class Repeater(Tower):
    """Uses its blocks twice in a forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x))


def test_blocks_used_twice_get_both_gradients(config):
    assert_trains_as_in_plain_torch(Case(Repeater, TOWER.batch, square), config)


class Choosy(nn.Module):
    """A block with two branches; what the rows hold decides which, so a slice may use one that another does not."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ParameterList([torch.randn(HIDDEN), torch.randn(HIDDEN), torch.randn(HIDDEN)])

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        for index in range(2):
            chosen = (x[:, 0, 0] > 0) == bool(index)
            if chosen.any():
                x = x + self.branches[index] * chosen[:, None, None]
        return {"hidden": x, "rest": (None, x.argmax(-1))}


class ChoosyTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Choosy() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            output = block(x)
            x = output["hidden"] + output["rest"][1].unsqueeze(-1)
        return x


def test_parameters_that_some_slices_or_all_leave_unused(config):
    case = Case(ChoosyTower, TOWER.batch, square)
    with GeminiDDP(case.model(), config) as engine:
        found = gradients_of(engine, square(engine(**case.batches(1)[0])))
    plain = case.model()
    square(plain(**case.batches(1)[0])).backward()
    expected = {name: param.grad for name, param in plain.named_parameters() if param.grad is not None}
    assert "blocks.0.branches.2" not in expected
    assert distance(found, expected) < 1e-6


class Shared(nn.Module):
    """A block that takes a tensor with a gradient which belongs to no row."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Block()

    def forward(self, x: torch.Tensor, *, shift: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, None]:
        return self.own(x) * shift[0] + shift[1], None


class SharedTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, SEQ, HIDDEN))
        self.blocks = nn.ModuleList(Shared() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, shift=(self.shift.exp(), rows))[0]
        return x


def test_gradients_of_further_arguments_are_those_of_the_batch(config):
    config = replace(config, batch_arguments=("shift",))
    assert_trains_as_in_plain_torch(Case(SharedTower, TOWER.batch, square), config)


class Heads(nn.Module):
    """A block that takes a bias for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (4, -1)).transpose(1, 2)
        scores = heads @ heads.mT + bias
        return x + self.project((scores.softmax(-1) @ heads).transpose(1, 2).flatten(2))


class HeadsTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, SEQ, SEQ))
        self.blocks = nn.ModuleList(Heads() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, self.bias)
        return x


def test_an_argument_as_long_as_the_batch_by_chance_is_not_cut(config):
    case = Case(HeadsTower, vectors(4), square)
    assert_trains_as_in_plain_torch(Case(HeadsTower, vectors(6), square), config)
    with pytest.raises(ModelError, match=r"of block blocks\.0 \(Heads\) has shape .*shared by all rows"):
        train_gemini(case, config, 1)
    assert_trains_as_in_plain_torch(case, replace(config, shared_arguments=("bias",)))


def test_gradients_accumulate_over_batches(config):
    batches = TOWER.batches(4)
    plain = TOWER.model()
    optimizer = plain_adamw(plain.parameters())
    for batch in batches:
        (square(plain(**batch)) / 4).backward()
    optimizer.step()
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for batch in batches:
            (square(engine(**batch)) / 4).backward()
        optimizer.step()
        assert distance(engine.master_state_dict(), plain.state_dict()) < 1e-6


def test_backward_twice_through_one_graph_adds_up(config):
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
        output = model(**batch)
        square(output).backward(retain_graph=True)
        output.mean().backward()
        optimizer.step()

    plain, (batch,) = TOWER.model(), TOWER.batches(1)
    loop(plain, plain_adamw(plain.parameters()), batch)
    with GeminiDDP(TOWER.model(), config) as engine:
        loop(engine, hybrid_adam(engine.parameters()), batch)
        assert distance(engine.master_state_dict(), plain.state_dict()) < 1e-6


def test_evaluating_and_generating_give_what_unsliced_blocks_give(config):
    model = ZOO["llama"].model().eval()
    (batch,) = LLAMA.batches(1)
    prompt = batch["input_ids"][:, :4]
    with GeminiDDP(ZOO["llama"].model().eval(), config) as engine, torch.no_grad():
        assert torch.equal(engine(**batch).logits, model(**batch).logits)
        found = engine.module.generate(prompt, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, model.generate(prompt, max_new_tokens=4, do_sample=False))


def test_autocast_of_the_forward_holds_in_backward(config):
    def gradients(model: nn.Module, backward: Callable[[torch.Tensor], Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**TOWER.batches(1)[0])
        assert output.dtype is torch.bfloat16
        return backward(square(output.float()))

    plain = TOWER.model()
    gradients(plain, torch.Tensor.backward)
    with GeminiDDP(TOWER.model(), config) as engine:
        found = gradients(engine, lambda loss: gradients_of(engine, loss))
    # The gradients of weights are rounded to bfloat16 for each slice, and not for the batch.
    assert distance(found, {name: param.grad for name, param in plain.named_parameters()}) < 1e-2


class Dropping(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5)


def test_dropout_is_the_same_in_backward(config):
    """Each block's gradient agrees with a finite difference of the loss at the same random numbers."""

    class Dropper(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Dropping() for _ in range(3))

    case = Case(Dropper, vectors(6), square)
    (batch,) = case.batches(1)
    x = batch["x"].requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def loss_at(engine: GeminiDDP, value: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return engine(value).square().double().sum()

    with GeminiDDP(case.model(), config) as engine:
        loss_at(engine, x).backward()
        after = torch.rand(())
        epsilon = 1e-2
        above, below = (loss_at(engine, (x + sign * epsilon * direction)).item() for sign in (1, -1))
    slope = (x.grad * direction).sum().item()
    assert (above - below) / (2 * epsilon) == pytest.approx(slope, rel=2e-3)
    torch.manual_seed(5)
    for _ in range(3 * 3):  # a draw for each slice of each block in forward, and none in backward
        F.dropout(torch.ones(2, SEQ, HIDDEN), 0.5)
    assert torch.rand(()) == after


def test_checkpointing_by_hand_around_sliced_blocks(config):
    class Checkpointed(Tower):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    assert_trains_as_in_plain_torch(Case(Checkpointed, TOWER.batch, square), config)


def test_a_closed_engine_gives_the_blocks_their_forward_back(config):
    model = TOWER.model()
    with GeminiDDP(model, config):
        assert "forward" in vars(model.blocks[0])
    assert "forward" not in vars(model.blocks[0])


# ---------------------------------------------------------------- traffic


def traffic_of(case: Case, config: Any, *, num_micro_batches: int = 1) -> dict[str, int]:
    """Return what one warm step moves; without overlap, in which how much is found in memory is a matter of time."""
    (batch,) = case.batches(1)
    with GeminiDDP(case.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        transfers, moved = engine.runtime.resources.transfers, {"down": 0, "up": 0}

        def counting(name: str, copy: Callable[..., Any]) -> Callable[..., Any]:
            def call(dst: torch.Tensor, src: torch.Tensor, **options: Any) -> Any:
                moved[name] += src.nbytes
                return copy(dst, src, **options)

            return call

        transfers.download, transfers.upload = counting("down", transfers.download), counting("up", transfers.upload)
        reports = []
        for _ in range(3):
            moved.update(down=0, up=0)
            before = engine.memory_report()
            for part in zip(*(tensor.chunk(num_micro_batches) for tensor in batch.values()), strict=True):
                case.loss(engine(**dict(zip(batch, part, strict=True)))).backward()
            optimizer.step()
            engine.runtime.finish_updates()
            after = engine.memory_report()
            fields = ("num_fetches", "fetched_nbytes", "nvme_read_nbytes", "nvme_written_nbytes")
            reports.append({**{name: getattr(after, name) - getattr(before, name) for name in fields}, **moved})
    return reports[-1]


@pytest.mark.parametrize("place", ["nvme", "device", "mixed"])
def test_traffic_does_not_depend_on_the_number_of_slices(place, tmp_path):
    case = Case(lambda: Tower(8), vectors(8), square)
    expected = traffic_of(case, config_for(place, tmp_path, overlap="off"))
    assert expected["num_fetches"] > 0
    if place != "nvme":  # what each block was given goes to host memory and comes back
        assert expected["down"] > 0
        expected["down"] += 8 * 8 * SEQ * HIDDEN * 4
        expected["up"] += 8 * 8 * SEQ * HIDDEN * 4
    for num_batch_slices in (2, 4, 8):
        assert (
            traffic_of(case, config_for(place, tmp_path, overlap="off", num_batch_slices=num_batch_slices)) == expected
        )


@pytest.mark.parametrize("place", ["nvme", "device"])
def test_accumulating_over_as_many_micro_batches_moves_more(place, tmp_path):
    case = Case(lambda: Tower(8), vectors(8), square)
    sliced = traffic_of(case, config_for(place, tmp_path, overlap="off", num_batch_slices=4))
    accumulated = traffic_of(case, config_for(place, tmp_path, overlap="off"), num_micro_batches=4)
    assert accumulated["num_fetches"] > 3 * sliced["num_fetches"]


@pytest.mark.parametrize("place", ["nvme", "device"])
def test_blocks_are_fetched_once_forward_and_once_backward(place, tmp_path):
    case = Case(lambda: Tower(8), vectors(8), square)
    fetches = traffic_of(case, config_for(place, tmp_path, overlap="off", num_batch_slices=4))["num_fetches"]
    # Eight blocks and the head, twice; what is still in a slot at either turn of the step is not fetched again.
    assert 2 * 9 - 6 <= fetches <= 2 * 9


# ---------------------------------------------------------------- memory


class Wide(Block):
    """A block whose activations are far larger than what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 16 * HIDDEN)
        self.down = nn.Linear(16 * HIDDEN, HIDDEN)


def peak_nbytes(num_batch_slices: int, *, num_blocks: int = 4, place: str = "host") -> int:
    """Return what activations and temporaries of a step on 64 rows take in compute memory at their peak."""
    model = nn.Sequential(*(Wide() for _ in range(num_blocks)))
    with GeminiDDP(model, config_for(place, num_batch_slices=num_batch_slices)) as engine:
        x = torch.randn(64, SEQ, HIDDEN)
        with engine.trace_memory():
            engine(x).sum().backward()
        peak = engine.memory_report().non_model_peak_nbytes
    assert peak is not None
    return peak


BATCH_NBYTES = 64 * SEQ * HIDDEN * 4


def test_activations_take_what_a_slice_takes():
    peaks = {num_slices: peak_nbytes(num_slices) for num_slices in (1, 2, 4, 8, 16)}
    # What grows with the batch: two tensors of 16 times its width at once, and narrow ones, for each slice ...
    for fewer, more in ((2, 4), (4, 8), (8, 16)):
        saved = (peaks[fewer] - peaks[more]) / BATCH_NBYTES
        assert 32 * (1 / fewer - 1 / more) <= saved <= 52 * (1 / fewer - 1 / more)
    # ... where without slices every block keeps two.
    assert peaks[1] > 4 * 32 * BATCH_NBYTES


def test_a_further_block_adds_what_it_is_given_and_nothing_else():
    assert peak_nbytes(8, num_blocks=8) - peak_nbytes(8, num_blocks=4) == 4 * BATCH_NBYTES


def test_a_further_block_adds_nothing_on_a_device():
    assert peak_nbytes(8, num_blocks=8, place="device") <= peak_nbytes(8, num_blocks=4, place="device") + BATCH_NBYTES


def checkpoint_nbytes(engine: GeminiDDP) -> int:
    """Return the host memory that activation checkpoints take, those whose buffers wait for another use included."""
    return engine.runtime.resources.ledger.by_purpose(MemoryTier.HOST).get("activation checkpoints", 0)


def test_checkpoints_take_one_batch_for_each_block_and_are_used_again():
    case = Case(lambda: Tower(8), vectors(64), square)
    with GeminiDDP(case.model(), config_for("device", num_batch_slices=4)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for batch in case.batches(3):
            step(engine, optimizer, case, batch)
            assert checkpoint_nbytes(engine) == 8 * BATCH_NBYTES
        square(engine(**vectors(128)(torch.Generator()))).backward()
        assert checkpoint_nbytes(engine) == 8 * 2 * BATCH_NBYTES
        square(engine(**vectors(96)(torch.Generator()))).backward()
        assert checkpoint_nbytes(engine) == 8 * 2 * BATCH_NBYTES
        square(engine(**vectors(32)(torch.Generator()))).backward()
        assert checkpoint_nbytes(engine) == 8 * BATCH_NBYTES // 2


def test_checkpoints_of_a_graph_that_nobody_needs_are_used_again():
    case = Case(lambda: Tower(8), vectors(64), square)
    with GeminiDDP(case.model(), config_for("device", num_batch_slices=4)) as engine:
        for batch in case.batches(3):
            output = engine(**batch)
            del output
            assert checkpoint_nbytes(engine) == 8 * BATCH_NBYTES


def test_several_graphs_at_once_have_checkpoints_of_their_own():
    case = Case(lambda: Tower(8), vectors(6), square)
    plain = case.model()
    sum(square(plain(**batch)) for batch in case.batches(3)).backward()
    with GeminiDDP(case.model(), config_for("device", num_batch_slices=4)) as engine:
        found = gradients_of(engine, sum(square(engine(**batch)) for batch in case.batches(3)))
    assert distance(found, {name: param.grad for name, param in plain.named_parameters()}) < 1e-6


def test_checkpoints_without_room_are_refused_and_the_engine_goes_on():
    case = Case(lambda: Tower(8), vectors(64), square)
    with GeminiDDP(case.model(), config_for("device", num_batch_slices=4)) as engine:
        ledger = engine.runtime.resources.ledger
        budget = ledger.held_nbytes(MemoryTier.HOST) + 3 * BATCH_NBYTES
    with GeminiDDP(case.model(), config_for("device", num_batch_slices=4, host_budget=budget)) as engine:
        with pytest.raises(OutOfTierMemoryError, match="^activation checkpoints: no room in host memory for 64.00 KiB"):
            engine(**case.batches(1)[0])
        gc.collect()  # the error's traceback holds what forward had done
        optimizer = hybrid_adam(engine.parameters())
        small = vectors(16)(torch.Generator())
        found = square(engine(**small))
        found.backward()
        optimizer.step()
        assert found.item() == pytest.approx(square(case.model()(**small)).item(), rel=1e-6)


def test_the_plan_leaves_room_for_checkpoints(tmp_path):
    def host_nbytes(**fields: Any) -> int:
        config = config_for("mixed", tmp_path, placement="auto", host_budget="2MiB", device_budget="1MiB", **fields)
        return draw_blueprint(Tower(64), config).memory.total(MemoryTier.HOST)

    mib = 1 << 20
    assert host_nbytes() > 1.9 * mib
    assert host_nbytes(num_batch_slices=2) <= 1.8 * mib
    assert host_nbytes(num_batch_slices=2, checkpoint_reserve="1MiB") <= mib
    assert host_nbytes(num_batch_slices=2, checkpoint_reserve=1) > 1.9 * mib


def test_no_graph_outlives_its_loss(config):
    with GeminiDDP(nn.Sequential(Block(), Block()), config) as engine:
        output = engine(torch.randn(6, SEQ, HIDDEN))
        kept = weakref.ref(output.grad_fn.sliced)
        gc.disable()
        try:
            del output
            assert kept() is None
        finally:
            gc.enable()


# ---------------------------------------------------------------- what goes wrong


class Faulty(Block):
    fail_at: str | None = None
    num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Faulty.num_calls += 1
        where = "backward" if x.requires_grad else "forward"
        if Faulty.fail_at == where and Faulty.num_calls % 3 == 2:
            raise RuntimeError(f"fault in {where}")
        return super().forward(x)


class FaultyTower(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Faulty() for _ in range(3))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_failed_in_a_slice_leaves_nothing_behind(config, where, monkeypatch):
    case = Case(FaultyTower, vectors(6), square)
    first, *others = case.batches(3)
    with GeminiDDP(case.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        monkeypatch.setattr(Faulty, "fail_at", where)
        monkeypatch.setattr(Faulty, "num_calls", 0)
        with pytest.raises(RuntimeError, match=f"fault in {where}"):
            step(engine, optimizer, case, first)
        monkeypatch.setattr(Faulty, "fail_at", None)
        optimizer.zero_grad()
        found = [step(engine, optimizer, case, batch) for batch in others]
        weights = engine.master_state_dict()
    plain = case.model()
    reference = plain_adamw(plain.parameters())
    assert is_close(found, [step(plain, reference, case, batch) for batch in others])
    assert distance(weights, plain.state_dict()) < 1e-6


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return super().forward(x)


class Writing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return super().forward(x)


class Summing(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x.sum()


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Counting, r"block 0 \(Counting\) wrote to its buffer num_calls"),
        (Writing, r"block 0 \(Writing\) wrote to its argument 0"),
        (Summing, r"block 0 \(Summing\) returned a tensor of shape \(\) for a slice of 2 rows"),
        (
            SequenceFirst,
            r"attention of block 0 \(SequenceFirst\) is a MultiheadAttention whose inputs and outputs do not all have",
        ),
        (lambda: nn.BatchNorm1d(SEQ), r"block 0 \(BatchNorm1d\) is a BatchNorm1d"),
    ],
)
def test_blocks_that_cannot_run_in_slices_are_refused_by_name(block, message):
    model = nn.Sequential(block(), block())
    with (
        pytest.raises(ModelError, match=message),
        GeminiDDP(model, config_for("host", num_batch_slices=3)) as engine,
    ):
        engine(torch.randn(6, SEQ, HIDDEN) * 1)


def test_batch_norm_in_evaluation_mode_is_fine(config):
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(SEQ)) for _ in range(2)))

    def loss(model: nn.Module) -> torch.Tensor:
        model.eval()
        return square(model(vectors(6)(torch.Generator().manual_seed(0))["x"]))

    case = Case(build, vectors(6), square)
    plain = case.model()
    loss(plain).backward()
    with GeminiDDP(case.model(), config) as engine:
        found = gradients_of(engine, loss(engine))
    assert distance(found, {name: param.grad for name, param in plain.named_parameters()}) < 1e-6


def test_caches_are_refused_in_training():
    argument = name_of_cache_in(LlamaDecoderLayer)
    with pytest.raises(
        ModelError, match=rf"\['{argument}'\] of block model\.layers\.0 .* is a {DynamicCache.__name__}"
    ):
        train_gemini(ZOO["llama"], config_for("host", num_batch_slices=2), 1)


def name_of_cache_in(block: type[nn.Module]) -> str:
    """Return what a block calls its cache, which transformers has renamed before."""
    params = inspect.signature(block.forward).parameters.values()
    (name,) = (param.name for param in params if re.search(rf"\b{Cache.__name__}\b", str(param.annotation)))
    return name


def test_hooks_on_gradients_are_refused(config):
    with GeminiDDP(TOWER.model(), config) as engine:
        engine.module.blocks[1].up.weight.register_hook(lambda grad: 2 * grad)
        with pytest.raises(ModelError, match=r"up\.weight of block blocks\.1 \(Block\) has a gradient hook"):
            engine(**TOWER.batches(1)[0])


def test_backward_after_the_weights_have_changed_is_refused(config):
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        loss = square(engine(**TOWER.batches(1)[0]))
        step(engine, optimizer, TOWER, TOWER.batches(1)[0])
        with pytest.raises(ModelError, match="weights have changed since its forward"):
            loss.backward()


def test_gradients_of_gradients_are_refused(config):
    with GeminiDDP(TOWER.model(), config) as engine:
        loss = square(engine(**TOWER.batches(1)[0]))
        with pytest.raises(ModelError, match="create_graph=True cannot go through"):
            loss.backward(create_graph=True)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
def test_the_number_of_slices_is_checked(value):
    with pytest.raises(ConfigError, match=r"^GeminiConfig\.num_batch_slices: expected an int"):
        config_for("host", num_batch_slices=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_arguments": "mask"}, r"^GeminiConfig\.batch_arguments: expected a tuple of names, got 'mask'"),
        ({"shared_arguments": (1,)}, r"^GeminiConfig\.shared_arguments: expected a tuple of names"),
        ({"batch_arguments": ("a", "b"), "shared_arguments": ("b",)}, "shared_arguments: expected none .*got b"),
    ],
)
def test_names_of_arguments_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        config_for("host", **fields)


def test_repeated_blocks_differ_in_numbers_only():
    class_names = {
        "embed.words": "Embedding",
        "embed.places": "Embedding",
        "h.0": "Layer",
        "h.1": "Layer",
        "h.2": "Other",
        "stages.0.blocks.0": "Stage",
        "stages.1.blocks.0": "Stage",
        "layer1": "Linear",
        "layer2": "Linear",
    }
    assert find_repeated(class_names) == {"h.0", "h.1", "stages.0.blocks.0", "stages.1.blocks.0"}


def test_batches_of_many_lengths_take_few_buffers(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    allocate = HostArena.allocate

    def watched(self: HostArena, nbytes: int, purpose: str, **fields: Any) -> torch.Tensor:
        if purpose == "activation checkpoints":
            sizes.append(nbytes)
        return allocate(self, nbytes, purpose, **fields)

    monkeypatch.setattr(HostArena, "allocate", watched)
    case = Case(lambda: Tower(8), vectors(64), square)
    with GeminiDDP(case.model(), config_for("device", num_batch_slices=4)) as engine:
        for num_rows in (64, 60, 33, 48, 64, 50, 62, 40):
            square(engine(**vectors(num_rows)(torch.Generator()))).backward()
        assert sizes == [BATCH_NBYTES] * 8
        square(engine(**vectors(68)(torch.Generator()))).backward()  # one exchange for each block
        assert sizes[8:] == [BATCH_NBYTES * 9 // 8] * 8
        assert checkpoint_nbytes(engine) == 8 * BATCH_NBYTES * 9 // 8
