"""Training meets real faults: each ends in a typed error, and what is not declared lost goes on with the same bits."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FAILING_DEVICE, FULL_DEVICE, flip_bit, mounted, redirected, run_program
from model_zoo import Tower, square, vector_batch
from patience import PATIENCE_S
from training_harness import Case, config_for, hybrid_adam, same_bits, step, train_gemini

from gemini import (
    CorruptRecordError,
    GeminiConfig,
    GeminiDDP,
    GeminiError,
    HybridAdam,
    ModelError,
    OffloadIOError,
    WorkerError,
)
from gemini.offload.store import DiskStore

TOWER = Case(Tower, vector_batch, square)
BLOCK = 4096


def disk_config(place: str, directory: Path, **fields: Any) -> GeminiConfig:
    """Return a named placement that keeps something on disk, verified."""
    config = config_for(place, directory, **fields)
    assert config.nvme is not None
    return dataclasses.replace(config, nvme=dataclasses.replace(config.nvme, verify=True))


@pytest.fixture(params=["nvme", "mixed"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> GeminiConfig:
    (tmp_path / "swap").mkdir()
    return disk_config(request.param, tmp_path / "swap")


def store_of(engine: GeminiDDP) -> DiskStore:
    store = engine.runtime.resources.store
    assert store is not None
    return store


@contextlib.contextmanager
def rotten(engine: GeminiDDP, kind: str) -> Iterator[None]:
    """Let a bit of every record of a kind be wrong for a while."""
    store = store_of(engine)
    places = [BLOCK + extent.offset + 100 for extent, record in store._records.items() if record.startswith(kind)]
    assert places
    for place in places:
        flip_bit(store.path, place)
    yield
    for place in places:
        flip_bit(store.path, place)


def go_on(engine: GeminiDDP, optimizer: HybridAdam, fail: Callable[[], None]) -> list[float]:
    """Train three steps and let something fail before the second; return the losses."""
    losses = []
    for index, batch in enumerate(TOWER.batches(3)):
        if index == 1:
            fail()
        losses.append(step(engine, optimizer, TOWER, batch))
    return losses


# ---------------------------------------------------------------------- verified training


@pytest.mark.parametrize("overlap", ["off", "next-forward", "speculative"])
@pytest.mark.parametrize("place", ["nvme", "mixed"])
def test_verifying_changes_no_bit(place: str, overlap: str, tmp_path: Path) -> None:
    verified = train_gemini(TOWER, disk_config(place, tmp_path, overlap=overlap))
    plain = train_gemini(TOWER, config_for(place, tmp_path, overlap=overlap))
    assert verified.losses == plain.losses
    assert same_bits(verified.weights, plain.weights)


def test_checksums_are_in_the_host_budget(config: GeminiConfig) -> None:
    with GeminiDDP(TOWER.model(), config) as engine:
        (host,) = [tier for tier in engine.memory_report().tiers if tier.tier == "host"]
        assert host.held_nbytes["checksums"] == host.planned_nbytes["checksums"]
        assert host.held_nbytes["checksums"] == store_of(engine).path.stat().st_size // BLOCK * 4


# ---------------------------------------------------------------------- corrupted records


def test_corrupt_weights_are_named_in_forward_and_cost_nothing_once_mended(config: GeminiConfig) -> None:
    def fail() -> None:
        engine.runtime.finish_updates()
        engine.runtime.core.evict_idle()
        with rotten(engine, "weights"), pytest.raises(CorruptRecordError, match=message) as caught:
            engine(**TOWER.batches(1)[0])
        assert caught.value.record in store_of(engine)._records.values()

    message = r"gemini-rank0\.swap, weights of chunk \d+ \(.*\): the CRC-32C of the block of 4096 bytes at offset \d+ "
    with GeminiDDP(TOWER.model(), config) as engine:
        losses = go_on(engine, hybrid_adam(engine.parameters()), fail)
        weights = engine.master_state_dict()
    expected = train_gemini(TOWER, config)
    assert losses == expected.losses
    assert same_bits(weights, expected.weights)


def test_corrupt_state_is_named_and_declared_lost(config: GeminiConfig) -> None:
    with GeminiDDP(TOWER.model(), dataclasses.replace(config, overlap="off")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        first, second, _ = TOWER.batches(3)
        step(engine, optimizer, TOWER, first)
        with rotten(engine, "state"), pytest.raises(CorruptRecordError, match=r"state of chunk \d+ \(.*\): the CRC"):
            step(engine, optimizer, TOWER, second)
        with pytest.raises(ModelError, match="the optimizer state was lost: .* load a checkpoint into a new GeminiDDP"):
            engine(**second)
        path = store_of(engine).path
    assert not path.exists()


# ---------------------------------------------------------------------- a full disk


def test_a_disk_that_fills_up_after_construction_does_not_matter(tmp_path: Path) -> None:
    expected = train_gemini(TOWER, disk_config("nvme", tmp_path))
    with (
        mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as directory,
        GeminiDDP(TOWER.model(), disk_config("nvme", directory)) as engine,
    ):
        fill(directory)
        losses = go_on(engine, hybrid_adam(engine.parameters()), lambda: None)
        assert same_bits(engine.master_state_dict(), expected.weights)
    assert losses == expected.losses


def fill(directory: Path) -> None:
    """Leave no free block in a small file system."""
    with open(directory / "other", "wb", buffering=0) as other, contextlib.suppress(OSError):
        while True:
            other.write(bytes(BLOCK))
    assert shutil.disk_usage(directory).free == 0


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (FULL_DEVICE, r"cannot write .* of chunk \d+ .*: No space left"),
        (FAILING_DEVICE, r"cannot read .* of chunk \d+ "),
    ],
)
def test_a_disk_that_fails_in_the_update_is_declared_lost(device: str, message: str, config: GeminiConfig) -> None:
    assert config.nvme is not None
    unverified = dataclasses.replace(config.nvme, verify=False)
    with GeminiDDP(TOWER.model(), dataclasses.replace(config, overlap="off", nvme=unverified)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        deliver(engine, square(engine(**TOWER.batches(1)[0])))
        with broken(engine, device), pytest.raises(OffloadIOError, match=message):
            update(engine, optimizer)
        with pytest.raises(ModelError, match="the optimizer state was lost"):
            optimizer.step()


def update(engine: GeminiDDP, optimizer: HybridAdam) -> None:
    optimizer.step()
    engine.runtime.finish_updates()


@contextlib.contextmanager
def broken(engine: GeminiDDP, device: str) -> Iterator[None]:
    """Let a device stand in for an unverified disk until no update is under way; a full device reads as zeros."""
    with redirected(store_of(engine).path, device):
        yield
        with contextlib.suppress(GeminiError):
            engine.runtime.updates.finish_all()


def test_gradients_that_find_no_room_leave_weights_and_state_to_be_saved(tmp_path: Path) -> None:
    with GeminiDDP(TOWER.model(), config_for("nvme", tmp_path, overlap="off")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        first, second = TOWER.batches(2)
        step(engine, optimizer, TOWER, first)
        before, moments = engine.master_state_dict(), optimizer.state_dict()["state"]
        loss = square(engine(**second))
        with (
            redirected(store_of(engine).path, FULL_DEVICE),
            pytest.raises(OffloadIOError, match=r"gradients of .*: No space"),
        ):
            deliver(engine, loss)
        assert same_bits(engine.master_state_dict(), before)
        for index, entry in optimizer.state_dict()["state"].items():
            assert same_bits(entry, moments[index])


def deliver(engine: GeminiDDP, loss: torch.Tensor) -> None:
    """Run backward until all gradients are where they wait."""
    loss.backward()
    engine.runtime.gradients.finish()
    for chunk_id in engine.runtime.states:
        engine.runtime.gradients.home_of(chunk_id).finish_writes()


# ---------------------------------------------------------------------- a failing device


def test_an_io_error_in_forward_costs_nothing_once_the_device_is_back(config: GeminiConfig) -> None:
    def fail() -> None:
        engine.runtime.finish_updates()
        engine.runtime.core.evict_idle()
        expected = pytest.raises(OffloadIOError, match=r"cannot read .*, weights of chunk \d+ ")
        with redirected(store_of(engine).path, FAILING_DEVICE), expected as caught:
            engine(**TOWER.batches(1)[0])
        assert caught.value.errno in (errno.EIO, errno.EINVAL)

    with GeminiDDP(TOWER.model(), config) as engine:
        losses = go_on(engine, hybrid_adam(engine.parameters()), fail)
    assert losses == train_gemini(TOWER, config).losses


def test_a_block_device_that_fails_is_an_io_error(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    if shutil.which("mkfs.ext4") is None or subprocess.run(["mkfs.ext4", "-q", image], check=False).returncode:
        pytest.skip("needs mkfs.ext4")
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as directory:
        config = disk_config("nvme", directory)
        assert config.nvme is not None
        config = dataclasses.replace(config, nvme=dataclasses.replace(config.nvme, direct=True))
        with GeminiDDP(TOWER.model(), config) as engine:
            assert store_of(engine).is_direct
            optimizer = hybrid_adam(engine.parameters())
            (batch,) = TOWER.batches(1)
            step(engine, optimizer, TOWER, batch)
            engine.runtime.finish_updates()
            engine.runtime.core.evict_idle()
            os.truncate(image, 1 << 20)  # what lies behind is gone
            with pytest.raises(OffloadIOError, match="the device failed: look at the kernel log") as caught:
                engine(**batch)
    assert caught.value.errno == errno.EIO


# ---------------------------------------------------------------------- helper threads


def kill(thread: threading.Thread) -> None:
    """Let a thread end at its next line of Python."""
    assert thread.ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1


@pytest.mark.parametrize("overlap", ["off", "next-forward", "speculative"])
def test_a_killed_update_thread_is_reported_and_its_state_declared_lost(overlap: str, config: GeminiConfig) -> None:
    with GeminiDDP(TOWER.model(), dataclasses.replace(config, overlap=overlap)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        first, second, third = TOWER.batches(3)
        step(engine, optimizer, TOWER, first)
        engine.runtime.finish_updates()
        (thread,) = [each for each in threading.enumerate() if each.name == "gemini-update"]
        kill(thread)
        with pytest.raises(GeminiError, match="the thread that updates weights has ended") as caught:
            train_two_more(engine, optimizer, second, third)
        assert isinstance(caught.value, (WorkerError, ModelError))
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        with pytest.raises(GeminiError):
            step(engine, optimizer, TOWER, second)
        path = store_of(engine).path
    assert not path.exists()


def train_two_more(engine: GeminiDDP, optimizer: HybridAdam, *batches: dict[str, torch.Tensor]) -> None:
    for batch in batches:
        step(engine, optimizer, TOWER, batch)
    engine.runtime.finish_updates()


REFUSED_THREADS = """
import errno, os, sys
from pathlib import Path
import test_faults as t
directory, moment = Path(sys.argv[1]), sys.argv[2]
batch = t.TOWER.batches(1)[0]
model = t.TOWER.model()
model(**batch)
if moment == "step":
    engine = t.GeminiDDP(model, t.disk_config("nvme", directory))
    optimizer = t.hybrid_adam(engine.parameters())
    t.square(engine(**batch)).backward()
    before = engine.master_state_dict()
