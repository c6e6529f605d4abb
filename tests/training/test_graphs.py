"""What users do with autograd and the compiler gives what plain torch gives, in every placement."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from model_zoo import HF_CASES, Tower, square, vector_batch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_harness import (
    Case,
    config_for,
    distance,
    hybrid_adam,
    is_close,
    plain_adamw,
    step,
    train_gemini,
    train_plain,
)

from gemini import GeminiDDP, ModelError

TOWER = Case(Tower, vector_batch, square)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(params=["host", "nvme", "device"])
def config(request, tmp_path):
    return config_for(request.param, tmp_path)


def assert_trains_as_in_plain_torch(case: Case, config: Any, num_steps: int = 3) -> None:
    found, expected = train_gemini(case, config, num_steps), train_plain(case, num_steps)
    assert is_close(found.losses, expected.losses)
    assert distance(found.weights, expected.weights) < 1e-6


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "mixtral"])
def test_hugging_face_checkpointing_works(config, name, use_reentrant):
    def build() -> nn.Module:
        model = HF_CASES[name].build()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        return model

    assert_trains_as_in_plain_torch(Case(build, HF_CASES[name].batch), config)


class Checkpointed(Tower):
    """Recomputes runs of blocks, which are several units."""

    run_length = 1
    use_reentrant = False
    hooks: Callable[[], Any] = nullcontext

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        for begin in range(0, len(self.blocks), self.run_length):
            run = list(self.blocks[begin : begin + self.run_length])
            with type(self).hooks():
                x = checkpoint(_run, run, x, use_reentrant=self.use_reentrant)
        return self.head(x)


def _run(blocks: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


class OnCpu(Checkpointed):
    hooks = torch.autograd.graph.save_on_cpu


def checkpointed(cls: type[Checkpointed], run_length: int, *, use_reentrant: bool) -> Case:
    def build() -> nn.Module:
        model = cls(num_blocks=6)
        model.run_length, model.use_reentrant = run_length, use_reentrant
        return model

    return Case(build, vector_batch, square)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("run_length", [1, 2, 6])
def test_checkpointing_of_one_and_of_several_units_works(config, run_length, use_reentrant):
    assert_trains_as_in_plain_torch(checkpointed(Checkpointed, run_length, use_reentrant=use_reentrant), config)


def test_checkpointing_works_within_the_users_own_saved_tensor_hooks(config):
    assert_trains_as_in_plain_torch(checkpointed(OnCpu, 2, use_reentrant=False), config)


def test_checkpointing_the_whole_engine_works(config):
    model, losses = TOWER.model(), []
    optimizer = plain_adamw(model.parameters())
    expected = [step(model, optimizer, TOWER, batch) for batch in TOWER.batches(3)]
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for batch in TOWER.batches(3):
            losses.append(step(lambda x: checkpoint(engine, x, use_reentrant=False), optimizer, TOWER, batch))
        assert distance(engine.master_state_dict(), model.state_dict()) < 1e-6
    assert is_close(losses, expected)


def test_the_users_own_saved_tensor_hooks_see_activations_and_no_weights(config):
    shapes: set[tuple[int, ...]] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor.clone()

    def call(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return square(model(**batch))

    (batch,) = TOWER.batches(1)
    model = TOWER.model()
    call(model, batch).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    shapes.clear()
    with GeminiDDP(TOWER.model(), config) as engine:
        call(engine, batch).backward()
        assert float(engine.clip_grad_norm_(1.0)) == pytest.approx(float(norm), rel=1e-6)
        is_streamed = not any(chunk.is_resident for chunk in engine.runtime.core.chunks)
    assert (2, 16, 32) in shapes
    assert not is_streamed or (64, 32) not in shapes


# ---------------------------------------------------------------- gradients of gradients


def test_a_gradient_penalty_is_differentiated_as_in_plain_torch(config):
    def penalised(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        x = batch["x"].clone().requires_grad_()
        loss = square(model(x))
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()

    model, (batch,) = TOWER.model(), TOWER.batches(1)
    expected = penalised(model, batch)
    expected.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with GeminiDDP(TOWER.model(), config) as engine:
        loss = penalised(engine, batch)
        loss.backward()
        assert loss.item() == expected.item()
        assert float(engine.clip_grad_norm_(1.0)) == pytest.approx(float(norm), rel=1e-6)


def test_gradients_of_inputs_alone_leave_no_gradients_of_parameters(config):
    (batch,) = TOWER.batches(1)
    model, x = TOWER.model(), batch["x"].requires_grad_()
    (expected,) = torch.autograd.grad(square(model(x)), x)
    with GeminiDDP(TOWER.model(), config) as engine:
        (found,) = torch.autograd.grad(square(engine(x)), x)
        assert engine.clip_grad_norm_(1.0).item() == 0.0
    assert torch.equal(found, expected)


# ---------------------------------------------------------------- torch.compile


def compile_in_place(model: nn.Module, **options: Any) -> None:
    for block in model.blocks:
        block.compile(**options)


def compile_and_replace(model: nn.Module, **options: Any) -> None:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, **options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compile_blocks", [compile_in_place, compile_and_replace])
def test_compiled_blocks_train_as_in_plain_torch(config, compile_blocks, backend):
    def build() -> nn.Module:
        torch._dynamo.reset()
        model = Tower(num_blocks=3)
        compile_blocks(model, backend=backend)
        return model

    assert_trains_as_in_plain_torch(Case(build, vector_batch, square), config)


# ---------------------------------------------------------------- nothing stays behind


class Doomed(Tower):
    """Remembers an activation, then fails in the middle of a block."""

    error: type[BaseException] = ValueError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x).exp()
        self.seen = weakref.ref(x)
        self.blocks[1](x)
        raise self.error("failed on purpose")


def state_of_torch() -> tuple[int, Any]:
    """Return what an engine could leave behind: torch function modes and saved-tensor hooks."""
    return torch._C._len_torch_function_stack(), torch._C._autograd._top_saved_tensors_default_hooks(True)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("attribute", ["module", "forward"])
def test_a_failed_forward_leaves_nothing_behind_in_torch(config, error, attribute):
    case = Case(Doomed, vector_batch, square)
    (batch,) = case.batches(1)
    with GeminiDDP(case.model(), config) as engine:
        engine.module.error = error
        for _ in range(3):  # as many as there are slots and more
            with pytest.raises(error, match="on purpose"):
                getattr(engine, attribute)(**batch)
        if attribute == "forward":
            assert state_of_torch() == (0, None)
    assert state_of_torch() == (0, None)


def test_an_interrupted_recomputation_leaves_nothing_behind_in_torch(config):
    class Interrupted(Checkpointed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            self.blocks[2].up.forward = _interrupt
            return output

    case = Case(Interrupted, vector_batch, square)
    with GeminiDDP(case.model(), config) as engine:
        loss = square(engine(**case.batches(1)[0]))
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            loss.backward()
        del engine.module.blocks[2].up.forward
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            square(engine(**case.batches(1)[0])).backward()
    assert state_of_torch() == (0, None)


def _interrupt(x: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt("interrupted on purpose")


def test_a_graph_that_is_dropped_frees_its_activations(config):
    class Watched(Tower):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x).exp()  # exp saves its own result
            self.seen = weakref.ref(x)
            return self.head(x)

    case = Case(Watched, vector_batch, square)
    with GeminiDDP(case.model(), config) as engine:
        gc.collect()
        gc.disable()
        try:
            engine(**case.batches(1)[0])
            assert engine.module.seen() is None
        finally:
            gc.enable()


def test_changing_a_saved_tensor_in_place_is_refused(config):
    class Spoils(Tower):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x).exp()
            x += 1
            return self.head(x)

    case = Case(Spoils, vector_batch, square)
    with GeminiDDP(case.model(), config) as engine, pytest.raises(RuntimeError, match="modified in place"):
        square(engine(**case.batches(1)[0])).backward()


@pytest.mark.parametrize("compiled", [torch.compile, lambda model: model.compile() or model], ids=["wrapper", "method"])
def test_a_model_that_is_compiled_as_a_whole_is_refused_unless_its_weights_stay(compiled, tmp_path) -> None:
    with pytest.raises(ModelError, match="compiled as a whole, and some of its weights are not always in compute mem"):
        GeminiDDP(compiled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), config_for("nvme", tmp_path))
    GeminiDDP(compiled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), config_for("host")).close()
