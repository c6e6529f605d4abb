"""An accelerator's streams and events as a model of order, so that races of copies with compute show without one.

Everything runs at once, on the CPU, in the order in which it is submitted: one of the orders that a device allows. What
a device might do instead is found with vector clocks: an access to memory must come after every earlier access that
conflicts with it by the order of one stream, by an event, or because the host has waited. Else `races` names both.

All threads of the host count as one, ordered among themselves. Nothing has ended before the host has waited for it,
even if it is asked; in that the model is stricter than a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemini.kernels.pool import WorkerPool
from gemini.offload import resources
from gemini.offload.arena import HostArena
from gemini.offload.store import DiskStore
from gemini.offload.transfer import StreamTransfers

Clock = dict[str, int]
HOST = "host"


def merge(clock: Clock, other: Clock) -> None:
    """Let a clock know all that another one knows."""
    for agent, tick in other.items():
        clock[agent] = max(clock.get(agent, 0), tick)


@dataclass(frozen=True)
class Access:
    """A read or write of a part of one buffer."""

    agent: str
    tick: int
    begin: int
    end: int
    is_write: bool
    what: str

    def conflicts_with(self, other: Access) -> bool:
        return self.begin < other.end and other.begin < self.end and (self.is_write or other.is_write)

    def covers(self, other: Access) -> bool:
        return self.begin <= other.begin and other.end <= self.end


@dataclass
class Region:
    """A buffer of host or device memory and the accesses to it that may still matter."""

    name: str
    is_on_device: bool
    accesses: list[Access]


class FakeStream:
    """A torch.Stream: what it was given comes in order."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda = cuda
        self.name = name
        self.clock: Clock = {}

    def wait_event(self, event: FakeEvent) -> None:
        merge(self.clock, event.clock)


class FakeEvent:
    """A torch.Event: a point in a stream."""

    def __init__(self, stream: FakeStream) -> None:
        self.host_clock = stream.cuda.host_clock
        merge(stream.clock, self.host_clock)
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        merge(self.host_clock, self.clock)

    def query(self) -> bool:
        return all(tick <= self.host_clock.get(agent, 0) for agent, tick in self.clock.items())


class FakeCuda:
    """One device and its host; an Accelerator for transfers.

    Attributes:
        races: what a device would be free to do in another order, in words.
        compute: the stream that is current in the thread that made this object; others have `default`.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.races: list[str] = []
        self.host_clock: Clock = {HOST: 0}
        self.lock = threading.RLock()
        self.default = FakeStream(self, "default stream")
        self.compute = FakeStream(self, "compute stream")
        self._num_streams = 0
        self._thread = threading.get_ident()
        self._local = threading.local()
        self._regions: dict[int, Region] = {}

    # ---------------------------------------------------------------- what an Accelerator has

    def new_stream(self) -> FakeStream:
        self._num_streams += 1
        return FakeStream(self, f"stream {self._num_streams}")

    def current_stream(self) -> FakeStream:
        own = self.compute if threading.get_ident() == self._thread else self.default
        return getattr(self._local, "stream", None) or own

    @contextmanager
    def using(self, stream: FakeStream) -> Iterator[None]:
        before = getattr(self._local, "stream", None)
        self._local.stream = stream
        yield
        self._local.stream = before

    def record_event(self, *, is_timed: bool = False) -> FakeEvent:
        return FakeEvent(self.current_stream())

    def synchronize(self) -> None:
        for stream in (self.default, self.compute):
            merge(self.host_clock, stream.clock)

    # ---------------------------------------------------------------- accesses

    def watch(self, buffer: torch.Tensor, name: str, *, is_on_device: bool) -> torch.Tensor:
        """Follow all accesses to a buffer that has a storage of its own."""
        self._regions[buffer.untyped_storage().data_ptr()] = Region(name, is_on_device, [])
        return buffer

    def forget(self, buffer: torch.Tensor) -> None:
        """Follow a buffer no longer: its address may be another's soon."""
        self._regions.pop(buffer.untyped_storage().data_ptr(), None)

    def access(self, what: str, *, reads: list[Any], writes: list[Any]) -> None:
        """Note that something is submitted, to the current stream or, if it needs no device, done by the host."""
        touched = [(t, is_write) for tensors, is_write in ((reads, False), (writes, True)) for t in tensors]
        found = [(self._region_of(tensor), tensor, is_write) for tensor, is_write in touched]
        known = [(region, tensor, is_write) for region, tensor, is_write in found if region is not None]
        if not known:
            return
        with self.lock:
            runs_on_device = hasattr(self._local, "stream") and self._local.stream is not None
            runs_on_device |= any(region.is_on_device for region, _, _ in known)
            agent, clock = HOST, self.host_clock
            if runs_on_device:
                stream = self.current_stream()
                merge(stream.clock, self.host_clock)
                agent, clock = stream.name, stream.clock
            clock[agent] = clock.get(agent, 0) + 1
            for region, tensor, is_write in known:
                begin, end = _span(tensor)
                self._add(region, Access(agent, clock[agent], begin, end, is_write, what), clock)

    def _region_of(self, tensor: object) -> Region | None:
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            return None
        return self._regions.get(tensor.untyped_storage().data_ptr())

    def _add(self, region: Region, new: Access, clock: Clock) -> None:
        for old in region.accesses:
            if new.conflicts_with(old) and old.tick > clock.get(old.agent, 0):
                kinds = ["writes" if access.is_write else "reads" for access in (new, old)]
                self.races.append(
                    f"{new.what} {kinds[0]} {region.name} on the {new.agent} while {old.what} "
                    f"{kinds[1]} it on the {old.agent}"
                )
        replaced = {
            id(old)
            for old in region.accesses
            if new.covers(old) and old.tick <= clock.get(old.agent, 0) and (new.is_write or not old.is_write)
        }
        region.accesses = [old for old in region.accesses if id(old) not in replaced] + [new]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage and the one past its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return begin, begin + (last + 1) * tensor.itemsize