t.forbid_or_say("clone", "clone3", errno_value=errno.EAGAIN)
num_tasks = len(os.listdir("/proc/self/task"))
try:
    t.GeminiDDP(model, t.disk_config("nvme", directory)) if moment == "construction" else optimizer.step()
except t.WorkerError as error:
    print(error)
if moment == "step":
    assert t.same_bits(engine.master_state_dict(), before)
    assert optimizer.runtime.steps.num_steps == 0
    t.TOWER.loss(engine(**batch))
    engine.close()
assert len(os.listdir("/proc/self/task")) <= num_tasks
assert os.listdir(directory) == []
"""


def forbid_or_say(*names: str, errno_value: int) -> None:
    """For programs: forbid system calls, or end with a line that says that this is not possible."""
    from faults import forbid

    if not forbid(*names, errno_value=errno_value):
        print("no seccomp")
        raise SystemExit


def run_restricted(program: str, *arguments: object) -> str:
    printed = run_program(program, *arguments)
    if printed == "no seccomp":
        pytest.skip("seccomp filters are not permitted here")
    return printed


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("construction", "cannot start 2 worker threads: Resource temporarily unavailable"),
        ("step", "cannot start the thread that updates weights: .*; nothing has been updated: raise the limits"),
    ],
)
def test_refused_threads_are_reported_and_nothing_is_lost(moment: str, message: str, tmp_path: Path) -> None:
    printed = run_restricted(REFUSED_THREADS, tmp_path, moment)
    assert re.match(message, printed), printed


# ---------------------------------------------------------------------- refused by the system

WITHOUT_KERNEL_IO = """
import errno, json, logging, sys, torch
from pathlib import Path
import test_faults as t
torch.set_num_threads(1)
t.forbid_or_say("io_uring_setup", "io_setup", errno_value=errno.EPERM)
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
config = t.disk_config("nvme", Path(sys.argv[1]))
with t.GeminiDDP(t.TOWER.model(), config) as engine:
    assert t.store_of(engine).backend.value == "threads"
