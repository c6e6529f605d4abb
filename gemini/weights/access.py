"""The values of an engine's parameters, for any code that reads or writes them; see [Note: Managed parameters].

A weight whose chunk is in compute memory, or can be brought there without displacing anything, is shown in its chunk.
Otherwise, and where a view of it must not be overwritten later, it is shown on separate memory, a copy that lives as
long as the function that uses it.

[Note: Writes]
What is written in place must reach the home, and the master there. Values and master are the same in float32. In half
precision the master of an element follows only if the element's bits have changed, so that elements without a write
keep the precision that the half-precision weight does not show. So a function that may write is given the weight, and
the old values are kept until it returns. Writes that no function announced (compiled code, kernels that were given an
address) are noticed by version counters when the weight leaves its memory, and compared with the home instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gemini.autograd.managed_parameter import WEIGHT_ATTRIBUTE, WaitingGradient, make_placeholder, refuse, weight_of
from gemini.autograd.weight_functions import run_function
from gemini.chunk.chunk import Chunk
from gemini.chunk.layout import ParamPlace
from gemini.errors import ModelError, OutOfTierMemoryError
from gemini.model.tensor_parallel import local_part
from gemini.runtime.runtime import Runtime
from gemini.weights.values import (
    drop_commit,
    loading,
    read_gradient,
    read_own_working,
    same_bits,
    store_master,
    store_written,
)

__all__ = ["ParamWeight", "WeightAccess"]

SharedCall = Callable[[Callable[..., Any], Any, Any, Sequence[torch.Tensor]], Any]
"""Function that calls another one with parameters, so that gradients of shared ones may be delivered use by use."""


@dataclass(slots=True, eq=False)
class _Open:
    """A weight in use by a function; see OpenWeight."""

    weight: ParamWeight
    values: torch.Tensor
    is_lasting: bool
    is_copy: bool
    loans: ExitStack
    old: torch.Tensor | None = None
    """Values before the function, if it may write."""

    def become_copy(self) -> None:
        if not self.is_copy:
            with torch.inference_mode(False), torch.no_grad():
                self.show_copy(self.values.clone())

    def show_copy(self, values: torch.Tensor) -> None:
        """Make the parameter show values in separate memory until the weight is closed."""
        weight, chunk = self.weight, self.weight.chunk
        self.values, self.is_copy = values, True
        self.loans.enter_context(weight.access.runtime.passes.saved.loan(values, chunk, weight.position))
        self.loans.callback(chunk.params.show, weight.position)
        chunk.params.show(weight.position, values)


class ParamWeight:
    """One parameter of an engine; see gemini.autograd.managed_parameter.Weight.

    Args:
        access: the engine's access to weights.
        param: the parameter.
        chunk: the chunk that holds its values.
        place: its place in the chunk.
        position: its position in the chunk's layout.
    """

    __slots__ = ("__weakref__", "_pinned", "access", "chunk", "num_bindings", "param", "place", "position")

    def __init__(
        self, access: WeightAccess, param: torch.nn.Parameter, chunk: Chunk, place: ParamPlace, position: int
    ) -> None:
        self.access = access
        self.param = param
        self.chunk = chunk
        self.place = place
        self.position = position
        self.num_bindings = 0
        self._pinned: tuple[weakref.ref[torch.Tensor], object] | None = None

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.place.spec.name

    @property
    def is_held(self) -> bool:
        """Whether the parameter shows its values now, and at least until the next function."""
        chunk = self.chunk
        return chunk.is_held or (chunk.is_resident and chunk.is_ready)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a torch function that was given the parameter, or a view of it."""
        return run_function(func, args, kwargs)

    def opened(self, *, writes: bool) -> AbstractContextManager[_Open]:
        """Make the parameter show its values while the context is open; writes reach the home at its end.

        Args:
            writes: whether the values may be written in the context.

        Returns:
            The context.

        Raises:
            ModelError: the engine is closed, its state was lost, a step waits for its commit, or a write is not
                possible here.
            OffloadIOError: the values cannot be read or written.
        """
        return self.access.opened(self, writes=writes)

    def saved_for_backward(self) -> AbstractContextManager[None]:
        """Save weights for backward as places in chunks while the context is open."""
        return self.access.saved_for_backward()

    def call_shared(self, func: Callable[..., Any], args: Any, kwargs: Any, params: Sequence[torch.Tensor]) -> Any:
        """Call a function that uses parameters, so that gradients of shared ones may be delivered use by use."""
        return self.access.call_shared(func, args, kwargs, params)

    def finish_update(self) -> None:
        """Wait until the weight is not being written."""
        self.access.runtime.updates.finish(self.chunk.spec.chunk_id)

    def count_write(self) -> None:
        """Record a write, so that graphs that have saved the parameter notice it, as with torch's version counter."""
        torch.autograd.graph.increment_version(self.param)
        self.chunk.params.remember_versions()

    def stamp(self) -> object:
        """Return an object that is unequal to a later one once the values may have changed."""
        return self.chunk.num_updates, self.chunk.num_writes

    def assign(self, values: torch.Tensor) -> None:
        """Write values as `.data = values` would.

        Args:
            values: values with the parameter's shape, dtype and device.

        Raises:
            ModelError: the shape, dtype or device is another one.
        """
        if values is self.param:
            return
        with torch._C.DisableTorchFunctionSubclass():
            own = (tuple(self.param.shape), self.param.dtype, self.param.device.type)
        given = (tuple(values.shape), values.dtype, values.device.type)
        if given != own:
            raise refuse(
                self,
                f"its .data was replaced by a tensor of (shape, dtype, device) = {given}, expected {own}",
                "change the model before wrapping it, and set device and dtype in GeminiConfig instead of calling "
                ".to(), .cuda() or .half()",
            )
        with torch.no_grad():
            self.param.data.copy_(values.clone() if weight_of(values) is self else values)
        self.num_bindings += 1
        self.count_write()  # graphs have saved the old values, which no longer exist

    def load(self, values: torch.Tensor) -> None:
        """Give the master values of a wider dtype, which have already been written to the weight."""
        if self.chunk.spec.is_trainable:
            store_master(self.access.runtime, self.place, values)

    def pinned(self) -> torch.Tensor:
        """Return an up-to-date copy of the values; the same object as long as something refers to it."""
        held = None if self._pinned is None else self._pinned[0]()
        stamp = self.stamp()
        if held is not None and self._pinned is not None and self._pinned[1] == stamp:
            return held
        with self.opened(writes=False) as opened, torch.no_grad():
            held = opened.values.clone() if held is None else held.copy_(opened.values)
        self._pinned = weakref.ref(held), self.stamp()
        return held

    def gradient(self) -> torch.Tensor | None:
        """Return the tensor that represents the waiting gradient; None if none waits."""
        with torch._C.DisableTorchFunctionSubclass():
            stray: torch.Tensor | None = self.param.grad
            if stray is not None or not self._has_gradient():
                return stray
            if not self.access.runtime.sharding.is_alone:  # reading is a collective, which a look must not be
                waiting: WaitingGradient = make_placeholder(WaitingGradient, self, self.param)
                return waiting
            values = self.read_gradient()
            assert values is not None
            gradient: WaitingGradient = values.as_subclass(WaitingGradient)
            gradient.__dict__[WEIGHT_ATTRIBUTE] = self
            return gradient

    def _has_gradient(self) -> bool:
        gradients = self.access.runtime.gradients
        if self.access.runtime.is_closed:
            return False
        is_readable = self.chunk.spec.is_trainable and not gradients.backward_pass.is_running
        return is_readable and gradients.has(self.chunk.spec.chunk_id, self.position)

    def read_gradient(self) -> torch.Tensor | None:
        """Return the waiting gradient in the parameter's dtype; None if none waits."""
        if not self._has_gradient():
            return None
        runtime = self.access.runtime
        with torch.no_grad():
            waiting = read_gradient(runtime, self.place) * runtime.coming.gradient_scale
        return waiting.to(self.place.spec.dtype).to(runtime.resources.transfers.device)

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """Add to the waiting gradient.

        Args:
            gradient: gradient with the parameter's shape and dtype.

        Raises:
            ModelError: the gradient carries a loss scale, or gradients are not kept as float32.
        """
        runtime = self.access.runtime
        if runtime.coming.scaler is not None:
            gradient = gradient * runtime.coming.scaler.scale
        runtime.gradients.add([(self.chunk.spec.chunk_id, self.position, gradient)])

    def set_gradient(self, gradient: torch.Tensor | None) -> None:
        """Replace the waiting gradient; the new one waits in `.grad`, from where the optimizer takes it.

        Args:
            gradient: gradient with the parameter's shape; None: remove the waiting one.
        """
        if isinstance(gradient, WaitingGradient):
            if weight_of(gradient) is self:  # `param.grad += other` has already added
                return
            gradient = gradient.clone()
        if self._has_gradient():
            self.access.runtime.gradients.discard(self.chunk.spec.chunk_id, self.position)
        with torch._C.DisableTorchFunctionSubclass():
            self.param.grad = gradient


