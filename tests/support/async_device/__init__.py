"""An accelerator for tests that is asynchronous and runs on the CPU: torch's device "async_sim".

Its streams are threads, its events are real, its memory cannot be read by the host, and its allocator reuses memory as
CUDA's does; see runtime.h and async_device.cpp. What a missing wait would do on a GPU, it does here, most of all if
copies or kernels are made late (`set_options`).

`load` compiles it where that has not been done, and gives torch its one device of another maker. That cannot be undone,
and is best done before anything else: tests are given a process for it (`process.on_async_device`).
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gemini.heap.build import COMPILERS, build_library, cache_dir

NAME = "async_sim"
_HERE = Path(__file__).parent
_OPTIONS = {
    "seed": 0,
    "max_kernel_delay_us": 0,
    "max_copy_delay_us": 0,
    "has_lazy_kernels": 0,
    "has_lazy_copies": 0,
    "kernel_cost_us": 0,
    "upload_nbytes_per_second": 0,
    "download_nbytes_per_second": 0,
    "capacity_nbytes": 4 << 30,
    "is_visible_to_host": 0,
    "fills_new_blocks": 0,
    "keeps_records": 0,
}
"""What can be set, and what holds otherwise; runtime.h says what each means."""
_KINDS = ("kernel", "upload", "download", "copy", "other")


@dataclass(frozen=True)
class Record:
    """Something that has run on the device; times are those of `time.monotonic_ns`."""

    name: str
    device: int
    stream: int
    kind: str
    nbytes: int
    begin_ns: int
    end_ns: int


@dataclass(frozen=True)
class Counts:
    """What has run on all devices since the process began."""

    num_kernels: int
    num_uploads: int
    num_downloads: int
    uploaded_nbytes: int
    downloaded_nbytes: int


class _Record(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 56),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("nbytes", ctypes.c_int64),
        ("begin_ns", ctypes.c_int64),
        ("end_ns", ctypes.c_int64),
    )


@functools.cache
def compiled() -> Path:
    """Return the compiled device; skips the test where there is nothing to compile it with."""
    if not sys.platform.startswith("linux") or not any(map(shutil.which, COMPILERS)):
        pytest.skip("the simulated asynchronous device needs Linux and a C++ compiler")
    if not hasattr(torch._C, "_accelerator_getDeviceStats"):
        pytest.skip("the simulated asynchronous device needs torch 2.9, whose accelerators have allocators")
    sources = [_HERE / "async_device.cpp", _HERE / "runtime.cpp"]
    return build_library(cache_dir(), sources, headers=[_HERE / "runtime.h"], libraries=["c10", "torch_cpu", "torch"])


@functools.cache
def load() -> ctypes.CDLL:
    """Register the device with torch, once."""
    library = ctypes.CDLL(str(compiled()))
    library.async_device_set_option.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.async_device_set_random_state.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
    library.async_device_lock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.async_device_unlock.argtypes = [ctypes.c_void_p]
    library.async_device_set_option.restype = library.async_device_lock.restype = None
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module(library))
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.ones(1).pin_memory()  # torch finds no memory page-locked before it has done so once
    atexit.register(torch.accelerator.synchronize)  # no kernel may run while torch is being destroyed
    return library


def set_options(**options: int) -> None:
    """Set the options named, and all others to what they are at first; takes effect for what has not begun."""
    unknown = options.keys() - _OPTIONS.keys()
    assert not unknown, unknown
    for which, (name, usual) in enumerate(_OPTIONS.items()):
        load().async_device_set_option(which, options.get(name, usual))


@contextmanager
def device_with(**options: int) -> Iterator[torch.device]:
    """Yield the device with options set; what runs on it then ends before they are reset."""
    load()
    set_options(**options)
    try:
        yield torch.device(NAME, torch.accelerator.current_device_index())
        torch.accelerator.synchronize()
    finally:
        set_options()
        take_records()


def counts() -> Counts:
    """Return what has run so far."""
    numbers, nbytes = (ctypes.c_int64 * len(_KINDS))(), (ctypes.c_int64 * len(_KINDS))()
    load().async_device_counts(numbers, nbytes)
    return Counts(numbers[0], numbers[1], numbers[2], nbytes[1], nbytes[2])


def take_records() -> list[Record]:
    """Return what has ended since the last call, in the order in which it ended, if `keeps_records` was set."""
    library, found, record = load(), [], _Record()
    while library.async_device_take_record(ctypes.byref(record)):
        fields: dict[str, Any] = {name: getattr(record, name) for name, _ in _Record._fields_ if name != "padding"}
        found.append(Record(**{**fields, "name": record.name.decode(), "kind": _KINDS[record.kind]}))
    return found


def _device_module(library: ctypes.CDLL) -> types.ModuleType:
    """Return what torch looks for at `torch.async_sim`: what modules such as torch.cuda have."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    accelerator = torch.accelerator

    def index_of(device: Any = None) -> int:
        if isinstance(device, int):
            return device
        index = torch.device(device).index if device is not None else None
        return accelerator.current_device_index() if index is None else index

    def manual_seed_all(seed: int) -> None:
        for index in range(module.device_count()):
            library.async_device_set_random_state(index, seed, 0)

    def get_rng_state(device: Any = None) -> torch.Tensor:
        state = (ctypes.c_uint64 * 2)()
        library.async_device_random_state(index_of(device), state)
        return torch.frombuffer(bytearray(bytes(state)), dtype=torch.uint8)

    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        seed, num_drawn = (value % (1 << 64) for value in state.view(torch.int64).tolist())
        library.async_device_set_random_state(index_of(device), seed, num_drawn)

    def host_register(address: int, nbytes: int) -> int:
        library.async_device_lock(address, nbytes)
        return 0

    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 2
    module.current_device = accelerator.current_device_index
    module.set_device = accelerator.set_device_index
    module.device = lambda device: accelerator.device_index(index_of(device))
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.manual_seed_all = module.manual_seed = manual_seed_all
    module.get_rng_state, module.set_rng_state = get_rng_state, set_rng_state
    module.host_register, module.host_unregister = host_register, library.async_device_unlock
    module.Stream, module.Event = torch.Stream, torch.Event
    module.current_stream = lambda device=None: accelerator.current_stream(index_of(device))
    module.stream = lambda stream: stream  # a torch.Stream is a context
    module.synchronize = accelerator.synchronize
    module.empty_cache = accelerator.empty_cache
    module.memory_allocated = accelerator.memory_allocated
    module.max_memory_allocated = accelerator.max_memory_allocated
    module.memory_reserved = accelerator.memory_reserved
    module.reset_peak_memory_stats = accelerator.reset_peak_memory_stats
    module.mem_get_info = accelerator.get_memory_info
    module.get_device_name = lambda device=None: "simulated asynchronous device"
    module.get_device_properties = lambda device=None: types.SimpleNamespace(
        total_memory=accelerator.get_memory_info(index_of(device))[1]
    )
    sys.modules[module.__name__] = module
    return module