class _Watch(TorchDispatchMode):
    """Reports every operation of this thread; those that only make views touch no memory."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads: list[Any] = []
        writes: list[Any] = []
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for argument in func._schema.arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if argument.alias_info is None or is_written:
                (writes if is_written else reads).extend(tree_leaves(given.get(argument.name)))
        self._cuda.access(func._schema.name.removeprefix("aten::"), reads=reads, writes=writes)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Let `device="simulated"` mean StreamTransfers, on streams of a fake device, and watch its memory."""
    cuda = FakeCuda()
    replace = monkeypatch.setattr
    replace(torch.Tensor, "record_stream", lambda tensor, stream: None)
    replace(resources, "SimulatedTransfers", lambda ledger, pool: StreamTransfers(cuda, ledger))

    def watched(owner: type, name: str, *, is_on_device: bool) -> None:
        allocate: Callable[..., torch.Tensor] = getattr(owner, name)

        def allocate_watched(self: Any, nbytes: int, purpose: str, **options: Any) -> torch.Tensor:
            return cuda.watch(allocate(self, nbytes, purpose, **options), purpose, is_on_device=is_on_device)

        replace(owner, name, allocate_watched)

    def reported(owner: type, name: str, what: str, sort: Callable[..., tuple[list[Any], list[Any]]]) -> None:
        method = getattr(owner, name)

        def report(self: Any, *args: Any, **fields: Any) -> Any:
            reads, writes = sort(*args, **fields)
            cuda.access(what, reads=reads, writes=writes)
            return method(self, *args, **fields)

        replace(owner, name, report)

    def forgotten(owner: type) -> None:
        free = owner.free
        replace(owner, "free", lambda self, buffer, *rest: (cuda.forget(buffer), free(self, buffer, *rest))[1])

    watched(HostArena, "allocate", is_on_device=False)
    watched(StreamTransfers, "allocate", is_on_device=True)
    forgotten(HostArena)
    forgotten(StreamTransfers)
    reported(
        WorkerPool,
        "submit_adam",
        "the native update",
        lambda tile, record="", journal=None: ([tile.grad], [tile.working, tile.master, tile.momentum, tile.variance]),
    )
    reported(WorkerPool, "submit_gradient", "the gradient store", lambda dst, src, mode, record="": ([src], [dst]))
    reported(DiskStore, "read", "a read from disk", lambda extent, into, offset=0: ([], [into]))
    reported(DiskStore, "write", "a write to disk", lambda extent, source, offset=0: ([source], []))
    copy = torch.Tensor.copy_

    def copy_(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if threading.get_ident() != cuda._thread:  # whose operations the mode below does not see
            cuda.access("copy_", reads=[src], writes=[dst])
        return copy(dst, src, non_blocking)

    replace(torch.Tensor, "copy_", copy_)
    with _Watch(cuda):
        yield cuda
