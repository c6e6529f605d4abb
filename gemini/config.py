"""Configuration: typed, and validated once. Only this module parses sizes such as "6GiB"."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gemini.config_deepspeed import disk_arguments, engine_arguments
from gemini.errors import ConfigError
from gemini.placement.plan import PlacementPlan
from gemini.placement.policy import StaticPlacement
from gemini.tiers import parse_nbytes

__all__ = ["GeminiConfig", "NVMeConfig"]

OVERLAPS = ("auto", "off", "next-forward", "speculative")
EXCHANGES = ("auto", "host", "collective")
_BYTES_WRITTEN_PATTERN = re.compile(r"([TP]B)W\s*$", re.IGNORECASE)
_WORD_PATTERN = re.compile(r"[!-~]{1,128}")
DEFAULT_ACTIVATION_RESERVE = 0.3
"""Part of the device budget kept for activations until they have been measured."""
DEFAULT_CHECKPOINT_RESERVE = 0.1
"""Part of the host budget kept for activation checkpoints."""
WORKING_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class NVMeConfig:
    """The disk tier: one preallocated swap file in a directory."""

    path: str | Path
    """Directory for the swap file; it must exist and be writable. One run at a time may use it. A memory service uses
    its own."""
    budget: str | int
    """Most bytes the swap file may take; what the plan needs is reserved at construction."""
    engine: Literal["auto", "io_uring", "aio", "threads"] = "auto"
    """How the kernel is asked for bytes; "auto" takes the best that works here."""
    queue_depth: int = 32
    """Kernel requests in flight at most."""
    direct: bool = True
    """Bypass the page cache (O_DIRECT) where the file system allows it."""
    verify: bool = False
    """Compare whatever is read with the CRC-32C of what was written there, in a thread of the I/O engine. Takes 4 bytes
    of host memory for each 4096 bytes of the swap file."""
    endurance: str | int | None = None
    """Bytes that the drive is rated to take in its life, as its data sheet says it ("600 TBW", "1.2 PBW") or as other
    bytes ("600TB"); the memory report then relates what a step writes to it. None: not known."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)) or not os.fspath(self.path):
            raise ConfigError(f"NVMeConfig.path: expected a directory as a str or Path, got {self.path!r}")
        parse_nbytes(self.budget, name="NVMeConfig.budget")
        if self.endurance is not None:
            parse_endurance(self.endurance)
        if self.engine not in ("auto", "io_uring", "aio", "threads"):
            raise ConfigError(
                f'NVMeConfig.engine: expected "auto", "io_uring", "aio" or "threads", got {self.engine!r}'
            )
        _check_int("NVMeConfig.queue_depth", self.queue_depth, 1, 4096)
        _check_bool("NVMeConfig.direct", self.direct)
        _check_bool("NVMeConfig.verify", self.verify)

    @property
    def budget_nbytes(self) -> int:
        """The budget in bytes."""
        return parse_nbytes(self.budget, name="NVMeConfig.budget")

    @property
    def endurance_nbytes(self) -> int | None:
        """The rated endurance in bytes."""
        return None if self.endurance is None else parse_endurance(self.endurance)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeminiConfig:
    """The settings of an engine; each field has a default that works."""

    device: str | torch.device | None = None
    """Device of forward and backward: "cuda", "cuda:1", another accelerator that torch finds ("xpu"), "cpu", or
    "simulated" (host memory that acts as a device with its own budget and copies, for tests). None: the accelerator if
    there is one, else the CPU."""
    dtype: torch.dtype = torch.bfloat16
    """Working dtype of floating-point parameters: bfloat16, float16 (with dynamic loss scaling) or float32. Most
    buffers are cast too; float8, and what transformers keeps in float32, stay as they are (docs/weights.md)."""
    cast_forward_inputs: bool = True
    """Whether floating-point inputs of the model, also in containers, are cast to `dtype`. False passes them unchanged,
    for models that need times or positions in float32."""
    device_budget: str | int | None = None
    """Bytes of device memory that everything together may take, including activations. None: nine tenths of what is
    free at construction. Not used on the CPU, where the host budget is the only memory budget."""
    host_budget: str | int | None = None
    """Bytes of host memory that the engine may hold. None: nine tenths of what is available at construction."""
    nvme: NVMeConfig | None = None
    """The disk tier; None: there is none."""
    placement: Literal["auto"] | StaticPlacement | PlacementPlan = "auto"
    """Placement of chunks: "auto" fills the fastest tiers that the budgets allow, a StaticPlacement gives byte
    fractions per tier, and a PlacementPlan is used as it is."""
    gradient_accumulation: bool = True
    """Whether several backward passes may come before one optimizer step. Gradients then wait as float32 (4 bytes per
    parameter). False keeps them in the working dtype; if that is a half precision (2 bytes), a second backward is an
    error."""
    num_batch_slices: int = 1
    """Number of slices in which a batch passes through each repeated block, in forward and backward. A large batch then
    needs only the activations of a small one, and weights, gradients and state still move once per step. With more than
    one slice, every block runs a second time in backward, as with activation checkpointing. Each block must treat the
    rows of its batch, dimension 0 of its first argument, independently. Other tensors of the same length in dimension 0
    are sliced too if their names and shapes are those of masks, positions and encoder states in transformers, or if
    they are listed in `batch_arguments`. All slices share them if they are listed in `shared_arguments`. Otherwise they
    are refused, because a tensor with one row per head can look the same."""
    batch_arguments: tuple[str, ...] = ()
    """Names of blocks' arguments whose tensors have one row for each row of the batch in dimension 0. Only needed if
    that dimension is as long as the batch and `num_batch_slices` is above 1."""
    shared_arguments: tuple[str, ...] = ()
    """Names of blocks' arguments whose tensors are the same for all rows of a batch, with any length. The first
    argument with tensors that is not among them is the batch."""
    overlap: Literal["auto", "off", "next-forward", "speculative"] = "auto"
    """When updates run; the bits are the same. "off": inside `optimizer.step()`. "next-forward": during the next
    forward, which waits for each unit's own update. "speculative": also during backward, on the assumption that nothing
    will be clipped or skipped. The results go to a second place and become valid when `step()` confirms them. Weights
    and state that are both on disk take twice their bytes there. With a device, weights in host memory and their state
    may have second places too, as far as `host_budget` leaves room. "auto" chooses what the budgets allow and measured
    times recommend."""
    prefetch_depth: int = 2
    """Number of chunks that are fetched ahead of their use. A unit, such as a block, is one chunk or a few."""
    activation_reserve: str | int | None = None
    """Minimum device bytes that are kept free for activations and temporaries. None: 30 % of the device budget until
    the first step has measured what they take. Not used on the CPU."""
    checkpoint_reserve: str | int | None = None
    """Host bytes that are kept free for activation checkpoints of sliced blocks, the inputs of blocks that wait for
    backward. None: a tenth of the host budget. Not used on the CPU or without slices."""
    share_frozen: bool = True
    """Whether the ranks of a machine share one whole copy of the frozen weights in host memory, so that no rank asks
    another for them. False cuts them into shards over the ranks of all machines, like trained weights. Not used with
    one rank."""
    exchange: Literal["auto", "host", "collective"] = "auto"
    """Where gradients of ranks meet. "host": in host memory that the ranks of a machine share, where the CPU sums
    them; all ranks that a chunk is cut over must be on one machine. "collective": in compute memory, by
    torch.distributed. "auto": in host memory where the ranks' GPUs cannot reach each other's memory, else by
    collectives. Not used with one rank."""
    min_unit_nbytes: int = 1 << 20
    """Modules with fewer bytes of working weights, outside repeated blocks, join the root unit, which always stays in
    compute memory, because a separate fetch would cost more than it saves."""
    tile_numel: int = 1 << 20
    """Number of parameters in a tile, the unit in which optimizer state moves; a multiple of 4096."""
    ring_depth: int = 4
    """Number of tiles in flight between the disk and the optimizer: one read, one updated, one written and one
    spare."""
    num_threads: int | None = None
    """Number of native worker threads, at most 16. None: the number of processors of this process; with a device, the
    number of its cores minus two for the threads that launch kernels."""
    isa: Literal["auto", "scalar", "avx2", "avx512", "neon"] = "auto"
    """Instruction set of the native kernels. All give the same bits; setting one is for tests."""
    cpu_allocator: Literal["auto", "pool", "system"] = "auto"
    """Allocator of torch's CPU memory, for the whole process. "pool": `gemini.heap`, which keeps the process small; it
    is compiled on first use, and a failure is an error. "system": the present allocator, which is torch's own malloc
    unless an engine of this process has installed the pool (`gemini.heap.uninstall` removes it). "auto": the pool if
    forward and backward run on the CPU and the pool is available."""
    initial_loss_scale: float = 2.0**16
    """Initial loss scale for float16; a power of two."""
    max_skipped_steps: int | None = 20
    """Number of consecutive steps that may be skipped, because a gradient is infinite or NaN, before `optimizer.step()`
    raises SkippedStepsError. Skips by which float16 finds its loss scale do not count. None: no limit."""
    service: str | None = None
    """Address of a memory service, such as "unix:/run/user/1000/gemini.sock", which grants host memory and disk and
    shares frozen weights among jobs (docs/service.md). None: no service."""
    job: str | None = None
    """Name of this job in the service: the same for all its ranks, different for each job, printable ASCII without
    spaces. None: the program's name and the process id. Not used without a service."""
    snapshots: bool = False
    """Whether the service keeps every step of `engine.commit()`, so that a job of the same name can continue after this
    one was killed; needs `service` and `job`. See docs/commits.md."""
    priority: int = 0
    """Priority among jobs that wait for the service, from -100 to 100; higher goes first."""
    seed: int = 0
    """Seed for parameters that the engine itself initialises (models built on the meta device)."""

    def __post_init__(self) -> None:
        if self.dtype not in WORKING_DTYPES:
            names = ", ".join(str(dtype) for dtype in WORKING_DTYPES)
            raise ConfigError(f"GeminiConfig.dtype: expected one of {names}, got {self.dtype!r}")
        for name in ("device_budget", "host_budget", "activation_reserve", "checkpoint_reserve"):
            self._nbytes(name)
        if self.nvme is not None and not isinstance(self.nvme, NVMeConfig):
            raise ConfigError(f"GeminiConfig.nvme: expected an NVMeConfig or None, got {self.nvme!r}")
        if self.placement != "auto" and not isinstance(self.placement, (StaticPlacement, PlacementPlan)):
            raise ConfigError(
                f'GeminiConfig.placement: expected "auto", a StaticPlacement or a PlacementPlan, got {self.placement!r}'
            )
        if self.overlap not in OVERLAPS:
            raise ConfigError(f"GeminiConfig.overlap: expected one of {', '.join(OVERLAPS)}, got {self.overlap!r}")
        if self.exchange not in EXCHANGES:
            raise ConfigError(f"GeminiConfig.exchange: expected one of {', '.join(EXCHANGES)}, got {self.exchange!r}")
        _check_bool("GeminiConfig.gradient_accumulation", self.gradient_accumulation)
        _check_bool("GeminiConfig.cast_forward_inputs", self.cast_forward_inputs)
        _check_bool("GeminiConfig.share_frozen", self.share_frozen)
        _check_int("GeminiConfig.seed", self.seed, 0, 2**32 - 1)
        _check_int("GeminiConfig.priority", self.priority, -100, 100)
        if self.max_skipped_steps is not None:
            _check_int("GeminiConfig.max_skipped_steps", self.max_skipped_steps, 1, 1 << 40)
        for name in ("service", "job"):
            _check_word(f"GeminiConfig.{name}", getattr(self, name))
        _check_bool("GeminiConfig.snapshots", self.snapshots)
        if self.snapshots and (self.service is None or self.job is None):
            raise ConfigError(
                "GeminiConfig.snapshots: expected service= too, whose memory outlives this process, and job=, "
                "with which the next process finds it"
            )
        _check_int("GeminiConfig.num_batch_slices", self.num_batch_slices, 1, 1 << 16)
        _check_names("GeminiConfig.batch_arguments", self.batch_arguments)
        _check_names("GeminiConfig.shared_arguments", self.shared_arguments)
        if both := set(self.batch_arguments) & set(self.shared_arguments):
            raise ConfigError(
                "GeminiConfig.shared_arguments: expected none of GeminiConfig.batch_arguments, got "
                + ", ".join(sorted(both))
            )
        _check_int("GeminiConfig.prefetch_depth", self.prefetch_depth, 0, 64)
        _check_int("GeminiConfig.min_unit_nbytes", self.min_unit_nbytes, 0, 1 << 40)
        _check_int("GeminiConfig.ring_depth", self.ring_depth, 2, 64)
        _check_int("GeminiConfig.tile_numel", self.tile_numel, 4096, 1 << 28)
        if self.tile_numel % 4096:
            raise ConfigError(f"GeminiConfig.tile_numel: expected a multiple of 4096, got {self.tile_numel}")
        if self.num_threads is not None:
            _check_int("GeminiConfig.num_threads", self.num_threads, 1, 1024)
        if self.isa not in ("auto", "scalar", "avx2", "avx512", "neon"):
            raise ConfigError(
                'GeminiConfig.isa: expected "auto", "scalar", "avx2", "avx512" or "neon", got ' + repr(self.isa)
            )
        if self.cpu_allocator not in ("auto", "pool", "system"):
            raise ConfigError(
                f'GeminiConfig.cpu_allocator: expected "auto", "pool" or "system", got {self.cpu_allocator!r}'
            )
        if not _is_power_of_two(self.initial_loss_scale):
            raise ConfigError(
                f"GeminiConfig.initial_loss_scale: expected a power of two, got {self.initial_loss_scale!r}"
            )

    @property
    def device_budget_nbytes(self) -> int | None:
        """The device budget in bytes; None if none was given."""
        return self._nbytes("device_budget")

    @property
    def host_budget_nbytes(self) -> int | None:
        """The host budget in bytes; None if none was given."""
        return self._nbytes("host_budget")

    @property
    def activation_reserve_nbytes(self) -> int | None:
        """The activation reserve in bytes; None if none was given."""
        return self._nbytes("activation_reserve")

    @property
    def nvme_budget_nbytes(self) -> int | None:
        """The disk budget in bytes; None if there is no disk tier."""
        return None if self.nvme is None else self.nvme.budget_nbytes

    def activation_reserve_of(self, device_nbytes: int) -> int:
        """Return the bytes of a device budget that are kept free for activations."""
        given = self._nbytes("activation_reserve")
        return int(device_nbytes * DEFAULT_ACTIVATION_RESERVE) if given is None else given

    def checkpoint_reserve_of(self, host_nbytes: int) -> int:
        """Return the bytes of a host budget that are kept free for activation checkpoints of sliced blocks."""
        if self.num_batch_slices == 1:
            return 0
        given = self._nbytes("checkpoint_reserve")
        return int(host_nbytes * DEFAULT_CHECKPOINT_RESERVE) if given is None else given

    def _nbytes(self, name: str) -> int | None:
        value = getattr(self, name)
        return None if value is None else parse_nbytes(value, name=f"GeminiConfig.{name}")

    @property
    def input_dtype(self) -> torch.dtype | None:
        """Dtype to which what the model is called with is cast; None: it is not."""
        return self.dtype if self.cast_forward_inputs else None

    @classmethod
    def from_deepspeed(
        cls,
        deepspeed: Mapping[str, Any],
        *,
        device_budget: str | int | None = None,
        host_budget: str | int | None = None,
        nvme_budget: str | int | None = None,
    ) -> GeminiConfig:
        """Translate a DeepSpeed configuration of ZeRO-Offload or ZeRO-Infinity.

        `HybridAdam.from_deepspeed` reads the optimizer and the clipping.

        Args:
            deepspeed: the content of its JSON file.
            device_budget: as the field; DeepSpeed has no budgets.
            host_budget: as the field.
            nvme_budget: NVMeConfig's budget; None: nine tenths of the free space on the disk. Not used if nothing is
                offloaded to "nvme".

        Returns:
            The configuration. Settings of DeepSpeed's buffers are ignored, with a warning that names them.

        Raises:
            ConfigError: a key is not supported or unknown; the message says what to do.
        """
        arguments, disk = engine_arguments(deepspeed), disk_arguments(deepspeed, nvme_budget)
        return cls(
            **arguments,
            device_budget=device_budget,
            host_budget=host_budget,
            nvme=None if disk is None else NVMeConfig(**disk),
        )


def parse_endurance(endurance: str | int) -> int:
    """Turn bytes, or TBW and PBW (terabytes and petabytes written), into bytes.

    Args:
        endurance: as `NVMeConfig.endurance`.

    Returns:
        The number of bytes.

    Raises:
        ConfigError: it cannot be read.
    """
    if isinstance(endurance, str):
        endurance = _BYTES_WRITTEN_PATTERN.sub(r"\1", endurance)
    return parse_nbytes(endurance, name="NVMeConfig.endurance")


def _is_power_of_two(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.frexp(value)[0] == 0.5  # type: ignore[arg-type]


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected True or False, got {value!r}")


def _check_names(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"{name}: expected a tuple of names, got {value!r}")


def _check_word(name: str, value: object) -> None:
    if value is None or (isinstance(value, str) and _WORD_PATTERN.fullmatch(value)):
        return
    raise ConfigError(f"{name}: expected up to 128 printable ASCII characters without spaces, or None, got {value!r}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}: expected an int from {low} to {high}, got {value!r}")
