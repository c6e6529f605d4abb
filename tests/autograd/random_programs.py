"""Random programs over a random model: the same statements run over plain PyTorch and over an engine.

A program is a list of statements. Each statement is a function of a world (a model, how to call it, its optimizer, and
what the program has kept) and returns what it has seen. Both worlds must see the same bits; an engine may refuse a
statement by a GeminiError instead, which ends the program. Only the optimizer's step is compared within rounding, for
torch's AdamW rounds otherwise; then the plain weights continue from the engine's.

In half precision plain PyTorch has no float32 masters. There the other world is an engine with everything in memory,
and the optimizer's step must give the same bits too.

    python tests/autograd/random_programs.py --programs 10000
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from training_harness import PLACEMENTS, config_for

from gemini import GeminiConfig, GeminiDDP, GeminiError, HybridAdam
from gemini.update.job import UpdateJob
from gemini.update.worker import UpdateWorker

WIDTH = 6
VOCABULARY = 12
HYPER = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}


class Block(nn.Module):
    """A unit: parameters of its own, children, and a method beside forward."""

    def __init__(self, generator: random.Random) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=generator.random() < 0.5)
        self.gate = nn.Parameter(torch.rand(WIDTH))
        self.is_checkpointed = generator.random() < 0.3
        self.clamps = generator.random() < 0.3

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.norm(x)))) * self.gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.clamps:
            with torch.no_grad():
                self.gate.data.clamp_(-0.9, 0.9)
        if self.is_checkpointed and torch.is_grad_enabled():
            return x + checkpoint(self.parts, x, use_reentrant=False)
        return x + self.parts(x)


class Model(nn.Module):
    """Embedding, blocks and a head, tied or not; a temperature, a frozen table and a parameter without elements."""

    def __init__(self, generator: random.Random) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, max_norm=generator.choice([None, None, 1.5]))
        self.blocks = nn.ModuleList(Block(generator) for _ in range(generator.randint(1, 3)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.zeros(0, WIDTH))
        self.table = nn.Parameter(torch.randn(VOCABULARY, WIDTH), requires_grad=False)
        if generator.random() < 0.3 and self.embed.max_norm is None:
            self.head.weight = self.embed.weight
        self.reads_blocks = generator.random() < 0.3
        self.moves_table = generator.random() < 0.3

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + F.embedding(ids, self.table)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.hidden(ids)
        if self.moves_table:
            with torch.no_grad():
                self.table.copy_(0.9 * self.table + 0.1 * x.detach().mean())
        if self.reads_blocks:
            x = x * self.blocks[0].gate.detach() + self.blocks[-1].up.weight.t().mean()
        return self.head(x) / self.temperature.exp()


@dataclass
class World:
    """A model, how to call it, and what a program has kept of it."""

    model: Model
    call: Callable[..., torch.Tensor]
    optimizer: torch.optim.Optimizer
    engine: GeminiDDP | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)
    moments: int = 0

    def param(self, index: int) -> nn.Parameter:
        params = [param for param in self.model.parameters() if param.numel()]
        return params[index % len(params)]

    def trained(self, index: int) -> nn.Parameter:
        params = [param for param in self.model.parameters() if param.numel() and param.requires_grad]
        return params[index % len(params)]


Function = Callable[["World", int, int], Any]
"""A kind of statement, given a number that chooses a parameter and a seed."""


def _ids(seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 3), generator=torch.Generator().manual_seed(seed))


def _like(param: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(tuple(param.shape), generator=torch.Generator().manual_seed(seed)).to(param.dtype)


# ---------------------------------------------------------------- reads


def read_whole(world: World, index: int, seed: int) -> Any:
    param = world.param(index)
    how = seed % 12
    if how == 0:
        return param.detach().clone()
    if how == 1:
        return param.sum(), param.data.abs().max()
    if how == 2:
        return param.reshape(-1)[seed % param.numel()]
    if how == 3:
        return param.detach().cpu().float().numpy().tolist()
    if how == 4:
        return torch.tensor(param.tolist())
    if how == 5:
        return copy.deepcopy(param).detach()
    if how == 6:
        return param.t().contiguous() if param.dim() == 2 else param * 2
    if how == 7:
        return torch.equal(param, param.data), param.is_contiguous(), param.stride()
    if how == 8:
        return param.float().double() + 1
    if how == 9:
        return param.detach().numpy().tobytes() if param.dtype is torch.float32 else None
    if how == 10:
        return [row.sum() for row in param] if param.dim() else param.item()
    return 1.0 - param


def read_many(world: World, index: int, seed: int) -> Any:
    params = [param for param in world.model.parameters() if param.numel()]
    if seed % 3 == 0:
        return nn.utils.parameters_to_vector(params)
    if seed % 3 == 1:
        return torch._foreach_norm([param.detach() for param in params])
    return torch.cat([param.reshape(-1) for param in params])


def read_state(world: World, index: int, seed: int) -> Any:
    modules = [world.model, *world.model.blocks, world.model.embed, world.model.head]
    state = modules[index % len(modules)].state_dict()
    return sorted(state), [state[name].clone() for name in sorted(state)]


def keep_alias(world: World, index: int, seed: int) -> Any:
    param = world.param(index)
    alias = param.data if seed % 2 else param.detach()
    if seed % 3 == 0 and alias.dim():
        alias = alias[seed % len(alias)]
    elif seed % 3 == 1 and alias.dim() == 2:
        alias = alias.t()
    world.kept.append(alias)
    return None


def read_alias(world: World, index: int, seed: int) -> Any:
    return world.kept[index % len(world.kept)].clone() if world.kept else None


# ---------------------------------------------------------------- writes


def write(world: World, index: int, seed: int) -> Any:
    param = world.param(index)
    with torch.no_grad():
        how = seed % 14
        if how == 0:
            param.mul_(0.5)
        elif how == 1:
            param.add_(_like(param, seed), alpha=0.01)
        elif how == 2:
            param.clamp_(-0.5, 0.5)
        elif how == 3 and param.dim():
            param[seed % len(param)] = 0.25
        elif how == 4:
            param.data.clamp_(max=0.4)
        elif how == 5:
            param.copy_(_like(param, seed))
        elif how == 6:
            param.data = _like(param, seed)
        elif how == 7:
            param.view(-1)[seed % param.numel() :].zero_()
        elif how == 8:
            nn.init.normal_(param, generator=torch.Generator().manual_seed(seed))
        elif how == 9:
            torch.mul(param, 0.9, out=param)
        elif how == 10:
            param -= 0.1
        elif how == 11 and param.dim() == 2:
            param.t().mul_(0.75)
        elif how == 12:
            param.detach().add_(0.125)
        elif how == 13:
            param.data[...] = param.data * 0.5
    return param.detach().clone()


def write_alias(world: World, index: int, seed: int) -> Any:
    if not world.kept:
        return None
    alias = world.kept[index % len(world.kept)]
    with torch.no_grad():
        alias.mul_(0.5) if seed % 2 else alias.fill_(0.3)
    return alias.clone()


def write_many(world: World, index: int, seed: int) -> Any:
    params = [param for param in world.model.parameters() if param.numel()]
    with torch.no_grad():
        if seed % 2:
            torch._foreach_mul_(params, 0.99)
        else:
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params) * 0.98, params)
    return None


def load_part(world: World, index: int, seed: int) -> Any:
    block = world.model.blocks[index % len(world.model.blocks)]
    block.load_state_dict({name: _like(value, seed) for name, value in block.state_dict().items()})
    return None


# ---------------------------------------------------------------- forward, backward


def evaluate(world: World, index: int, seed: int) -> Any:
    with torch.no_grad():
        return world.call(_ids(seed))


def train(world: World, index: int, seed: int) -> Any:
    how = seed % 5
    ids = _ids(seed)
    if how == 4:
        hidden = world.model.hidden(ids)
        loss = (world.model.head(hidden) / world.model.temperature).square().mean()
    else:
        loss = F.cross_entropy(world.call(ids).flatten(0, 1), ids.flatten())
    if how == 1:
        loss = loss + 0.01 * sum(param.square().sum() for param in world.model.parameters())
    if how == 2:
        loss = loss + world.trained(index).view(-1).abs().mean()
    if how == 3:
        loss = loss + world.model.blocks[0].parts(torch.ones(2, WIDTH, dtype=world.model.head.weight.dtype)).sum()
    loss.backward()
    return loss.detach()


def read_gradient(world: World, index: int, seed: int) -> Any:
    gradient = world.trained(index).grad
    return None if gradient is None else gradient.clone()


def change_gradient(world: World, index: int, seed: int) -> Any:
    param = world.trained(index)
    if seed % 3 == 0:
        param.grad = None
    elif param.grad is not None:
        param.grad = param.grad * 0.5
    return None


def differentiate(world: World, index: int, seed: int) -> Any:
    param = world.trained(index)
    found = torch.autograd.grad(world.call(_ids(seed)).square().sum(), [param], allow_unused=True)
    return found[0]


def step(world: World, index: int, seed: int) -> Any:
    world.optimizer.step()
    world.optimizer.zero_grad()
    return None


def step_train_write(world: World, index: int, seed: int) -> Any:
    """Write where an update may have run ahead of the next step."""
    world.optimizer.step()
    world.optimizer.zero_grad()
    train(world, index, 5 * seed)
    write(world, index, seed)


def zero_grad(world: World, index: int, seed: int) -> Any:
    world.optimizer.zero_grad()
    return None


# ---------------------------------------------------------------- saves and loads


def save(world: World, index: int, seed: int) -> Any:
    source = world.engine if world.engine is not None and seed % 2 else world.model
    state = {name: value.clone() for name, value in source.state_dict().items()}
    world.states.append(state)
    return [state[name] for name in sorted(state)]


def load(world: World, index: int, seed: int) -> Any:
    if world.states:
        target = world.engine if world.engine is not None and seed % 2 else world.model
        target.load_state_dict(world.states[index % len(world.states)])
    return None


STEPS = (step, step_train_write)

STATEMENTS: dict[Function, int] = {
    read_whole: 6,
    read_many: 1,
    read_state: 2,
    keep_alias: 3,
    read_alias: 3,
    write: 6,
    write_alias: 2,
    write_many: 1,
    load_part: 1,
    evaluate: 3,
    train: 7,
    read_gradient: 3,
    change_gradient: 1,
    differentiate: 1,
    step: 5,
    step_train_write: 2,
    zero_grad: 1,
    save: 1,
    load: 1,
}
"""What a program is made of, and how often it comes."""


@dataclass(frozen=True)
class Program:
    """A placement and statements."""

    seed: int
    place: str
    fields: dict[str, Any]
    is_lazy: bool
    """Whether updates begin as late as they may."""
    statements: tuple[tuple[Function, int, int], ...]

    @classmethod
    def of(cls, seed: int) -> Program:
        generator = random.Random(seed)
        length = generator.randint(3, 14)
        functions = generator.choices(list(STATEMENTS), list(STATEMENTS.values()), k=length)
        fields: dict[str, Any] = {"num_threads": 1}
        fields["dtype"] = generator.choice([torch.float32] * 3 + [torch.bfloat16, torch.float16])
        if generator.random() < 0.5:
            fields["tile_numel"] = generator.choice([4096, 8192])
        if generator.random() < 0.6:
            fields["overlap"] = generator.choice(["off", "next-forward", "speculative", "speculative"])
        if generator.random() < 0.3:
            fields["prefetch_depth"] = generator.randint(0, 3)
        if generator.random() < 0.3:
            fields["min_unit_nbytes"] = 1 << 20
        return cls(
            seed,
            generator.choice(PLACEMENTS),
            fields,
            generator.random() < 0.5,
            tuple((function, generator.randrange(1000), generator.randrange(10**6)) for function in functions),
        )

    @property
    def is_half(self) -> bool:
        """Whether weights have half precision."""
        return self.fields["dtype"] is not torch.float32

    def __str__(self) -> str:
        lines = [f"    {function.__name__}({index}, {seed})" for function, index, seed in self.statements]
        return "\n".join([f"program {self.seed} on {self.place} {self.fields}, lazy {self.is_lazy}", *lines])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        bits = [value.detach().clone().contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
        return torch.equal(*bits)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _close(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Compare gradients that come of weights which the two worlds' Adam has rounded differently."""
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


