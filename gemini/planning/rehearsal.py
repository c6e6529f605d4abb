"""Forward and backward without memory or work, to find what a step's activations take and what it computes.

A model runs on fake tensors, which have shapes and storages but no bytes. The engine's own hooks and slices are
attached, so that gradients leave autograd where they do in training. Must not know how the figures are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from gemini.autograd.engine_access import EngineAccess
from gemini.autograd.events import Moments
from gemini.autograd.functions import FunctionKind, kind_of
from gemini.autograd.gradient_sink import GradientPlace
from gemini.autograd.module_hooks import HookSet
from gemini.chunk.layout import ChunkLayout
from gemini.config import GeminiConfig
from gemini.errors import ModelError
from gemini.model.names import named_params
from gemini.model.outputs import tensors_in
from gemini.model.working_dtypes import choose_dtypes
from gemini.placement.cost_model import StepFlops
from gemini.runtime.memory_probe import StorageCounter
from gemini.slicing.slicer import BatchSlicer
from gemini.tiers import size_class

__all__ = ["LossFn", "Rehearsal", "rehearse"]

aten = torch.ops.aten

LossFn = Callable[[torch.nn.Module], torch.Tensor]
"""Function that makes a batch on the CPU, gives it to the model, and returns the tensor that backward starts from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Memory and compute that one forward and backward need."""

    peak_nbytes: int
    """Peak bytes of activations, temporaries and gradients that autograd holds."""
    checkpoint_nbytes: int
    """Bytes that wait in host memory for sliced blocks' backward; 0 without a device or without slices."""
    work: StepFlops


def rehearse(
    model: torch.nn.Module, loss_fn: LossFn, config: GeminiConfig, layout: ChunkLayout, *, has_device: bool
) -> Rehearsal:
    """Run a model's forward and backward on fake tensors.

    Where a computation depends on values, an answer is assumed: every row of an embedding in a batch is a different
    one, and no condition on values (a label out of range) holds.

    Args:
        model: a model on any device; its own parameters and hooks are restored afterwards.
        loss_fn: runs the model.
        config: dtype, slices and gradient accumulation.
        layout: the layout of this model with this dtype.
        has_device: whether compute memory is a separate tier, from which gradients are copied.

    Returns:
        Bytes and operations.

    Raises:
        ModelError: the model's forward needs values, which fake tensors do not have.
    """
    fakes = FakeTensorMode()
    with _on_fakes(model, fakes, layout, config) as params:
        events = _Events(params, fakes, config, is_written_in_place=not has_device)
        units = {unit.unit_id: unit.module_name for unit in layout.units if unit.module_name}
        hooks = HookSet(events, config.input_dtype)
        hooks.install(model, {i: model.get_submodule(name) for i, name in units.items()}, params)
        checkpoints = _Checkpoints()
        with ExitStack() as stack:
            stack.callback(hooks.remove)
            stack.enter_context(_SharedUseMode(hooks))
            if config.num_batch_slices > 1:
                slicer = BatchSlicer(
                    model,
                    units,
                    num_slices=config.num_batch_slices,
                    scope=hooks,
                    batch_arguments=config.batch_arguments,
                    shared_arguments=config.shared_arguments,
                    keep=checkpoints.keeping if has_device else None,
                )
                stack.callback(slicer.remove)
            return _count(model, loss_fn, fakes, checkpoints)


def _count(model: torch.nn.Module, loss_fn: LossFn, fakes: FakeTensorMode, checkpoints: _Checkpoints) -> Rehearsal:
    counter = _OperationCounter()
    try:
        with fakes, counter:
            loss = loss_fn(model)
            forward_flops, forward_nbytes = counter.flops, counter.nbytes
            loss.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError) as error:  # fake tensors raise several kinds of these errors
        raise ModelError(
            f"cannot estimate the activation memory of {type(model).__name__}: its forward depends on tensor "
            f"values ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); give its activation "
            "memory instead"
        ) from error
    return Rehearsal(
        peak_nbytes=counter.peak_nbytes,
        checkpoint_nbytes=checkpoints.nbytes,
        work=StepFlops(
            forward=forward_flops,
            backward=counter.flops - forward_flops,
            forward_nbytes=forward_nbytes,
            backward_nbytes=counter.nbytes - forward_nbytes,
        ),
    )


