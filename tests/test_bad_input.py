"""What goes wrong at an engine's edges: budgets, disks, touched models, wrong optimizers, and lives that end badly."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from small_resources import break_writes, mapped_nbytes, truncated_file
from torch import nn

from gemini import (
    ConfigError,
    GeminiConfig,
    GeminiDDP,
    HybridAdam,
    MemoryTier,
    ModelError,
    NVMeConfig,
    OffloadIOError,
    OutOfTierMemoryError,
    StaticPlacement,
)

WIDTH = 128
ALL_ON_DISK = StaticPlacement(param_nvme=1, state_nvme=1, grad_nvme=1)
SWAP = "gemini-rank0.swap"


class Block(nn.Module):
    """A residual block of 2 x 128 x 128 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def make_model(num_blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(num_blocks)))


def make_config(directory: Path | None = None, **fields: Any) -> GeminiConfig:
    nvme = None if directory is None else NVMeConfig(path=directory, budget="16MiB")
    placement = "auto" if directory is None else ALL_ON_DISK
    defaults = {"device": "cpu", "dtype": torch.float32, "host_budget": "64MiB", "tile_numel": 4096, "num_threads": 2}
    return GeminiConfig(**{**defaults, "nvme": nvme, "placement": placement, **fields})


def batch() -> torch.Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))


def train_step(engine: GeminiDDP, optimizer: HybridAdam) -> float:
    loss = engine(batch()).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train_steps(engine: GeminiDDP, optimizer: HybridAdam, count: int) -> None:
    for _ in range(count):
        train_step(engine, optimizer)


@pytest.fixture
def engine() -> Iterator[GeminiDDP]:
    with GeminiDDP(make_model(), make_config()) as made:
        yield made


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def num_tasks() -> int:
    return len(os.listdir("/proc/self/task"))