class WeightAccess:
    """Shows and keeps the weights of one engine.

    Args:
        runtime: the engine's runtime.
        call_shared: as in ParamWeight.call_shared.
    """

    def __init__(self, runtime: Runtime, call_shared: SharedCall) -> None:
        self.runtime = runtime
        self.call_shared = call_shared
        self.weights = [
            ParamWeight(self, param, chunk, place, position)  # type: ignore[arg-type]
            for chunk in runtime.core.chunks
            for position, (place, param) in enumerate(zip(chunk.spec.places, chunk.params, strict=True))
        ]
        self._by_place = {(weight.chunk.spec.chunk_id, weight.position): weight for weight in self.weights}
        for chunk in runtime.core.chunks:
            chunk.params.keep_write = partial(self._keep_unseen_write, chunk)

    def saved_for_backward(self) -> AbstractContextManager[None]:
        """Save weights for backward as places in chunks while the context is open."""
        if not torch.is_grad_enabled() or self.runtime.passes.saved.is_on_top:
            return nullcontext()
        return self._saving()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        self.runtime.passes.saved.push()
        try:
            yield
        finally:
            self.runtime.passes.saved.pop()

    @contextmanager
    def opened(self, weight: ParamWeight, *, writes: bool) -> Iterator[_Open]:
        """Show a weight while the context is open; see ParamWeight.opened."""
        runtime, chunk = self.runtime, weight.chunk
        chunk_id = chunk.spec.chunk_id
        runtime.check_usable()
        runtime.access.check_thread("using a parameter")
        runtime.updates.check_released()
        if writes:
            runtime.pending_save.finish()
            runtime.updates.weights_change(chunk_id)
        else:
            runtime.updates.finish(chunk_id)
        is_lasting = chunk.is_held
        is_held = is_lasting or self._hold(chunk_id)
        try:
            with ExitStack() as loans:
                opened = self._open(weight, loans, is_held=is_held, is_lasting=is_lasting)
                if writes:
                    opened.old = opened.values.clone()
                versions = chunk.params.version_of(weight.position), opened.values._version
                try:
                    yield opened
                finally:
                    self._keep_write(opened, versions)
        finally:
            if is_held and not is_lasting:
                runtime.core.release(chunk_id)

    def _open(self, weight: ParamWeight, loans: ExitStack, *, is_held: bool, is_lasting: bool) -> _Open:
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            values = local_part(weight.param).data
            opened = _Open(weight, values, is_lasting=is_lasting, is_copy=False, loans=loans)
            if not is_held:
                values = read_own_working(self.runtime, weight.place)
                opened.show_copy(values.to(self.runtime.resources.transfers.device))
            return opened

    def _hold(self, chunk_id: int) -> bool:
        """Hold a chunk until a function returns; return whether there was room for it."""
        runtime = self.runtime
        if not runtime.core.has_room(chunk_id):
            return False
        try:
            runtime.core.access(chunk_id)
        except OutOfTierMemoryError:
            return False
        if runtime.lookahead.is_in_step:
            runtime.lookahead.record(chunk_id)
        return True

    def _keep_write(self, opened: _Open, versions: tuple[int, int]) -> None:
        """Store what a function has written in the home; `versions` are the earlier ones of parameter and values."""
        weight, values = opened.weight, opened.values
        chunk = weight.chunk
        if opened.old is None:
            if (chunk.params.version_of(weight.position), values._version) == versions:
                return
        elif same_bits(opened.old, values):
            chunk.params.remember_versions()
            return
        self._store(weight, values, opened.old)
        chunk.params.remember_versions()

    def _keep_unseen_write(self, chunk: Chunk, position: int) -> None:
        """Store what was written to a weight in compute memory in its home; see ShownParams.keep_write."""
        weight = self._by_place[chunk.spec.chunk_id, position]
        self.runtime.updates.weights_change(chunk.spec.chunk_id)
        with torch._C.DisableTorchFunctionSubclass():
            values = local_part(weight.param).data
        self._store(weight, values, None)

    def _store(self, weight: ParamWeight, values: torch.Tensor, old: torch.Tensor | None) -> None:
        """Write changed values to the home.

        Args:
            weight: the weight.
            values: this rank's part, in compute memory.
            old: the previous values; None: not known, and the home is read.

        Raises:
            ModelError: neither has the old values.
        """
        runtime, chunk = self.runtime, weight.chunk
        chunk.num_writes += 1
        is_home = chunk.compute is not None and chunk.slot is None and not chunk.home.is_shared
        if is_home and (not chunk.spec.is_trainable or chunk.spec.dtype is torch.float32):
            return  # the home itself was written, and it is the master
        if is_home and old is None and chunk.spec.dtype is torch.bfloat16:
            raise ModelError(
                f"parameter {weight.name} was written in place by code that its class does not see, such as a "
                "compiled graph: its float32 master is no longer known; write it outside the compiled code, "
                "under torch.no_grad()"
            )
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if chunk.home.is_shared:
                with loading(runtime):
                    store_written(runtime, weight.place, values, old)
            else:
                drop_commit(runtime)
                store_written(runtime, weight.place, values, old)
