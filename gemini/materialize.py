"""Bring a model's weights into their homes, unit by unit, tile by tile.

Weights come from the model as the user built it, or, for one built on the meta device, from its own initialisation,
run for one unit at a time. Either way the float32 value a parameter had becomes its master, exactly.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from gemini.chunk.layout import ChunkSpec
from gemini.errors import ModelError
from gemini.kernels.cpu import Isa, cast, split_master
from gemini.offload.home import TiledHome
from gemini.offload.io import empty_aligned
from gemini.offload.transfer import Transfers
from gemini.tiers import MemoryTier
from gemini.update import record_views

__all__ = [
    "InitFn",
    "allocate_parameter",
    "check_initialised",
    "find_init_fn",
    "initialise_buffers",
    "initialise_module",
    "replace_meta_parameters",
    "write_home",
]

InitFn = Callable[[torch.nn.Module], None]
"""Gives a module's own parameters and buffers their first values."""


def find_init_fn(model: torch.nn.Module) -> InitFn:
    """Return a model's way to initialise a module.

    Args:
        model: may be on the meta device.

    Returns:
        `_init_weights` of the nearest transformers model around the module, else its own `reset_parameters`.
    """
    init_of: dict[int, InitFn] = {}
    for module in model.modules():
        init_weights = getattr(module, "_init_weights", None)
        if callable(init_weights):
            init_of.update((id(child), init_weights) for child in module.modules())
    return lambda module: init_of.get(id(module), _reset_parameters)(module)