@contextlib.contextmanager
def leaving_nothing(directory: Path) -> Iterator[None]:
    """Check that threads, host buffers, descriptors and the swap file are as they were."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        return num_tasks(), mapped_nbytes(), len(os.listdir("/proc/self/fd"))

    before = held()
    yield
    assert all(now <= then for now, then in zip(held(), before, strict=True)), f"{before} became {held()}"
    assert list(directory.iterdir()) == []


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("host_budget", {"host_budget": "600KiB"}),
        ("device_budget", {"device": "simulated", "device_budget": "200KiB", "activation_reserve": 1}),
        ("NVMeConfig.budget", {"placement": ALL_ON_DISK}),
    ],
)
def test_a_budget_raised_by_what_the_message_says_is_enough(field: str, fields: dict[str, Any], tmp_path: Path) -> None:
    def build(budget: int | None) -> GeminiDDP:
        changed = dict(fields)
        if field == "NVMeConfig.budget":
            changed["nvme"] = NVMeConfig(path=tmp_path, budget=budget or "100KiB")
        elif budget is not None:
            changed[field] = budget
        return GeminiDDP(make_model(), make_config(**changed))

    tier = {"host_budget": "host", "device_budget": "device", "NVMeConfig.budget": "nvme"}[field]
    with pytest.raises(
        OutOfTierMemoryError, match=rf"^{tier} tier is short by \d+ bytes .* {re.escape(field)} "
    ) as error:
        build(None)
    message = str(error.value)
    match = re.search(rf"raise {re.escape(field)} .*?(\d+) bytes", message)
    assert match is not None, message
    spare = {"host": 0, "device": 1, "nvme": 0}[tier]  # the activation reserve
    with build(int(match[1]) + spare) as engine:
        train_step(engine, HybridAdam(engine.parameters()))
    with pytest.raises(OutOfTierMemoryError, match="short by"):
        build(int(match[1]) + spare - 4096)


def test_a_reserve_larger_than_the_budget_is_a_shortage_on_the_device() -> None:
    config = make_config(device="simulated", device_budget="1MiB", activation_reserve="2MiB")
    with pytest.raises(OutOfTierMemoryError, match=r"^device tier is short by .* lower activation_reserve"):
        GeminiDDP(make_model(), config)


def test_a_failed_plan_leaves_the_model_and_the_process_alone(tmp_path: Path) -> None:
    model = make_model()
    before, addresses = weights_of(model), [param.data_ptr() for param in model.parameters()]
    with leaving_nothing(tmp_path), pytest.raises(OutOfTierMemoryError):
        GeminiDDP(model, make_config(tmp_path, host_budget="20KiB"))
    assert [param.data_ptr() for param in model.parameters()] == addresses
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    with GeminiDDP(model, make_config(tmp_path)) as engine:
        assert torch.equal(engine.state_dict()["0.up.weight"], before["0.up.weight"])


class _HalfWay(Exception):
    pass


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_an_initialisation_that_fails_half_way_leaves_nothing(tmp_path: Path, device: str) -> None:
    calls = []

    def init_fn(module: nn.Module) -> None:
        calls.append(module)
        if len(calls) > 6:
            raise _HalfWay
        for param in module.parameters(recurse=False):
            param.zero_()

    with torch.device("meta"):
        model = make_model()
    with leaving_nothing(tmp_path), pytest.raises(_HalfWay):
        GeminiDDP(model, make_config(tmp_path, device=device), init_fn=init_fn)
    assert len(calls) == 7


def test_a_parameter_that_cannot_be_placed_is_refused_before_anything_happens(tmp_path: Path) -> None:
    model = make_model()
    model.register_parameter("odd", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with leaving_nothing(tmp_path), pytest.raises(ModelError, match="odd.*complex64"):
        GeminiDDP(model, make_config(tmp_path))


# ---------------------------------------------------------------------- disks


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OffloadIOError, match=r"/missing: .* \(errno 2\); create the directory first") as caught:
        GeminiDDP(make_model(), make_config(tmp_path / "missing"))
    assert caught.value.errno == errno.ENOENT


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OffloadIOError, match=r"/file: Not a directory .* NVMeConfig.path must name a directory"):
        GeminiDDP(make_model(), make_config(tmp_path / "file"))


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_noticed_before_training(small_mount: Path) -> None:
    model = make_model()
    before = weights_of(model)
    message = r"cannot reserve space for .*: No space left on device .* the file system has .* free: free some"
    with leaving_nothing(small_mount), pytest.raises(OffloadIOError, match=message):
        GeminiDDP(model, make_config(small_mount))
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_read_only_disk_is_named(small_mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_mount)], check=True)
    with pytest.raises(OffloadIOError, match="the file system is mounted read-only; name a writable directory"):
        GeminiDDP(make_model(), make_config(small_mount))


HOLDER = """
import sys
sys.path.insert(0, {tests!r})
import test_bad_input as t
from pathlib import Path
engine = t.GeminiDDP(t.make_model(), t.make_config(Path({directory!r})))
optimizer = t.HybridAdam(engine.parameters())
t.train_step(engine, optimizer)
{then}
"""


def start_python(directory: Path, then: str) -> subprocess.Popen[str]:
    """Run an engine in another process, then some code."""
    tests = Path(__file__).parent
    code = HOLDER.format(tests=str(tests), directory=str(directory), then=then)
    env = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests / 'support'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


@pytest.mark.processes
@pytest.mark.slow
def test_another_process_is_named_and_its_death_frees_the_directory(tmp_path: Path) -> None:
    holder = start_python(tmp_path, "print('ready', flush=True); sys.stdin.read()")
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(
            OffloadIOError, match=rf"{SWAP}: .* process {holder.pid} on .* uses it now: give this run another"
        ):
            GeminiDDP(make_model(), make_config(tmp_path))
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / SWAP).exists()
        with GeminiDDP(make_model(), make_config(tmp_path)) as engine:
            train_step(engine, HybridAdam(engine.parameters()))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@pytest.mark.slow
def test_a_program_that_ends_without_close_leaves_no_file_and_does_not_hang(tmp_path: Path) -> None:
    directories = [tmp_path / "forgotten", tmp_path / "failed"]
    for directory in directories:
        directory.mkdir()
    forgotten = start_python(directories[0], "engine(t.batch()).sum().backward()")
    failed = start_python(directories[1], "loss = engine(t.batch()).sum(); raise SystemExit(3)")
    with forgotten, failed:
        forgotten.communicate(timeout=PATIENCE_S)
        failed.communicate(timeout=PATIENCE_S)
    assert (forgotten.returncode, failed.returncode) == (0, 3)
    assert [list(directory.iterdir()) for directory in directories] == [[], []]


def test_another_engine_of_this_process_is_refused(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), make_config(tmp_path)) as engine:
        with pytest.raises(
            OffloadIOError, match=rf"process {os.getpid()} on .* uses it now: give this run another directory"
        ):
            GeminiDDP(make_model(), make_config(tmp_path))
        train_step(engine, HybridAdam(engine.parameters()))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_an_engine_nobody_holds_gives_everything_back(tmp_path: Path, device: str) -> None:
    def use() -> None:
        engine = GeminiDDP(make_model(), make_config(tmp_path, device=device))
        optimizer = HybridAdam(engine.parameters())
        train_step(engine, optimizer)
        engine(batch()).sum().backward()

    use()  # autograd starts its own threads once
    with leaving_nothing(tmp_path):
        use()


def test_a_model_keeps_its_engine_alive(tmp_path: Path) -> None:
    def wrap() -> tuple[nn.Module, HybridAdam]:
        engine = GeminiDDP(make_model(), make_config(tmp_path))
        return engine.module, HybridAdam(engine.parameters())

    model, optimizer = wrap()
    gc.collect()
    model(batch()).square().mean().backward()
    optimizer.step()
    assert optimizer.runtime.steps.num_steps == 1
    optimizer.runtime.close()


# ---------------------------------------------------------------------- models touched after wrapping


def test_an_engine_cannot_be_moved_or_cast(engine: GeminiDDP) -> None:
    calls: list[Callable[[], Any]] = [engine.half, engine.double, engine.cpu, lambda: engine.to("cpu")]
    for call in (*calls, lambda: engine.to(torch.bfloat16)):
        with pytest.raises(ModelError, match=r"^a GeminiDDP cannot be moved or cast: .* set GeminiConfig\(device="):
            call()
    train_step(engine, HybridAdam(engine.parameters()))


@pytest.mark.parametrize(
    ("touch", "message"),
    [
        (nn.Module.half, r"^parameter 0.up.weight of a GeminiDDP: its .data was replaced .* torch.float16, 'cpu'\)"),
        (
            nn.Module.double,
            r"^parameter 0.up.weight of .* torch.float64, 'cpu'\), expected .* instead of calling .to\(\)",
        ),
        (lambda m: m.to("meta"), r"^parameter weight of a Linear was replaced after GeminiDDP\(...\), which manages"),
        (lambda m: setattr(m[1].up, "bias", nn.Parameter(torch.ones(WIDTH))), r"^parameter bias of a Linear was repl"),
        (
            lambda m: m.requires_grad_(False),
            r"^parameter 0.up.weight had requires_grad=True when .* False now, in a forward with gradients; set requir",
        ),
        (lambda m: m[2].down.bias.requires_grad_(False), r"^parameter 2.down.bias had requires_grad=True"),
    ],
)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_model_touched_after_wrapping_is_refused(
    touch: Callable[[nn.Module], Any], message: str, on_disk: bool, tmp_path: Path
) -> None:
    with GeminiDDP(make_model(), make_config(tmp_path if on_disk else None)) as engine:
        optimizer = HybridAdam(engine.parameters())
        train_step(engine, optimizer)

        def touch_and_run() -> None:
            touch(engine.module)
            engine(batch())

        with pytest.raises(ModelError, match=message):
            touch_and_run()


def test_a_flag_set_back_is_forgiven(engine: GeminiDDP) -> None:
    param = engine.module[0].up.weight  # type: ignore[index,union-attr]
    param.requires_grad_(False)  # type: ignore[union-attr,operator]
    with pytest.raises(ModelError, match="requires_grad"):
        engine(batch())
    param.requires_grad_(True)  # type: ignore[union-attr,operator]
    train_step(engine, HybridAdam(engine.parameters()))


# ---------------------------------------------------------------------- wrapping twice


def test_a_model_a_part_of_it_and_a_whole_around_it_are_wrapped_once(engine: GeminiDDP) -> None:
    message = r"^parameter .*up.weight is managed by another GeminiDDP; close\(\) that one first, or wrap a copy"
    model = engine.module
    for module in (model, model[0], nn.Sequential(model, nn.Linear(2, 2))):  # type: ignore[index]
        with pytest.raises(ModelError, match=message):
            GeminiDDP(module, make_config())  # type: ignore[arg-type]
    train_step(engine, HybridAdam(engine.parameters()))


def test_an_engine_cannot_be_wrapped(engine: GeminiDDP) -> None:
    for module in (engine, nn.Sequential(engine)):
        with pytest.raises(ModelError, match=r"^the model contains a GeminiDDP already; wrap the plain model once$"):
            GeminiDDP(module, make_config())


def test_a_closed_engine_s_model_can_be_wrapped_again() -> None:
    model = make_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    GeminiDDP(model, make_config()).close()
    with GeminiDDP(model, make_config()) as engine:
        engine.load_state_dict(state)
        train_step(engine, HybridAdam(engine.parameters()))


@pytest.mark.parametrize("what", [None, 3, "model", torch.zeros(2)])
def test_only_a_module_can_be_wrapped(what: Any) -> None:
    with pytest.raises(ConfigError, match=r"^GeminiDDP: expected a torch.nn.Module, got "):
        GeminiDDP(what)


# ---------------------------------------------------------------------- optimizers


def test_parameters_of_no_engine_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^HybridAdam: a parameter of shape \(128, 128\) does not belong to a GeminiDDP; wrap"
    ):
        HybridAdam(make_model().parameters())


def test_parameters_of_two_engines_are_refused(engine: GeminiDDP) -> None:
    with GeminiDDP(make_model(), make_config()) as other:
        both = [*engine.parameters(), *other.parameters()]
        with pytest.raises(ConfigError, match="^HybridAdam: the parameters belong to different GeminiDDPs; use one"):
            HybridAdam(both)


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        HybridAdam([])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", -1, "lr: expected a finite number of at least 0, got -1"),
        ("lr", float("nan"), "lr: expected a finite number of at least 0, got nan"),
        ("lr", float("inf"), "lr: expected a finite number of at least 0, got inf"),
        ("eps", -1e-8, "eps: expected a finite number of at least 0, got -1e-08"),
        ("weight_decay", -0.1, "weight_decay: expected a finite number of at least 0, got -0.1"),
        ("betas", (0.9, 1.0), r"betas: expected two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ("betas", (-0.1, 0.9), r"betas: expected two numbers from 0 to below 1, got \(-0.1, 0.9\)"),
        ("betas", (0.9,), r"betas: expected two numbers from 0 to below 1, got \(0.9,\)"),
    ],
)
def test_a_bad_hyper_parameter_is_refused_at_once_and_later(
    engine: GeminiDDP, field: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^HybridAdam\.{message}"):
        HybridAdam(engine.parameters(), **{field: value})
    optimizer = HybridAdam(engine.parameters())
    before = engine.state_dict()
    engine(batch()).sum().backward()
    good = optimizer.param_groups[0][field]
    optimizer.param_groups[0][field] = value
    with pytest.raises(ConfigError, match=rf"^HybridAdam\.{message}"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state_dict().items())
    optimizer.param_groups[0][field] = good
    optimizer.step()
    assert optimizer.runtime.steps.num_steps == 1


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_bad_clipping_norm_is_refused(engine: GeminiDDP, value: float) -> None:
    with pytest.raises(ConfigError, match=r"^HybridAdam\.max_grad_norm: expected a positive number or None, got "):
        HybridAdam(engine.parameters(), max_grad_norm=value)


def test_a_bad_group_is_not_added(engine: GeminiDDP) -> None:
    params = list(engine.parameters())
    optimizer = HybridAdam(params[:2])
    with pytest.raises(ConfigError, match=r"^HybridAdam\.lr: expected"):
        optimizer.add_param_group({"params": params[2:], "lr": -1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[2:], "lr": 0.0})
    train_step(engine, optimizer)


def test_hyper_parameters_changed_between_backward_and_step_are_honoured() -> None:
    plain = make_model()
    reference = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.5)
    with GeminiDDP(make_model(), make_config()) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1.0, weight_decay=0.5)
        for model, opt in ((engine, optimizer), (plain, reference)):
            model(batch()).square().mean().backward()
            opt.param_groups[0].update(lr=1e-3, weight_decay=0.01, betas=(0.8, 0.95), eps=1e-4)
            opt.step()
        for name, tensor in engine.state_dict().items():
            assert torch.allclose(tensor, plain.state_dict()[name], rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------- ends


@pytest.mark.parametrize("on_disk", [False, True])
def test_every_use_after_close_says_so(on_disk: bool, tmp_path: Path) -> None:
    engine = GeminiDDP(make_model(), make_config(tmp_path if on_disk else None))
    optimizer = HybridAdam(engine.parameters())
    train_step(engine, optimizer)
    engine.close()
    engine.close()
    uses: list[Callable[[], Any]] = [
        optimizer.step,
        optimizer.zero_grad,
        optimizer.state_dict,
        engine.zero_grad,
        engine.state_dict,
        engine.master_state_dict,
        engine.memory_report,
        lambda: engine.load_state_dict({}),
        lambda: engine.clip_grad_norm_(1.0),
    ]
    for use in uses:
        with pytest.raises(ModelError, match=r"^this GeminiDDP has been closed; wrap the model again to go on$"):
            use()
    with pytest.raises(ConfigError, match="does not belong to a GeminiDDP"):
        HybridAdam(engine.parameters())
    assert all(type(param) is nn.Parameter and param.isfinite().all() for param in engine.parameters())


def test_a_forward_after_close_says_so_and_the_model_runs() -> None:
    engine = GeminiDDP(make_model(), make_config())
    engine.close()
    with pytest.raises(ModelError, match=r"^this GeminiDDP has been closed; wrap the model again to go on$"):
        engine(batch())
    assert engine.module(batch()).isfinite().all()


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("work", ["forward", "backward", "step", "prefetch"])
def test_close_with_work_under_way_leaves_nothing(tmp_path: Path, device: str, work: str) -> None:
    def use() -> None:
        with GeminiDDP(make_model(), make_config(tmp_path, device=device)) as engine:
            optimizer = HybridAdam(engine.parameters())
            train_step(engine, optimizer)
            loss = engine(batch()).square().mean()
            if work != "forward":
                loss.backward()
            if work in ("step", "prefetch"):
                optimizer.step()
            if work == "prefetch":
                engine.runtime.core.prefetch(0)

    use()
    with leaving_nothing(tmp_path):
        use()


def test_a_backward_after_close_is_an_error(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), make_config(tmp_path)) as engine:
        loss = engine(batch()).square().mean()
    with pytest.raises(ModelError, match="^this GeminiDDP has been closed"):
        loss.backward()


def break_reads(engine: GeminiDDP) -> contextlib.AbstractContextManager[None]:
    store = engine.runtime.resources.store
    assert store is not None
    engine.runtime.finish_updates()
    return truncated_file(store.path)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_an_io_error_in_an_update_ends_training_and_close_still_works(tmp_path: Path, device: str) -> None:
    with leaving_threads_and_files(tmp_path):
        engine = GeminiDDP(make_model(), make_config(tmp_path, device=device))
        optimizer = HybridAdam(engine.parameters())
        train_step(engine, optimizer)
        engine(batch()).sum().backward()
        engine.runtime.gradients.finish()

        def update() -> None:
            optimizer.step()
            engine.runtime.finish_updates()  # an update goes on behind the next forward; who waits for it is told

        with break_reads(engine), pytest.raises(OffloadIOError, match="the file ends before the bytes asked for"):
            update()
        message = (
            r"^the optimizer state was lost: an optimizer step failed half way \(cannot read .*load a checkpoint into"
        )
        for use in (lambda: engine(batch()), optimizer.step, optimizer.zero_grad, engine.state_dict):
            with pytest.raises(ModelError, match=message):
                use()
        engine.close()


@contextlib.contextmanager
def leaving_threads_and_files(directory: Path) -> Iterator[None]:
    before = num_tasks()
    yield
    assert list(directory.iterdir()) == []
    assert num_tasks() <= before + 2  # autograd's own


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_writes_that_fail_are_noticed_and_close_still_works(tmp_path: Path, device: str) -> None:
    config = make_config(tmp_path, device=device, placement=StaticPlacement(state_nvme=1))
    engine = GeminiDDP(make_model(), config)
    optimizer = HybridAdam(engine.parameters())
    train_step(engine, optimizer)
    engine.runtime.finish_updates()
    break_writes(engine.runtime.resources)
    with pytest.raises(OffloadIOError, match=r"cannot write .*: No space left on device"):
        train_steps(engine, optimizer, 2)  # the first step may end before its writes do
    engine.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_an_io_error_in_forward_can_be_survived(tmp_path: Path, device: str) -> None:
    with GeminiDDP(make_model(), make_config(tmp_path, device=device)) as engine:
        optimizer = HybridAdam(engine.parameters())
        train_step(engine, optimizer)
        engine.runtime.core.evict_idle()
        with break_reads(engine), pytest.raises(OffloadIOError, match="the file ends before the bytes asked for"):
            engine(batch())
        found = train_step(engine, optimizer)
    with GeminiDDP(make_model(), make_config(tmp_path, device=device)) as engine:
        optimizer = HybridAdam(engine.parameters())
        assert [train_step(engine, optimizer) for _ in range(2)][1] == found


def test_an_exception_in_the_user_s_forward_leaves_the_engine_usable(tmp_path: Path) -> None:
    model = make_model()
    should_fail = True

    def fail(module: nn.Module, args: Any) -> None:
        if should_fail:
            raise _HalfWay

    model[1].down.register_forward_pre_hook(fail)  # type: ignore[index,union-attr,operator]
    with GeminiDDP(model, make_config(tmp_path, device="simulated")) as engine:
        optimizer = HybridAdam(engine.parameters())
        for _ in range(3):
            with pytest.raises(_HalfWay):
                engine(batch())
        should_fail = False
        assert not any(chunk.is_held for chunk in engine.runtime.core.chunks)
        first = train_step(engine, optimizer)
    assert first == make_model()(batch()).square().mean().item()


def test_a_step_inside_forward_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = make_model()
    with GeminiDDP(model, make_config(tmp_path)) as engine:
        optimizer = HybridAdam(engine.parameters())
        engine(batch()).sum().backward()
        handle = model[1].up.register_forward_pre_hook(lambda m, a: optimizer.step())  # type: ignore[index,union-attr,operator]
        before = engine.state_dict()
        with pytest.raises(RuntimeError, match="is 'held' and cannot become"):
            engine(batch())
        handle.remove()
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state_dict().items())
        optimizer.step()
        assert optimizer.runtime.steps.num_steps == 1
        assert int(optimizer.state_dict()["state"][0]["step"]) == 1


def test_memory_goes_when_the_engine_is_closed(tmp_path: Path) -> None:
    gc.collect()  # of other tests
    before = mapped_nbytes()
    engine = GeminiDDP(make_model(), make_config())
    held = engine.runtime.resources.ledger.held_nbytes(MemoryTier.HOST)
    assert mapped_nbytes() - before == held > 0
    engine.close()
    assert mapped_nbytes() == before


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_the_child_of_a_fork_is_told_that_it_has_no_engine() -> None:
    with GeminiDDP(make_model(), make_config()) as engine:
        child = os.fork()
        if child == 0:
            for use in (lambda: engine(batch()), lambda: engine.module(batch()), engine.state_dict):
                with contextlib.suppress(ModelError):
                    use()
                    os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        engine(batch())


@pytest.mark.processes
@pytest.mark.slow
def test_nothing_waits_for_ever_when_a_program_is_interrupted(tmp_path: Path) -> None:
    code = "while True: t.train_step(engine, optimizer); print('stepped', flush=True)"
    with start_python(tmp_path, code) as program:
        assert program.stdout is not None
        assert [program.stdout.readline() for _ in range(3)] == ["stepped\n"] * 3
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=PATIENCE_S)
    assert program.returncode != 0
    assert list(tmp_path.iterdir()) == []