class Divergence(AssertionError):
    """The two worlds have seen different things."""


def run(program: Program, folder: Path) -> str | None:
    """Run a program in both worlds.

    Args:
        program: the program.
        folder: empty, for the swap file.

    Returns:
        The engine's refusal that ended it, None if it ran to its end.

    Raises:
        Divergence: the worlds differ.
    """
    with ExitStack() as stack:
        model, ours = _world(program, stack, config_for(program.place, folder, **program.fields))
        if program.is_half:
            _, other = _world(program, stack, config_for("host", **program.fields))
        else:
            plain = _model(program)
            other = World(plain, plain, torch.optim.AdamW(_trained(plain), **HYPER))
        if program.is_lazy:
            stack.enter_context(lazy_updates())
        is_rounded = False
        for place, (function, index, seed) in enumerate(program.statements):
            if function in STEPS and _is_skipped(other):
                return None
            if function in STEPS or function is zero_grad:
                is_rounded = function is step_train_write and not program.is_half
            same = _close if is_rounded and function is read_gradient else _same
            refusal = _run_statement(program, place, function, (other, ours), (index, seed), same)
            if refusal is not None:
                return refusal
            if function in STEPS and not program.is_half:
                _compare_step(program, other, ours)
        right, seen = (_masters(world) for world in (other, ours))
        for name, value in right.items():
            if not _same(value, seen[name]):
                raise Divergence(f"{program}\nat the end, {name}: right {value}\nseen {seen[name]}")
    for name, param in model.named_parameters():  # handed back
        if type(param) is not nn.Parameter or not _same(right[name].to(param.dtype), param):
            raise Divergence(f"{program}\nafter close, {name}: right {right[name]}\nseen {param}")
    return None


