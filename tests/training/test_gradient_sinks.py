"""Gradients that uses of a parameter deliver by themselves: autograd's bits and rules, and less memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_storages import LiveStorages
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_harness import PLACEMENTS, Case, config_for, hybrid_adam, same_bits, step

from gemini import GeminiDDP, ModelError
from gemini.nn import linear_cross_entropy

VOCAB, HIDDEN, ROWS = 200, 32, 8
WEIGHT_NBYTES = 4 * VOCAB * HIDDEN


class Tied(nn.Module):
    """An embedding that is also the output layer, and, if asked, is used twice more."""

    def __init__(self, *, is_sliced: bool, num_uses: int = 2, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN, padding_idx=padding_idx)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.is_sliced, self.num_uses = is_sliced, num_uses

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        if self.num_uses > 2:
            hidden = hidden + self.embedding(ids.flip(0)) + F.softmax(self.head(hidden), -1) @ self.head.weight
        if self.is_sliced:
            return linear_cross_entropy(hidden, self.head.weight, ids.roll(1), slice_size=33)
        return F.cross_entropy(self.head(hidden), ids.roll(1))


def token_ids(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, VOCAB // 4, (ROWS,), generator=generator)}  # some more than once


def case_of(build: Callable[[], nn.Module]) -> Case:
    return Case(build=build, batch=token_ids, loss=lambda loss: loss)


each_head = pytest.mark.parametrize("is_sliced", [False, True])
CASES = {
    "linear": case_of(lambda: Tied(is_sliced=False)),
    "sliced": case_of(lambda: Tied(is_sliced=True)),
    "linear, five uses": case_of(lambda: Tied(is_sliced=False, num_uses=5)),
    "sliced, five uses": case_of(lambda: Tied(is_sliced=True, num_uses=5)),
    "padding": case_of(lambda: Tied(is_sliced=True, padding_idx=3)),
}


def waiting_gradient(engine: GeminiDDP, name: str = "embedding.weight") -> torch.Tensor:
    """Return a copy of a gradient that waits in host memory."""
    runtime = engine.runtime
    runtime.gradients.finish()
    place = runtime.layout.place_by_name[name]
    buffer = runtime.gradients.home_of(place.chunk_id).host_buffer
    assert buffer is not None
    flat = buffer.view(runtime.gradients.dtype_of(place.chunk_id))[place.begin : place.end]
    return flat.view(place.spec.shape).clone()


def through_autograd(engine: GeminiDDP) -> None:
    """Let autograd add all uses up: a hook on a parameter must see its gradient whole."""
    for param in engine.parameters():
        param.register_hook(lambda grad: None)


def train(case: Case, config: Any, prepare: Callable[[GeminiDDP], None] = lambda engine: None) -> Any:
    """Return losses, gradient norms and weights of two steps, the second of two backward passes."""
    with GeminiDDP(case.model(), config) as engine:
        prepare(engine)
        optimizer = hybrid_adam(engine.parameters())
        batches = case.batches(3)
        losses = [step(engine, optimizer, case, batches[0])]
        for batch in batches[1:]:
            loss = engine(**batch)
            loss.backward()
            losses.append(loss.item())
        norm = engine.clip_grad_norm_(1.0).item()
        optimizer.step()
        return losses, norm, engine.master_state_dict()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", PLACEMENTS)
def test_uses_that_deliver_by_themselves_give_the_bits_that_autograd_gives(
    name: str, place: str, tmp_path: Path
) -> None:
    config = config_for(place, tmp_path)
    expected = train(CASES[name], config_for("host"), through_autograd)

    losses, norm, weights = train(CASES[name], config)

    assert losses == expected[0]
    assert norm == expected[1]
    assert same_bits(weights, expected[2])


@pytest.mark.parametrize("name", CASES)
def test_the_waiting_gradient_is_torchs(name: str) -> None:
    case = CASES[name]
    plain, batch = case.model(), case.batches(1)[0]
    plain(**batch).backward()

    with GeminiDDP(case.model(), config_for("host")) as engine:
        engine(**batch).backward()
        found = waiting_gradient(engine)
        norm = engine.clip_grad_norm_(1e9).item()

    assert torch.equal(found, plain.embedding.weight.grad)
    assert norm == pytest.approx(torch.stack([p.grad.double().norm() for p in plain.parameters()]).norm().item())


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("name", ["linear", "sliced"])
def test_half_precision_gradients_have_the_same_bits_everywhere(name: str, accumulates: bool, tmp_path: Path) -> None:
    case = CASES[name]

    def run(place: str) -> dict[str, torch.Tensor]:
        config = config_for(place, tmp_path, dtype=torch.bfloat16, gradient_accumulation=accumulates)
        with GeminiDDP(case.model(), config) as engine:
            optimizer = hybrid_adam(engine.parameters())
            for batch in case.batches(2):
                step(engine, optimizer, case, batch)
            return engine.master_state_dict()

    expected = run("host")

    assert all(same_bits(run(place), expected) for place in PLACEMENTS if place != "host")


def test_two_uses_are_one_gradient_but_two_backward_passes_are_not() -> None:
    case = CASES["sliced"]
    config = config_for("host", dtype=torch.bfloat16, gradient_accumulation=False)
    with GeminiDDP(case.model(), config) as engine:
        batch = case.batches(1)[0]
        engine(**batch).backward()

        with pytest.raises(ModelError, match="a second gradient for"):
            engine(**batch).backward()


# ---------------------------------------------------------------- memory


def memory_of_backward(model: nn.Module, prepare: Callable[[GeminiDDP], None] = lambda engine: None) -> LiveStorages:
    with GeminiDDP(model, config_for("host")) as engine:
        prepare(engine)
        loss = engine(**CASES["linear"].batches(1)[0])
        with LiveStorages(large_nbytes=WEIGHT_NBYTES) as live:
            loss.backward()
    return live


def test_no_dense_gradient_of_a_tied_weight_exists_outside_its_slot_with_the_sliced_loss() -> None:
    live = memory_of_backward(Tied(is_sliced=True))

    assert live.peak_num_large == 0
    assert live.peak_nbytes < WEIGHT_NBYTES


def test_only_the_heads_dense_gradient_exists_with_a_plain_head() -> None:
    assert memory_of_backward(Tied(is_sliced=False)).peak_num_large == 1


@each_head
def test_autograd_keeps_two(is_sliced: bool) -> None:
    """What the two tests above avoid, and their tracker sees."""
    assert memory_of_backward(Tied(is_sliced=is_sliced), through_autograd).peak_num_large >= 2


def test_an_untied_embedding_needs_no_dense_gradient_either() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, 1))
    with GeminiDDP(model, config_for("host")) as engine:
        loss = engine(torch.arange(4)).sum()
        with LiveStorages() as live:
            loss.backward()

    assert live.peak_nbytes < WEIGHT_NBYTES


# ---------------------------------------------------------------- rules of autograd


@each_head
def test_gradients_asked_for_are_returned_and_not_kept(is_sliced: bool) -> None:
    case = CASES["sliced" if is_sliced else "linear"]
    plain, batch = case.model(), case.batches(1)[0]
    (expected,) = torch.autograd.grad(plain(**batch), plain.embedding.weight)

    with GeminiDDP(case.model(), config_for("host")) as engine:
        (found,) = torch.autograd.grad(engine(**batch), engine.module.embedding.weight)

        assert torch.equal(found, expected)
        assert engine.runtime.gradients.names() == set()


def test_backward_into_other_parameters_leaves_the_tied_one_alone() -> None:
    case = CASES["sliced"]
    with GeminiDDP(case.model(), config_for("host")) as engine:
        engine(**case.batches(1)[0]).backward(inputs=[engine.module.body.weight])

        assert engine.runtime.gradients.names() == {"body.weight"}


@pytest.mark.parametrize("when", ["before forward", "before backward"])
@each_head
def test_hooks_on_a_parameter_see_its_whole_gradient(is_sliced: bool, when: str) -> None:
    case = CASES["sliced" if is_sliced else "linear"]
    plain, batch = case.model(), case.batches(1)[0]
    plain(**batch).backward()

    with GeminiDDP(case.model(), config_for("host")) as engine:
        weight = engine.module.embedding.weight
        if when == "before forward":
            weight.register_hook(lambda grad: 2 * grad)
        loss = engine(**batch)
        if when == "before backward":
            weight.register_hook(lambda grad: 2 * grad)
        loss.backward()

        assert torch.equal(waiting_gradient(engine), 2 * plain.embedding.weight.grad)


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": -2}])
def test_embeddings_with_options_get_the_gradients_of_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weight, ids = torch.randn(VOCAB, HIDDEN), torch.tensor([5, VOCAB - 2, 5, 7])

    def build() -> nn.Module:
        model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN, **options))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        return model

    plain = build()
    plain(ids).square().sum().backward()
    expected = plain[0].weight.grad.to_dense()

    with GeminiDDP(build(), config_for("host")) as engine:
        engine(ids).square().sum().backward()

        assert torch.equal(waiting_gradient(engine, "0.weight"), expected)


@pytest.mark.parametrize("place", ["host", "device"])
def test_an_embedding_of_no_tokens_can_be_differentiated(place: str) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    with GeminiDDP(model, config_for(place)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        engine(torch.zeros(2, 0, dtype=torch.int64)).sum().backward()
        optimizer.step()
        assert optimizer.last_grad_norm == 0.0


def test_a_frozen_embedding_gets_nothing() -> None:
    model = Tied(is_sliced=True)
    model.embedding.weight.requires_grad_(False)
    with GeminiDDP(model, config_for("host")) as engine:
        engine(**CASES["sliced"].batches(1)[0]).backward()

        assert engine.runtime.gradients.names() == {"body.weight", "body.bias"}


# ---------------------------------------------------------------- several passes, and uses that nobody announces


def backward_twice_through_one_graph(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    loss = model(**batches[0])
    model(**batches[1]).backward()
    loss.backward(retain_graph=True)
    loss.backward()


def backward_through_an_old_and_a_new_graph(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    old = model(**batches[0])
    old.backward(retain_graph=True)
    (old + model(**batches[1])).backward()


def backward_through_a_sum(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    torch.stack([model(**batch) for batch in batches]).sum().backward()


def backward_after_backward(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        model(**batch).backward()


RETAINING = [backward_twice_through_one_graph, backward_through_an_old_and_a_new_graph]
PASSES = [*RETAINING, backward_through_a_sum, backward_after_backward]


class KeywordHead(Tied):
    """Names the weight in the call of its output layer."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        return F.cross_entropy(F.linear(hidden, weight=self.head.weight), ids.roll(1))