def _reset_parameters(module: torch.nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is None and any(param is not None for param in module._parameters.values()):
        reset = getattr(module, "_reset_parameters", None)  # nn.MultiheadAttention's
    if callable(reset):
        reset()


def replace_meta_parameters(model: torch.nn.Module, *, device: torch.device, dtype: torch.dtype) -> dict[int, int]:
    """Give every parameter on the meta device a stand-in on `device`, keeping ties, flags and hooks' owners.

    Args:
        model: changed in place.
        device: compute device.
        dtype: working dtype of floating-point parameters.

    Returns:
        The id of each stand-in and of the first module that holds it, which is the one to initialise it.
    """
    stand_ins: dict[int, torch.nn.Parameter] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or not param.is_meta:
                continue
            if id(param) not in stand_ins:
                kind = dtype if param.dtype.is_floating_point else param.dtype
                missing = torch.zeros((), dtype=kind, device=device).expand(param.shape)
                stand_ins[id(param)] = torch.nn.Parameter(missing, requires_grad=param.requires_grad)
                owners[id(stand_ins[id(param)])] = id(module)
            module._parameters[name] = stand_ins[id(param)]
    return owners


def initialise_module(
    name: str, module: torch.nn.Module, init_fn: InitFn, *, seed: int, owners: Mapping[int, int]
) -> None:
    """Run a module's initialisation with a random state that depends on the seed and the module's name alone.

    So the weights depend neither on the layout nor on the order in which units are built.

    Args:
        name: fully qualified name.
        module: the module; modules below it may be initialised with it.
        init_fn: how it is done.
        seed: the configuration's.
        owners: ids of the parameters to initialise now, and of the module that each is taken from; they are real.
    """
    with _hide_parameters(module, owners), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(zlib.crc32(name.encode()) ^ seed)
        init_fn(module)


@contextmanager
def _hide_parameters(module: torch.nn.Module, owners: Mapping[int, int]) -> Iterator[None]:
    """Show meta tensors for all parameters but some: initialising those has no effect, and costs no memory."""
    hidden = [
        (holder, key, param)
        for holder in module.modules()
        for key, param in holder._parameters.items()
        if param is not None and owners.get(id(param)) != id(holder)
    ]
    for holder, key, param in hidden:
        shown = torch.empty(param.shape, dtype=param.dtype, device="meta")
        holder._parameters[key] = torch.nn.Parameter(shown, requires_grad=param.requires_grad)
    try:
        yield
    finally:
        for holder, key, param in hidden:
            holder._parameters[key] = param


def initialise_buffers(model: torch.nn.Module, init_fn: InitFn, *, device: torch.device, seed: int) -> None:
    """Make buffers on the meta device real and let their modules fill them.

    Args:
        model: changed in place.
        init_fn: fills a module's buffers.
        device: compute device.
        seed: the configuration's.

    Raises:
        ModelError: a buffer's module does not fill it, so its values are lost.
    """
    for module_name, module in model.named_modules():
        fresh = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in fresh:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.full_like(buffer, _unlikely_value(buffer.dtype), device=device)
        if fresh:
            initialise_module(module_name, module, init_fn, seed=seed, owners={})
        for name in fresh:
            filled = module._buffers[name]
            if filled is not None and filled.numel() and _holds_unlikely_value(filled):
                raise ModelError(
                    f"buffer {module_name}.{name} was built on the meta device and the model's initialisation does not "
                    "fill it: give it real values before wrapping the model, or pass GeminiDDP(..., init_fn=...) that "
                    "fills it"
                )


def allocate_parameter(param: torch.nn.Parameter) -> None:
    """Give a stand-in memory, float32 if floating-point, for `initialise_module` to fill."""
    dtype = torch.float32 if param.is_floating_point() else param.dtype
    param.data = torch.full(param.shape, _unlikely_value(dtype), dtype=dtype)


def check_initialised(name: str, param: torch.nn.Parameter) -> None:
    """Refuse a parameter that initialisation has left as `allocate_parameter` made it, in part or in whole.

    Args:
        name: fully qualified name.
        param: real.

    Raises:
        ModelError: it has no values.
    """
    if param.is_floating_point() and bool(param.isnan().any()):
        raise ModelError(
            f"parameter {name} was built on the meta device and the model's initialisation does not fill it: give its "
            "module a reset_parameters(), give it real values before wrapping the model, or pass "
            "GeminiDDP(..., init_fn=...) that fills it"
        )


def _holds_unlikely_value(tensor: torch.Tensor) -> bool:
    value = _unlikely_value(tensor.dtype)
    return bool((tensor.isnan() if value != value else tensor == value).all())


def _unlikely_value(dtype: torch.dtype) -> float:
    """Return a value that no initialisation leaves in place: NaN, or the least integer."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype is torch.bool else torch.iinfo(dtype).min


def write_home(
    spec: ChunkSpec,
    sources: list[torch.Tensor],
    working: TiledHome,
    state: TiledHome | None,
    *,
    tile_numel: int,
    transfers: Transfers,
    isa: Isa,
) -> None:
    """Write a chunk's first weights, and zero moments, to their homes.

    Args:
        spec: the chunk.
        sources: the parameters' values on the CPU, in the order of the layout's slots; read only.
        working: home of the working weights.
        state: home of the optimizer state; None for frozen chunks.
        tile_numel: elements in a tile.
        transfers: reaches homes on the device.
        isa: instruction set of the kernels.
    """
    for tile in range(len(working.tiers)):
        begin = tile * tile_numel
        length = min(tile_numel, spec.numel - begin)
        weights = empty_aligned(working.tile_nbytes[tile], torch.uint8).zero_()
        typed = weights[: length * spec.dtype.itemsize].view(spec.dtype)
        if state is None:
            for part, into in _overlaps(spec, sources, begin, length):
                typed[into].copy_(part)
        else:
            record = empty_aligned(state.tile_nbytes[tile], torch.uint8).zero_()
            master = torch.zeros(length, dtype=torch.float32)
            for part, into in _overlaps(spec, sources, begin, length):
                master[into].copy_(part)
            residual, _, _ = record_views(record, length, spec.dtype)
            if residual is None:
                typed.copy_(master)
            elif residual.dtype is torch.int16:
                split_master(typed, residual, master, isa=isa)
            else:
                residual.copy_(master)
                cast(typed, master, isa=isa)
            _put_tile(state, tile, record, transfers)
        _put_tile(working, tile, weights, transfers)


def _overlaps(
    spec: ChunkSpec, sources: list[torch.Tensor], begin: int, length: int
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Yield the part of each parameter inside a tile, flat, and where in the tile it goes."""
    for slot, source in zip(spec.slots, sources, strict=True):
        low, high = max(slot.begin, begin), min(slot.end, begin + length)
        if low < high:
            flat = source.detach().reshape(-1)
            yield flat[low - slot.begin : high - slot.begin], slice(low - begin, high - begin)


def _put_tile(home: TiledHome, tile: int, content: torch.Tensor, transfers: Transfers) -> None:
    tier = home.tiers[tile]
    if tier is MemoryTier.NVME:
        home.write_tile(tile, content).wait()
        home.finish_writes()
    elif tier is MemoryTier.HOST:
        home.tile(tile).copy_(content)
    else:
        transfers.upload(home.tile(tile), content).wait_on_host()
