"""First values for what a model has on the meta device.

[Note: One parameter at a time]
A transformers model initialises a parameter in the module that owns it, in a parent (`T5Model` fills `shared`), or in
both, the parent last. So for each parameter the modules around it are initialised from the inside out, with a random
state of their own, while all other parameters are meta tensors: writing to those has no effect, draws no random
numbers and takes no memory. The values depend on the seed and on names alone, not on layout, placement or order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch

from gemini.errors import ModelError
from gemini.model.flat_values import FlatValues
from gemini.model.names import named_modules, named_params
from gemini.model.tensor_parallel import is_dtensor, local_part, placeholder_like, split_of

__all__ = ["InitFn", "Initialiser", "WeightSource", "find_init_fn", "place_buffers"]

InitFn = Callable[[torch.nn.Module], None]
"""Gives a module's parameters and buffers their first values."""


class WeightSource(Protocol):
    """First values that come from elsewhere, such as from a checkpoint."""

    def values_of(self, name: str) -> FlatValues | None:
        """Return a parameter's values by its canonical name; of a DTensor the whole one's. None: it has none."""

    def buffer_of(self, name: str) -> torch.Tensor | None:
        """Return a buffer's value, in its shape, on the CPU; None: it has none."""

    def identity_of(self, name: str) -> str | None:
        """Return words that identify a parameter's values in any process; None if there are none."""


REMEDY = (
    "was built on the meta device and the model's initialisation does not fill it: give it real values before "
    "wrapping the model, or pass GeminiDDP(..., init_fn=...) that fills it"
)


def find_init_fn(model: torch.nn.Module) -> InitFn:
    """Return a model's way to initialise a module.

    Args:
        model: may be on the meta device.

    Returns:
        `_init_weights` of the nearest transformers model around the module, else its own `reset_parameters`; of a layer
        with LoRA adapters peft's way.
    """
    init_of: dict[int, InitFn] = {}
    for module in model.modules():
        init_weights = getattr(module, "_init_weights", None)
        if callable(init_weights):
            init_of.update((id(child), init_weights) for child in module.modules())
    configs = getattr(model, "peft_config", {})
    for module in model.modules():
        if callable(getattr(module, "reset_lora_parameters", None)):  # knows better than `_init_weights` does
            init_of[id(module)] = partial(_reset_adapters, configs=configs)
    return lambda module: init_of.get(id(module), _reset_parameters)(module)


def _reset_adapters(module: torch.nn.Module, configs: Mapping[str, Any]) -> None:
    """Initialise a layer's LoRA adapters in the way their configuration says."""
    layer: Any = module
    for adapter in {**layer.lora_A, **layer.lora_embedding_A}:
        way = getattr(configs.get(adapter), "init_lora_weights", True)
        if way not in (True, False, "gaussian"):
            raise ModelError(
                f"LoRA adapter {adapter}: init_lora_weights={way!r} needs the base model's weights, which are on the "
                'meta device: choose True or "gaussian", or load the base model before adding adapters'
            )
        layer.reset_lora_parameters(adapter, way)