def _is_skipped(plain: World) -> bool:
    """Return whether an engine skips the coming step, which plain PyTorch takes."""
    gradients = [param.grad for param in plain.model.parameters() if plain.engine is None and param.grad is not None]
    return not all(bool(gradient.isfinite().all()) for gradient in gradients)


@contextmanager
def lazy_updates() -> Iterator[None]:
    """Let updates begin only when somebody waits for them, so that code which does not wait sees what it should not."""
    put_off: dict[int, Callable[[], None]] = {}
    submit = UpdateWorker.submit

    def later(self: UpdateWorker, job: UpdateJob, *, distance: int) -> None:
        self.start()
        put_off[id(job)] = lambda: submit(self, job, distance=distance)

    def beginning(method: Any) -> Any:
        def wrapped(self: UpdateWorker, job: UpdateJob, *args: Any, **kwargs: Any) -> Any:
            put_off.pop(id(job), lambda: None)()
            return method(self, job, *args, **kwargs)

        return wrapped

    with ExitStack() as stack:
        stack.enter_context(patch.object(UpdateWorker, "submit", later))
        for name in ("wait", "adjust", "cancel", "release_gradients"):
            stack.enter_context(patch.object(UpdateWorker, name, beginning(getattr(UpdateWorker, name))))
        is_updated = UpdateWorker.is_updated
        known = lambda self, job: id(job) not in put_off and is_updated(self, job)  # noqa: E731
        stack.enter_context(patch.object(UpdateWorker, "is_updated", known))
        yield