@contextmanager
def _on_fakes(
    model: torch.nn.Module, fakes: FakeTensorMode, layout: ChunkLayout, config: GeminiConfig
) -> Iterator[list[torch.nn.Parameter]]:
    """Exchange a model's parameters and buffers for fakes, in an engine's dtypes; yields the trained parameters."""
    dtypes = {name: layout.chunks[place.chunk_id].dtype for name, place in layout.place_by_name.items()}
    by_id = {id(param): _fake_parameter(param, fakes, dtypes[name]) for name, param in named_params(model)}
    of_buffers = choose_dtypes(model, config.dtype).buffers
    buffer_dtypes = {id(buffer): of_buffers[name] for name, buffer in model.named_buffers()}
    modules = list(model.modules())
    originals = [(dict(module._parameters), dict(module._buffers)) for module in modules]
    try:
        for module in modules:
            for name, param in module._parameters.items():
                module._parameters[name] = None if param is None else by_id[id(param)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else _fake(buffer, fakes, buffer_dtypes[id(buffer)])
        yield [param for param in by_id.values() if param.requires_grad]
    finally:
        for module, (params, buffers) in zip(modules, originals, strict=True):
            module._parameters.update(params)
            module._buffers.update(buffers)


def _fake(tensor: torch.Tensor, fakes: FakeTensorMode, dtype: torch.dtype) -> torch.Tensor:
    with fakes:
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")


def _fake_parameter(param: torch.nn.Parameter, fakes: FakeTensorMode, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(_fake(param, fakes, dtype), requires_grad=param.requires_grad)


class _Events:
    """Receives the hooks' events, of which only gradients matter here; see gemini.autograd.events.RuntimeEvents.

    Args:
        params: the trained parameters.
        fakes: makes memory for gradients.
        config: the configuration, which gives the dtype of waiting gradients.
        is_written_in_place: whether uses of a parameter may write directly into its waiting gradient.
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        fakes: FakeTensorMode,
        config: GeminiConfig,
        *,
        is_written_in_place: bool,
    ) -> None:
        self.access = EngineAccess()
        self.moments = Moments()
        self._accumulates = config.gradient_accumulation
        self._waiting: Mapping[int, torch.Tensor] = {}
        if is_written_in_place:
            dtypes = [torch.float32 if config.gradient_accumulation else param.dtype for param in params]
            self._waiting = {id(p): _fake(p, fakes, dtype) for p, dtype in zip(params, dtypes, strict=True)}

    def begin_forward(self, batch_numel: int) -> None:
        pass

    def end_forward(self) -> None:
        pass

    def abort_forward(self) -> None:
        pass

    def enter_unit(self, unit_id: int) -> None:
        pass

    def exit_unit(self, unit_id: int) -> None:
        pass

    def enter_backward(self, unit_id: int, *, reads_weights: bool) -> None:
        pass

    def num_updates_of(self, unit_id: int) -> int:
        return 0

    def take_gradient(self, param: torch.nn.Parameter) -> None:
        gradient, param.grad = param.grad, None
        assert gradient is not None
        self.put_gradient(param, gradient)

    def finish_gradient(self, param: torch.nn.Parameter) -> None:
        pass

    def expect_gradient(self, param: torch.nn.Parameter) -> None:
        pass

    def takes_gradients_apart(self, param: torch.nn.Parameter, num_uses: int) -> bool:
        return num_uses <= 1 or self._accumulates or param.dtype is torch.float32

    def put_gradient(self, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        if not self._waiting:
            gradient.reshape(-1)  # as on its way into a slot; a copy if it is transposed

    def write_gradient(self, param: torch.nn.Parameter) -> AbstractContextManager[GradientPlace] | None:
        if id(param) not in self._waiting:
            return None
        return nullcontext(GradientPlace(self._waiting[id(param)], is_empty=False))

    def is_borrowed(self, tensor: torch.Tensor) -> bool:
        return False

    def wrap_outputs(self, output: Any) -> Any:
        return output


class _SharedUseMode(TorchFunctionMode):
    """Calls functions that are given parameters as an engine does."""

    def __init__(self, hooks: HookSet) -> None:
        super().__init__()
        self._hooks = hooks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        params = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.nn.Parameter)]
        is_use = bool(params) and self._hooks.is_running and kind_of(func) is FunctionKind.VALUES
        return self._hooks.gradients.uses.call(func, args, kwargs, params) if is_use else func(*args, **kwargs)


class _Checkpoints:
    """Batches of sliced blocks, which wait in host memory until backward."""

    def __init__(self) -> None:
        self.nbytes = 0
        """Bytes of all blocks, which all wait at the end of forward."""

    @contextmanager
    def keeping(self, batch: torch.Tensor) -> Iterator[None]:
        """Count what autograd would keep of a batch, and keep only its shape."""
        key = batch.untyped_storage()._cdata

        def pack(tensor: torch.Tensor) -> object:
            if tensor.untyped_storage()._cdata != key:
                return tensor
            self.nbytes += size_class(tensor.nbytes)
            return tensor.shape, tensor.dtype, tensor.device

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            shape, dtype, device = packed
            return torch.empty(shape, dtype=dtype, device=device)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


class _OperationCounter(StorageCounter):  # type: ignore[no-untyped-call]
    """Counts operations of matrix products, bytes of all other operations, and storages."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.nbytes = 0
        """Bytes read and written by everything except matrix products and views."""
        self._formulas = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket in _ASSUMED:
            output = _ASSUMED[func._overloadpacket](*args, **kwargs)
        else:
            output = super().__torch_dispatch__(func, types, args, kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        elif not (func.is_view or func.namespace == "prim" or func._overloadpacket in _WITHOUT_TRAFFIC):
            self.nbytes += _traffic_nbytes(args, kwargs, output)
        return output


def _traffic_nbytes(args: Any, kwargs: Any, output: Any) -> int:
    """Return the bytes of an operation's tensors; tensors changed in place are read and written."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors_in((args, kwargs, output)))


def _flash_forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    count: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return count


def _flash_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 5 * _flash_forward(query, key, value) // 2  # scores again, and two products for each of the two of forward


_flash_forward._get_raw = True  # type: ignore[attr-defined]
_flash_backward._get_raw = True  # type: ignore[attr-defined]
_ATTENTION_FLOPS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}
"""The processor's fused attention, which torch's counter does not know."""

_WITHOUT_TRAFFIC = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten._unsafe_view}


def _unique(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = torch.empty(0, dtype=torch.int64, device=tensor.device)
    return torch.empty_like(tensor).view(-1), torch.empty_like(tensor, dtype=torch.int64), count


def _truth(tensor: torch.Tensor) -> bool:
    if tensor.dtype is not torch.bool:
        raise NotImplementedError(f"a value of a {tensor.dtype} tensor is needed")
    return False


_ASSUMED: dict[Any, Callable[..., Any]] = {aten._unique2: _unique, aten._local_scalar_dense: _truth}
"""Operations whose outputs depend on values, with the assumed answer: the largest output, and no for a condition."""