def _reset_parameters(module: torch.nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


class Initialiser:
    """Hands out first values; inside its with-block every parameter of the model is a meta tensor.

    On a clean exit the model's parameters are those of `params`; after an exception they are what they were.

    Args:
        model: the user's model, some, all or none of it on the meta device.
        init_fn: how a module is initialised.
        weights: values that go before the model's own and those of `init_fn`; None: there are none.
        device: where stand-ins for meta parameters are.
        dtypes: dtype that each parameter will have, by canonical name.
        seed: decides all random values.

    Attributes:
        params: by canonical name the parameter that the model will have: the user's own, or a stand-in on `device`,
            without values, for one that was on the meta device or is a DTensor, whose dtype is fixed, of another
            dtype. Ties and flags are kept.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        init_fn: InitFn,
        *,
        weights: WeightSource | None,
        device: torch.device,
        dtypes: Mapping[str, torch.dtype],
        seed: int,
    ) -> None:
        self.params: dict[str, torch.nn.Parameter] = {}
        self._model = model
        self._init_fn = init_fn
        self._weights = weights
        self._device = device
        self._seed = seed
        self._modules = dict(named_modules(model))
        self._places = [
            (module, key, param)
            for module in self._modules.values()
            for key, param in module._parameters.items()
            if param is not None
        ]
        self._originals = dict(named_params(model))
        self._final: dict[int, torch.nn.Parameter] = {}
        for name, param in self._originals.items():
            self.params[name] = self._final[id(param)] = _final_param(param, device, dtypes[name])

    def __enter__(self) -> Initialiser:
        shown = {id(param): _meta_twin(param) for param in self._originals.values()}
        for module, key, param in self._places:
            module._parameters[key] = shown[id(param)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for module, key, param in self._places:
            module._parameters[key] = param if error is not None else self._final[id(param)]

    def values_of(self, name: str) -> FlatValues:
        """Return a parameter's first values.

        Args:
            name: its canonical name.

        Returns:
            Those from the source of weights if it has them, else as `value_of`. Of a DTensor this rank's part.

        Raises:
            ModelError: the model's initialisation leaves it, in part or in whole, without a value.
        """
        found = None if self._weights is None else self._weights.values_of(name)
        if found is None:
            return self.value_of(name).reshape(-1)
        original = self._originals[name]
        split = split_of(name, original)
        if split is None:
            return found
        return split.cut(found[0 : original.numel()].view(original.shape)).reshape(-1)

    def value_of(self, name: str) -> torch.Tensor:
        """Return the initial value of a parameter.

        Args:
            name: its canonical name.

        Returns:
            Its own value on the CPU if it was real; else a new one, float32 if floating-point. Of a DTensor the part
            that is this rank's.

        Raises:
            ModelError: the model's initialisation leaves it, in part or in whole, without a value.
        """
        original = self._originals[name]
        if not original.is_meta:
            return local_part(original).detach().to("cpu")
        dtype = torch.float32 if original.is_floating_point() else original.dtype
        blank = torch.full(original.shape, _unlikely_value(dtype), dtype=dtype)
        real = torch.nn.Parameter(blank, requires_grad=original.requires_grad)
        owner_name, _, key = name.rpartition(".")
        owner = self._modules[owner_name]
        hidden, owner._parameters[key] = owner._parameters[key], real
        try:
            for module_name in _from_inside_out(owner_name):
                self._run(module_name, salt=name)
        finally:
            owner._parameters[key] = hidden
        if real.is_floating_point() and real.numel() and bool(real.min().isnan()):  # NaN if any is; no mask in memory
            raise ModelError(f"parameter {name} {REMEDY}")
        split = split_of(name, original)
        return real.detach() if split is None else split.cut(real.detach())

    def fill_buffers(self) -> None:
        """Allocate buffers of the meta device, have their modules fill them, then fill those with a source.

        Raises:
            ModelError: a buffer's module does not fill it, so its values are lost.
        """
        made: dict[torch.Tensor, torch.Tensor] = {}  # of buffers on the meta device, which several modules may have
        for module_name, module in self._modules.items():
            absent = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
            blanks = [name for name, buffer in absent.items() if buffer not in made]
            for name, blank in absent.items():
                if blank not in made:
                    made[blank] = torch.full_like(blank, _unlikely_value(blank.dtype), device=self._device)
                module._buffers[name] = made[blank]
            if blanks:
                self._run(module_name, salt="")
            for name, buffer in module._buffers.items():
                source = None if self._weights is None else self._weights.buffer_of(f"{module_name}.{name}".strip("."))
                if buffer is not None and source is not None:
                    buffer.copy_(source)
            for name in blanks:
                filled = module._buffers.get(name)
                if filled is not None and filled.numel() and _holds_unlikely_value(filled):
                    raise ModelError(f"buffer {f'{module_name}.{name}'.strip('.')} {REMEDY}")

    def _run(self, module_name: str, *, salt: str) -> None:
        """Initialise a module with a random state that depends on the seed and names alone."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(zlib.crc32(f"{module_name}:{salt}".encode()) ^ self._seed)
            self._init_fn(self._modules[module_name])


def place_buffers(model: torch.nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
    """Move and cast a model's buffers; one that several modules share stays shared.

    Args:
        model: all of whose buffers have values; those that have another device or dtype are replaced.
        device: where forward and backward run.
        dtypes: of each buffer, by its first name.
    """
    placed = {id(buffer): buffer.to(device, dtypes[name]) for name, buffer in model.named_buffers()}
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = placed[id(buffer)]


def _final_param(param: torch.nn.Parameter, device: torch.device, dtype: torch.dtype) -> torch.nn.Parameter:
    if not param.is_meta and not (is_dtensor(param) and param.dtype != dtype):
        return param
    missing = placeholder_like(param, torch.zeros((), dtype=dtype, device=device))
    return torch.nn.Parameter(missing, requires_grad=param.requires_grad)


def _meta_twin(param: torch.nn.Parameter) -> torch.nn.Parameter:
    twin = torch.empty(param.shape, dtype=param.dtype, device="meta")
    return torch.nn.Parameter(twin, requires_grad=param.requires_grad)


def _from_inside_out(module_name: str) -> list[str]:
    """Return a module's name and those of the modules around it, the model's own, "", last."""
    parts = module_name.split(".") if module_name else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _holds_unlikely_value(tensor: torch.Tensor) -> bool:
    value = _unlikely_value(tensor.dtype)
    return bool((tensor.isnan() if value != value else tensor == value).all())


def _unlikely_value(dtype: torch.dtype) -> float:
    """Return a value that no initialisation leaves in place: NaN, or the least integer."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype is torch.bool else torch.iinfo(dtype).min