print(json.dumps(t.train_gemini(t.TOWER, config).losses))
"""


@pytest.mark.slow
def test_without_asynchronous_io_of_the_kernel_training_gives_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    warning, *_, losses = run_restricted(WITHOUT_KERNEL_IO, tmp_path / "other").splitlines()
    assert warning.startswith("io_uring does not work here (Operation not permitted")
    assert warning.endswith("using threads instead")
    assert json.loads(losses) == train_gemini(TOWER, disk_config("nvme", tmp_path)).losses


WITHOUT_MEMORY = """
import resource, sys, torch
from pathlib import Path
import test_faults as t
model = torch.nn.Linear(4096, 4096)
config = t.disk_config("nvme", Path(sys.argv[1]), placement="auto", host_budget="2GiB")
held = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (held + (192 << 20), resource.RLIM_INFINITY))
try:
    t.GeminiDDP(model, config)
except MemoryError as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert not list(Path(sys.argv[1]).iterdir())
assert isinstance(model.weight, torch.nn.Parameter) and model.weight.isfinite().all()
with t.GeminiDDP(model, config):
    pass
"""


def test_host_memory_that_the_system_refuses_is_named_and_nothing_stays(tmp_path: Path) -> None:
    printed = run_program(WITHOUT_MEMORY, tmp_path)
    assert printed.startswith("OutOfTierMemoryError the machine refused ")
    assert printed.endswith("lower host_budget")


# ---------------------------------------------------------------------- exceptions of the user's


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_of_the_user_s_leaves_no_lease_and_no_graph(where: str, config: GeminiConfig) -> None:
    def fail() -> None:
        def interrupt(*_: Any) -> None:
            raise Interrupted

        block = engine.module.blocks[1]
        register = block.register_forward_pre_hook if where == "forward" else block.register_full_backward_pre_hook
        handle = register(interrupt)
        for _ in range(3):
            output = None
            with pytest.raises(Interrupted):
                output = run_step()
            assert output is None
        handle.remove()
        optimizer.zero_grad()

    def run_step() -> None:
        output = engine(**TOWER.batches(1)[0])
        outputs.append(weakref.ref(output))
        square(output).backward()

    outputs: list[weakref.ref[torch.Tensor]] = []
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        losses = go_on(engine, optimizer, fail)
        assert not any(chunk.is_held for chunk in engine.runtime.core.chunks)
        assert all(output() is None for output in outputs)
    assert losses == train_gemini(TOWER, config).losses
