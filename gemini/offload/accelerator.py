"""Any accelerator that torch supports: streams, events, memory, random numbers, and page-locked host memory.

torch gives each kind of device a module (`torch.cuda`, which ROCm's devices use too, `torch.xpu`, or one that another
maker has registered), and these modules have the same functions. What only some devices can do is asked for here, and
goes without it elsewhere: events that let the host sleep, and the page-locking of memory that is there already.

[Note: Page-locking on other devices]
torch page-locks memory that it has allocated itself. For memory that others have mapped there is CUDA's runtime; a
device's module may have `host_register(address, nbytes)`, which returns 0 or an error's number, and
`host_unregister(address)` instead. Without either the copies are right, and block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch

__all__ = [
    "Accelerator",
    "Event",
    "Stream",
    "find_accelerator",
    "is_accelerator",
    "random_states",
    "set_random_states",
]

PORTABLE = 1  # cudaHostRegisterPortable: locked for every device of the process
NEEDED = ("Event", "Stream", "current_stream", "device", "stream", "synchronize")
"""Functions that the module of a device must have, so that its copies can run at the same time as its kernels."""


class Event(Protocol):
    """A point in a stream: `torch.Event`, `torch.cuda.Event`."""

    def query(self) -> bool:
        """Return whether the device has come to it."""

    def synchronize(self) -> None:
        """Block until it has."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from here to a later event; both must be timed."""


class Stream(Protocol):
    """A stream, whose operations run in order on a device: `torch.Stream`, `torch.cuda.Stream`."""

    def wait_event(self, event: Any) -> None:
        """Make operations that are submitted from now on wait for an event."""


class Accelerator:
    """One device.

    Args:
        device: its index included; it need not be the one that is current.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)

    # ---------------------------------------------------------------- streams and events

    def new_stream(self) -> Stream:
        """Return another stream, which may come from a pool."""
        stream: Stream = self._module.Stream(device=self.device)
        return stream

    def current_stream(self) -> Stream:
        """Return the stream on which the calling thread's operations run."""
        stream: Stream = self._module.current_stream(self.device)
        return stream

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        """Run the calling thread's operations on a stream while the context is open."""
        # The outer context is for threads and programs whose current device is another one: leaving the inner one
        # alone would select that device, and so make a context, and take memory, on a device that is not ours.
        with self.selected(), self._module.stream(stream):
            yield

    def selected(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is the calling thread's current one."""
        context: AbstractContextManager[Any] = self._module.device(self.device)
        return context

    def record_event(self, *, is_timed: bool = False) -> Event:
        """Return an event on the calling thread's current stream.

        Args:
            is_timed: whether the time between it and others can be asked for. If not, the host sleeps while it waits,
                where the device allows that: the worker pool has better uses for a processor than spinning.

        Returns:
            The event.
        """
        if is_timed:
            event = self._module.Event(enable_timing=True)
        elif self.device.type == "cuda":
            event = self._module.Event(blocking=True)
        else:
            event = self._module.Event()
        event.record(self.current_stream())
        recorded: Event = event
        return recorded

    def synchronize(self) -> None:
        """Block until the device is idle."""
        self._module.synchronize(self.device)

    # ---------------------------------------------------------------- memory

    def free_nbytes(self) -> int:
        """Return the free bytes of the device."""
        return int(self._module.mem_get_info(self.device)[0])

    def allocated_nbytes(self) -> int:
        """Return the bytes of the device that tensors take."""
        return int(self._module.memory_allocated(self.device))

    def peak_allocated_nbytes(self) -> int:
        """Return the most that tensors have taken since `reset_peak`."""
        return int(self._module.max_memory_allocated(self.device))

    def reset_peak(self) -> None:
        """Measure the most that tensors take from now on."""
        self._module.reset_peak_memory_stats(self.device)

    # ---------------------------------------------------------------- host memory

    def lock(self, buffer: torch.Tensor) -> str | None:
        """Page-lock host memory, so that copies from and to it do not block the host.

        Args:
            buffer: contiguous, on the CPU, page aligned; `unlock` it before its memory goes.

        Returns:
            None, or why it could not be done.
        """
        if self.device.type == "cuda":
            return self._lock_for_cuda(buffer)
        register = getattr(self._module, "host_register", None)
        if register is None:
            return f"torch cannot do it for {self.device.type} devices"
        status = int(register(buffer.data_ptr(), buffer.numel()))
        return None if status == 0 else f"{self.device.type} error {status}"

    def unlock(self, address: int) -> None:
        """Undo `lock`, once all copies have ended.

        Args:
            address: of the buffer's first byte.
        """
        self.synchronize()  # a copy that nobody waited for may still be under way
        if self.device.type == "cuda":
            _cuda_runtime().cudaHostUnregister(address)
        else:
            self._module.host_unregister(address)

    def _lock_for_cuda(self, buffer: torch.Tensor) -> str | None:
        with self.selected():  # the call makes a context, which takes memory, on the current device
            status = int(_cuda_runtime().cudaHostRegister(buffer.data_ptr(), buffer.numel(), PORTABLE))
            if status != 0:
                _clear_last_error()
        return None if status == 0 else f"CUDA error {status}"


def _clear_last_error() -> None:
    """Clear the error of a failed call that torch did not see; otherwise the next kernel would report it."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def random_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return the states of the generators that operations on a device use, uint8 on the CPU each."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return tuple(states)


def set_random_states(device: torch.device, states: tuple[torch.Tensor, ...]) -> None:
    """Set the generators that operations on a device use to what `random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


def find_accelerator() -> torch.device | None:
    """Return the accelerator that torch finds, with the index that is current; None if it finds none.

    One whose copies cannot run beside its kernels counts as none.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    found = torch.accelerator.current_accelerator()
    if found is None or not is_accelerator(found.type) or not torch.accelerator.is_available():
        return None
    return torch.device(found.type, torch.accelerator.current_device_index())


def is_accelerator(device_type: str) -> bool:
    """Return whether torch has what is needed for a kind of device, whether or not there is one."""
    if device_type in ("cpu", "meta"):
        return False
    try:
        module = torch.get_device_module(device_type)
    except RuntimeError:
        return False
    return all(hasattr(module, name) for name in NEEDED)