class ProjectedHead(Tied):
    """Uses the weight as embedding and as input of a linear layer."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        return F.cross_entropy(hidden @ F.linear(self.head.weight, self.body.weight).T, ids.roll(1))


class SparseFrequencies(Tied):
    """Looks up with an option that leaves the embedding to torch."""

    def __init__(self) -> None:
        super().__init__(is_sliced=False)
        self.embedding.scale_grad_by_freq = True


class CheckpointedEmbedding(Tied):
    """Looks up in a checkpoint whose backward is a pass of its own within the other's."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        anchor = torch.zeros(1, requires_grad=True)  # without one the checkpoint's outputs would need no gradient
        looked_up = checkpoint(lambda anchor: self.embedding(ids) + anchor, anchor, use_reentrant=True)
        return F.cross_entropy(self.head(torch.tanh(self.body(looked_up))), ids.roll(1))


class CheckpointedHead(Tied):
    """Recomputes its output layer in backward."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        return F.cross_entropy(checkpoint(self.head, hidden, use_reentrant=False), ids.roll(1))


class CompiledHeads(Tied):
    """Uses the weight in blocks whose functions nobody sees."""

    def __init__(self) -> None:
        super().__init__(is_sliced=False)
        torch._dynamo.reset()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(HIDDEN, VOCAB, bias=False)) for _ in range(2))
        for block in self.blocks:
            block[0].weight = self.embedding.weight
            block.compile(backend="eager")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(self.embedding(ids)))
        return F.cross_entropy(self.blocks[0](hidden) + self.blocks[1](hidden), ids.roll(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Tied(is_sliced=False),
    "keyword": lambda: KeywordHead(is_sliced=False),
    "projected": lambda: ProjectedHead(is_sliced=False),
    "frequencies": SparseFrequencies,
    "checkpointed embedding": lambda: CheckpointedEmbedding(is_sliced=False),
    "compiled heads": CompiledHeads,
    "checkpointed head": lambda: CheckpointedHead(is_sliced=False),
}


NAMES_AND_PASSES = [
    pytest.param(name, run, id=f"{name}-{run.__name__}")
    for name in MODELS
    for run in PASSES
    if name != "checkpointed embedding" or run not in RETAINING  # torch refuses to run such a checkpoint again
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile's
@pytest.mark.parametrize(("name", "run"), NAMES_AND_PASSES)
def test_whatever_the_passes_and_uses_the_waiting_gradient_is_torchs(
    name: str, run: Callable[[nn.Module, list[dict[str, torch.Tensor]]], None]
) -> None:
    case = case_of(MODELS[name])
    plain, batches = case.model(), case.batches(3)
    run(plain, batches)

    with GeminiDDP(case.model(), config_for("host")) as engine:
        run(engine, batches)
        found = waiting_gradient(engine)

    assert torch.equal(found, plain.embedding.weight.grad)


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ValueError("failed on purpose")


def fail_between_the_uses(model: nn.Module, body: nn.Linear, batch: dict[str, torch.Tensor]) -> None:
    handle = body.register_forward_hook(lambda module, args, output: FailingBackward.apply(output))
    loss = model(**batch)
    with pytest.raises(ValueError, match="failed on purpose"):
        loss.backward()
    handle.remove()


@pytest.mark.parametrize("num_before", [0, 1])
@pytest.mark.parametrize("num_after", [0, 1, 2])
@pytest.mark.parametrize("place", PLACEMENTS)
@each_head
def test_a_pass_that_fails_between_the_uses_leaves_what_it_leaves_in_torch(
    is_sliced: bool, place: str, num_before: int, num_after: int, tmp_path: Path
) -> None:
    case = CASES["sliced" if is_sliced else "linear"]
    batches = case.batches(num_before + 1 + num_after)

    def run(model: nn.Module, body: nn.Linear) -> None:
        backward_after_backward(model, batches[:num_before])
        fail_between_the_uses(model, body, batches[num_before])
        backward_after_backward(model, batches[num_before + 1 :])

    plain = case.model()
    run(plain, plain.body)
    expected = {name: param.grad for name, param in plain.named_parameters() if param.grad is not None}

    with GeminiDDP(case.model(), config_for(place, tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters(), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)
        run(engine, engine.module.body)
        assert engine.runtime.gradients.names() == set(expected)
        optimizer.step()
        states = optimizer.state_dict()["state"]
        names = [name for name, _ in plain.named_parameters()]
        found = {names[index]: state["exp_avg"] for index, state in states.items() if names[index] in expected}

    assert same_bits(found, expected)


# ---------------------------------------------------------------- completeness


class Recorder:
    """Stands between the store and its listener, and writes down whose gradients were complete or changed."""

    def __init__(self, listener: Any) -> None:
        self.listener = listener
        self.events: list[tuple[str, int]] = []

    def gradients_complete(self, chunk_id: int, arrived: Any) -> bool:
        self.events.append(("complete", chunk_id))
        return bool(self.listener.gradients_complete(chunk_id, arrived))

    def gradients_change(self, chunk_id: int) -> None:
        self.events.append(("change", chunk_id))
        self.listener.gradients_change(chunk_id)

    def leave_gradient_slot(self, chunk_id: int) -> None:
        self.listener.leave_gradient_slot(chunk_id)


@pytest.mark.parametrize("place", ["host", "nvme", "device"])
@each_head
def test_a_tied_weights_chunk_is_complete_once_its_last_use_has_delivered(
    is_sliced: bool, place: str, tmp_path: Path
) -> None:
    case = CASES["sliced" if is_sliced else "linear"]
    with GeminiDDP(case.model(), config_for(place, tmp_path)) as engine:
        store = engine.runtime.gradients
        store.listener = recorder = Recorder(store.listener)
        for batch in case.batches(2):
            recorder.events.clear()
            engine(**batch).backward()
            store.finish()

            tied = engine.runtime.layout.place_by_name["embedding.weight"].chunk_id
            events = [event for event, chunk_id in recorder.events if chunk_id == tied]
            assert events.count("complete") == 1
            assert events.count("change") >= 2
            assert events[-1] == "complete"
            engine.zero_grad()
