"""ChunkManager: any tensors, any tier, and values that survive every move."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FAILING_DEVICE, redirected
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_resources import random_bytes, truncated_file

from gemini import (
    ChunkManager,
    ConfigError,
    GeminiConfig,
    IllegalTransitionError,
    MemoryTier,
    NVMeConfig,
    OffloadIOError,
    OutOfTierMemoryError,
)

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
KIB = 1 << 10


def make_manager(directory: Path | str | None, device: str = "cpu", **fields: Any) -> ChunkManager:
    nvme = None if directory is None else NVMeConfig(path=directory, budget="1MiB")
    sizes = {"device_budget": "64KiB"} if device == "simulated" else {}
    return ChunkManager(
        GeminiConfig(**{"device": device, "host_budget": "256KiB", "nvme": nvme, "num_threads": 2, **sizes, **fields})
    )


def tiers_of(device: str) -> list[MemoryTier]:
    return [HOST, NVME] if device == "cpu" else [DEVICE, HOST, NVME]


@pytest.fixture(params=["cpu", "simulated"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manager(device: str, tmp_path: Path) -> Iterator[ChunkManager]:
    with make_manager(tmp_path, device) as made:
        yield made


def test_values_survive_use_and_moves_through_every_tier(manager: ChunkManager, device: str) -> None:
    weight, bias = torch.randn(30, 20), torch.randn(7)
    expected = weight.clone(), bias.clone()
    chunk_id = manager.register({"weight": weight, "bias": bias}, tier=NVME)
    assert weight.isnan().all()
    for tier in (*tiers_of(device), *reversed(tiers_of(device))):
        manager.move(chunk_id, tier)
        assert manager.tier_of(chunk_id) is tier
        with manager.using(chunk_id) as (first, second):
            assert first is weight
            assert second is bias
            assert torch.equal(first, expected[0])
            assert torch.equal(second, expected[1])


def test_modified_values_survive_eviction(manager: ChunkManager) -> None:
    tensors = [torch.zeros(5000) for _ in range(12)]  # more than the device, and half the host, can hold
    ids = [manager.register([tensor], tier=NVME) for tensor in tensors]
    for round_ in range(3):
        for chunk_id in ids:
            with manager.using(chunk_id) as (tensor,):
                assert bool((tensor == round_ * (chunk_id + 1)).all())
                tensor.add_(chunk_id + 1)


def test_a_reader_inside_a_writer_does_not_lose_what_was_written(manager: ChunkManager) -> None:
    chunk_id = manager.register([torch.zeros(100)], tier=NVME)
    with manager.using(chunk_id, is_modified=False), manager.using(chunk_id) as (tensor,):
        tensor.fill_(3)
    manager.move(chunk_id, HOST)  # from its home: the copy that was in compute memory does not count
    with manager.using(chunk_id) as (tensor,):
        assert bool((tensor == 3).all())


def test_only_the_lease_protects_a_chunk(manager: ChunkManager, device: str) -> None:
    budget = 65_536 if device == "simulated" else 262_144
    numel = budget // 8 - 1024  # two of them fit, three do not
    ids = [manager.register([torch.zeros(numel)], tier=NVME) for _ in range(3)]
    manager.access(ids[0])
    manager.access(ids[1])
    message = rf"cannot fetch chunk 2 .* raise {'device' if device == 'simulated' else 'host'}_budget"
    with pytest.raises(OutOfTierMemoryError, match=message):
        manager.access(ids[2])
    manager.release(ids[1])
    manager.access(ids[2])


def test_a_leased_chunk_cannot_move(manager: ChunkManager) -> None:
    chunk_id = manager.register([torch.zeros(10)])
    message = r"chunk 0 \(tensor 0 and 0 more\) is held and cannot move; release it first"
    with manager.using(chunk_id), pytest.raises(IllegalTransitionError, match=message):
        manager.move(chunk_id, NVME)
    manager.move(chunk_id, NVME)


def test_a_second_release_is_refused(manager: ChunkManager) -> None:
    chunk_id = manager.register([torch.zeros(10)], tier=NVME)
    manager.access(chunk_id)
    manager.release(chunk_id)
    with pytest.raises(IllegalTransitionError, match=r"chunk 0 .* is 'ready': it is not held, so"):
        manager.release(chunk_id)


@pytest.mark.parametrize("chunk_id", [-1, 1, 99])
def test_an_unknown_chunk_is_refused(manager: ChunkManager, chunk_id: int) -> None:
    manager.register([torch.zeros(10)])
    for call in (manager.access, manager.release, manager.tier_of, lambda i: manager.move(i, NVME)):
        with pytest.raises(ConfigError, match=rf"^there is no chunk {chunk_id}; register returned 0 to 0"):
            call(chunk_id)


def test_an_unknown_chunk_of_an_empty_manager_is_refused(manager: ChunkManager) -> None:
    with pytest.raises(ConfigError, match=r"^there is no chunk 0; nothing has been registered"):
        manager.access(0)


def test_use_after_close_is_refused_and_closing_again_is_not(manager: ChunkManager) -> None:
    tensor = torch.ones(10)
    chunk_id = manager.register([tensor])
    manager.access(chunk_id)
    manager.close()
    manager.close()
    assert tensor.isnan().all()
    calls = (lambda: manager.access(0), lambda: manager.release(0), lambda: manager.register([torch.zeros(1)]))
    for call in (*calls, lambda: manager.move(0, HOST), lambda: manager.tier_of(0)):
        with pytest.raises(ConfigError, match="^this ChunkManager has been closed$"):
            call()


def test_close_removes_the_swap_file(tmp_path: Path, device: str) -> None:
    manager = make_manager(tmp_path, device)
    manager.access(manager.register([torch.ones(10)], tier=NVME))
    assert [path.name for path in tmp_path.iterdir()] == ["gemini-rank0.swap"]
    manager.close()
    assert list(tmp_path.iterdir()) == []


def test_the_swap_file_stays_within_the_disk_budget(tmp_path: Path) -> None:
    with make_manager(tmp_path) as manager:
        assert (tmp_path / "gemini-rank0.swap").stat().st_size == 1 << 20
        manager.register([torch.zeros(252 * 1024, dtype=torch.uint8)], tier=NVME)
        manager.register([torch.zeros(768 * 1024, dtype=torch.uint8)], tier=NVME)
        with pytest.raises(OutOfTierMemoryError):
            manager.register([torch.zeros(1, dtype=torch.uint8)], tier=NVME)


# ---------------------------------------------------------------------- what may be registered


@pytest.mark.parametrize(
    "tensors",
    [[], {}, [torch.zeros(2), torch.zeros(2, dtype=torch.int8)], [torch.zeros(2, dtype=torch.float16), torch.zeros(2)]],
)
def test_nothing_and_mixed_dtypes_are_refused(manager: ChunkManager, tensors: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"^register: expected distinct tensors of one dtype, got {len(tensors)} of "
    ):
        manager.register(tensors)


def test_a_tensor_has_one_chunk(manager: ChunkManager) -> None:
    tensor = torch.zeros(2)
    with pytest.raises(ConfigError, match="^register: expected distinct tensors of one dtype, got 2 of"):
        manager.register([tensor, tensor])
    manager.register([tensor])
    with pytest.raises(ConfigError, match="^register: a tensor belongs to a chunk already"):
        manager.register({"again": tensor})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16])
def test_every_dtype_keeps_its_values(manager: ChunkManager, device: str, dtype: torch.dtype) -> None:
    tensor = random_bytes(300).to(dtype).view(3, 100)
    expected = tensor.clone()
    chunk_id = manager.register([tensor], tier=NVME)
    for tier in tiers_of(device):
        manager.move(chunk_id, tier)
        with manager.using(chunk_id) as (found,):
            assert torch.equal(found, expected)
            assert found.dtype is dtype


def test_tensors_that_are_not_contiguous_keep_their_values(manager: ChunkManager) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = [whole.t(), whole[:, ::2], torch.tensor(5.0).expand(3, 3)]
    expected = [tensor.clone() for tensor in tensors]
    chunk_id = manager.register(tensors, tier=NVME)
    with manager.using(chunk_id) as found:
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert torch.equal(whole, torch.arange(24.0).view(4, 6))


def test_tensors_without_elements_are_kept(manager: ChunkManager, device: str) -> None:
    both = manager.register([torch.zeros(0, 5), torch.ones(2), torch.zeros(3, 0)], tier=NVME)
    none = manager.register([torch.zeros(0)], tier=HOST)
    for chunk_id in (both, none):
        for tier in tiers_of(device):
            manager.move(chunk_id, tier)
            with manager.using(chunk_id) as tensors:
                shapes = [tuple(tensor.shape) for tensor in tensors]
            assert shapes == ([(0, 5), (2,), (3, 0)] if chunk_id == both else [(0,)])


def test_parameters_may_be_registered(manager: ChunkManager) -> None:
    layer = torch.nn.Linear(8, 4)
    expected = layer.weight.detach().clone()
    chunk_id = manager.register(dict(layer.named_parameters()), tier=NVME)
    with manager.using(chunk_id, is_modified=False):
        assert torch.equal(layer.weight, expected)
        assert layer(torch.zeros(1, 8)).shape == (1, 4)


# ---------------------------------------------------------------------- tiers that end


def test_a_tier_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with make_manager(None) as manager:
        with pytest.raises(ConfigError, match=r"^there is no device tier: GeminiConfig.device is the CPU"):
            manager.register([torch.zeros(2)], tier=DEVICE)
        with pytest.raises(ConfigError, match=r"^there is no NVMe tier: give GeminiConfig\(nvme=NVMeConfig\("):
            manager.register([torch.zeros(2)], tier=NVME)
        tensor = torch.ones(2)
        manager.register([tensor])
        assert torch.equal(tensor, torch.ones(2))


@pytest.mark.parametrize("tier", list(MemoryTier))
def test_a_full_tier_refuses_and_leaves_everything_as_it_was(tmp_path: Path, tier: MemoryTier) -> None:
    with make_manager(tmp_path, "simulated") as manager:
        kept = manager.register([torch.full((100,), 5.0)], tier=HOST)
        held = {t: manager.held_nbytes(t) for t in MemoryTier}
        tensor = torch.ones(1 << 18)  # 1 MiB
        with pytest.raises(OutOfTierMemoryError):
            manager.register([tensor], tier=tier)
        assert {t: manager.held_nbytes(t) for t in MemoryTier} == held
        assert torch.equal(tensor, torch.ones(1 << 18))
        with manager.using(kept) as (found,):
            assert bool((found == 5).all())


def test_a_move_that_does_not_fit_leaves_the_chunk_where_it_was(tmp_path: Path) -> None:
    with make_manager(tmp_path, "simulated", device_budget="48KiB") as manager:
        chunk_id, other = (manager.register([torch.full((8192,), value)], tier=NVME) for value in (2.0, 3.0))
        with (
            manager.using(other),
            pytest.raises(OutOfTierMemoryError, match=r"^device tier: 32.00 KiB more for working exceed"),
        ):
            manager.move(chunk_id, DEVICE)
        for tier in (NVME, HOST):
            manager.move(chunk_id, tier)
            assert manager.tier_of(chunk_id) is tier
            with manager.using(chunk_id, is_modified=False) as (tensor,):
                assert tensor.unique().tolist() == [2.0]


def test_idle_copies_make_room_for_a_home(tmp_path: Path) -> None:
    with make_manager(tmp_path, "simulated") as manager:
        used = manager.register([torch.ones(8192)], tier=NVME)
        with manager.using(used):
            assert manager.held_nbytes(DEVICE) == 32 * KIB
        manager.register([torch.ones(12_288)], tier=DEVICE)
        assert manager.held_nbytes(DEVICE) == 48 * KIB


def test_a_failed_read_can_be_tried_again(manager: ChunkManager, tmp_path: Path) -> None:
    chunk_id = manager.register([torch.ones(5000)], tier=NVME)
    with truncated_file(tmp_path / "gemini-rank0.swap"):
        with pytest.raises(OffloadIOError, match="the file ends before the bytes asked for"):
            manager.access(chunk_id)
        with pytest.raises(OffloadIOError, match="the file ends before the bytes asked for"):
            manager.move(chunk_id, HOST)
    assert manager.tier_of(chunk_id) is NVME
    with manager.using(chunk_id) as (tensor,):
        assert bool((tensor == 1).all())


# ---------------------------------------------------------------------- against a dict


class ManagerMachine(RuleBasedStateMachine):
    """Random calls, some while the disk fails, compared with a plain dict of tensors.

    A value that could not be written home is in doubt: it may be in compute memory still, or be refused, until it is
    written again; it is never another one.
    """

    @initialize(device=st.sampled_from(["cpu", "simulated"]))
    def start(self, device: str) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.tiers = tiers_of(device)
        self.manager = make_manager(self.directory.name, device, host_budget="96KiB")
        self.tensors: dict[int, torch.Tensor] = {}
        """What was registered."""
        self.values: dict[int, torch.Tensor] = {}
        """What the registered tensors must show while they are held."""
        self.homes: dict[int, MemoryTier] = {}
        self.holds: dict[int, int] = {}
        self.modified: set[int] = set()  # since they were last at home
        self.doubtful: set[int] = set()

    def pick(self, data: st.DataObject, ids: Any) -> int:
        return data.draw(st.sampled_from(sorted(ids)))  # type: ignore[no-any-return]

    @rule(data=st.data(), numel=st.sampled_from([0, 1, 1000, 4096, 5000]))
    def register(self, data: st.DataObject, numel: int) -> None:
        value = torch.full((numel,), float(len(self.values)))
        tier = data.draw(st.sampled_from(self.tiers))
        try:
            chunk_id = self.manager.register([tensor := value.clone()], tier=tier)
        except OutOfTierMemoryError:
            return
        assert chunk_id == len(self.values)
        self.tensors[chunk_id], self.values[chunk_id] = tensor, value
        self.homes[chunk_id], self.holds[chunk_id] = tier, 0

    @precondition(lambda self: self.values)
    @rule(data=st.data())
    def access(self, data: st.DataObject) -> None:
        chunk_id = self.pick(data, self.values)
        try:
            (tensor,) = self.manager.access(chunk_id)
        except OutOfTierMemoryError:
            assert any(self.holds.values()) or len(self.values) > 1
            return
        except OffloadIOError:
            assert chunk_id in self.doubtful
            return
        assert tensor is self.tensors[chunk_id]
        assert torch.equal(tensor, self.values[chunk_id])
        self.holds[chunk_id] += 1

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data(), added=st.sampled_from([0.0, 1.0]))
    def release(self, data: st.DataObject, added: float) -> None:
        chunk_id = self.pick(data, [i for i, count in self.holds.items() if count])
        self.tensors[chunk_id].add_(added)
        self.values[chunk_id] = self.values[chunk_id] + added
        self.holds[chunk_id] -= 1
        if added:
            self.modified.add(chunk_id)
        self.manager.release(chunk_id, is_modified=added != 0)
        self.note_written(chunk_id)

    def note_written(self, chunk_id: int) -> None:
        """A chunk whose last hold was given back after it had been modified is at home."""
        if not self.holds[chunk_id] and chunk_id in self.modified:
            self.modified.remove(chunk_id)
            self.doubtful.discard(chunk_id)

    @precondition(lambda self: self.values)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        chunk_id, tier = self.pick(data, self.values), data.draw(st.sampled_from(self.tiers))
        try:
            self.manager.move(chunk_id, tier)
            assert not self.holds[chunk_id]
            self.homes[chunk_id] = tier
        except IllegalTransitionError:
            assert self.holds[chunk_id]
        except OutOfTierMemoryError:
            assert tier is not self.homes[chunk_id]
        except OffloadIOError:
            assert chunk_id in self.doubtful

    @contextmanager
    def failing_disk(self) -> Iterator[None]:
        with redirected(Path(self.directory.name) / "gemini-rank0.swap", FAILING_DEVICE):
            yield

    @precondition(lambda self: self.values)
    @rule(data=st.data())
    def access_while_the_disk_fails(self, data: st.DataObject) -> None:
        chunk_id = self.pick(data, self.values)
        try:
            with self.failing_disk():
                self.manager.access(chunk_id)
        except OffloadIOError:
            assert self.homes[chunk_id] is NVME
            assert not self.holds[chunk_id]
        except OutOfTierMemoryError:
            pass
        else:
            self.holds[chunk_id] += 1  # it was in compute memory; the invariant looks at its value

    @precondition(lambda self: any(self.holds[i] == 1 and self.homes[i] is NVME for i in self.values))
    @rule(data=st.data())
    def release_while_the_disk_fails(self, data: st.DataObject) -> None:
        chunk_id = self.pick(data, [i for i, n in self.holds.items() if n == 1 and self.homes[i] is NVME])
        self.tensors[chunk_id].add_(1.0)
        self.values[chunk_id] = self.values[chunk_id] + 1.0
        with self.failing_disk(), pytest.raises(OffloadIOError, match="cannot write"):
            self.manager.release(chunk_id)
        self.holds[chunk_id] = 0
        self.modified.add(chunk_id)
        self.doubtful.add(chunk_id)

    @precondition(lambda self: self.values)
    @rule(data=st.data())
    def move_while_the_disk_fails(self, data: st.DataObject) -> None:
        chunk_id, tier = self.pick(data, self.values), data.draw(st.sampled_from(self.tiers))
        is_touching_disk = NVME in (tier, self.homes[chunk_id]) and tier is not self.homes[chunk_id]
        try:
            with self.failing_disk():
                self.manager.move(chunk_id, tier)
            assert not is_touching_disk
            self.homes[chunk_id] = tier
        except IllegalTransitionError:
            assert self.holds[chunk_id]
        except OutOfTierMemoryError:
            assert tier is not self.homes[chunk_id]
        except OffloadIOError:
            assert is_touching_disk

    @invariant()
    def homes_agree_and_budgets_hold(self) -> None:
        assert [self.manager.tier_of(i) for i in self.values] == list(self.homes.values())
        assert self.manager.held_nbytes(HOST) <= 96 * KIB
        assert self.manager.held_nbytes(DEVICE) <= 64 * KIB
        for chunk_id, count in self.holds.items():
            if count:
                assert torch.equal(self.tensors[chunk_id], self.values[chunk_id])

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.close()
            self.directory.cleanup()


TestManagerAgainstADict = ManagerMachine.TestCase
TestManagerAgainstADict.settings = settings(
    max_examples=40, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)