def _model(program: Program) -> Model:
    torch.manual_seed(program.seed)
    return Model(random.Random(program.seed))


def _world(program: Program, stack: ExitStack, config: GeminiConfig) -> tuple[Model, World]:
    model = _model(program)
    engine = stack.enter_context(GeminiDDP(model, config))
    return model, World(model, engine, HybridAdam(engine.parameters(), **HYPER), engine)


def _masters(world: World) -> dict[str, torch.Tensor]:
    return world.model.state_dict() if world.engine is None else world.engine.master_state_dict()


def _run_statement(
    program: Program,
    place: int,
    function: Function,
    worlds: tuple[World, World],
    arguments: tuple[int, int],
    same: Callable[[Any, Any], bool],
) -> str | None:
    """Run a statement in both worlds and compare; return why the engine, or both worlds, have refused it."""
    results: list[Any] = []
    for world in worlds:
        try:
            results.append(function(world, *arguments))
        except (RuntimeError, GeminiError) as error:
            results.append(error)
    right, seen = results
    where = f"{program}\nstatement {place}, {function.__name__}:"
    if isinstance(seen, GeminiError):
        return f"{function.__name__}: {seen}"
    if isinstance(seen, RuntimeError) and isinstance(right, RuntimeError):
        return f"{function.__name__}: both: {seen}"
    if isinstance(seen, RuntimeError):
        raise Divergence(f"{where} {seen!r}") from seen
    if isinstance(right, RuntimeError):
        raise Divergence(f"{where} the other world refuses: {right}")
    if not same(right, seen):
        raise Divergence(f"{where} right {right}\nseen {seen}")
    return None


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _compare_step(program: Program, plain: World, ours: World) -> None:
    """Compare weights after a step within rounding, and let the plain ones continue from the engine's."""
    named = list(ours.model.named_parameters())
    random.Random(program.seed).shuffle(named)
    masters = {name: param.detach().clone() for name, param in named}
    with torch.no_grad():
        for name, param in plain.model.named_parameters():
            if not torch.allclose(param, masters[name], rtol=1e-5, atol=1e-6):
                raise Divergence(f"{program}\nafter a step, {name}: right {param}\nseen {masters[name]}")
            param.data.copy_(masters[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first program")
    options = parser.parse_args()
    torch.set_num_threads(1)
    refusals: Counter[str] = Counter()
    num_diverged = 0
    for seed in range(options.first, options.first + options.programs):
        program = Program.of(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                refusal = run(program, Path(folder))
            except Exception as error:
                num_diverged += 1
                print(str(error) if isinstance(error, Divergence) else f"{program}\n{error!r}", flush=True)
                continue
        if refusal is not None:
            refusals[refusal[:110]] += 1
    print(f"{options.programs} programs, {num_diverged} diverged, {sum(refusals.values())} ended by a refusal:")
    for text, count in refusals.most_common():
        print(f"  {count:5} {text}")
    sys.exit(num_diverged > 0)


if __name__ == "__main__":
    main()
