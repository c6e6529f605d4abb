"""Parameters whose values are in chunks, and the objects that represent views of their memory.

[Note: Managed parameters]
While an engine manages a parameter, its class is `ManagedParameter`, and torch tells that class every function that the
parameter is given to. So code needs no announcement to read or write a weight, inside forward or outside: the values
are fetched until the function returns, and what it has written reaches the home before it returns. Objects that would
keep hidden references to the memory are not handed out. A view that needs no gradient (`.data`, `detach()`, a slice
without gradients) becomes a `WeightAlias`, which holds no memory and finds the weight whenever it is used. A view in
the graph shows a copy, and refuses to be read once the weight has changed. `.grad` shows the waiting gradient and
refuses to be changed. What compiled code, and kernels that are given addresses, do with weights is not seen here:
version counters are compared wherever weights leave their memory (gemini.weights.access).

The classes here carry data. gemini.autograd.weight_functions, which the weight behind them calls, decides what a
function does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gemini.autograd.functions import FunctionKind, kind_of, written_arguments
from gemini.autograd.guards import foreign_write_error
from gemini.errors import ModelError

__all__ = [
    "WEIGHT_ATTRIBUTE",
    "Geometry",
    "GraphView",
    "ManagedParameter",
    "OpenWeight",
    "WaitingGradient",
    "Weight",
    "WeightAlias",
    "WeightCopy",
    "alias_of",
    "gradient_value",
    "hide",
    "is_placeless",
    "manage",
    "refuse",
    "release",
    "show",
    "make_placeholder",
    "weight_of",
]

WEIGHT_ATTRIBUTE = _WEIGHT = "_gemini_weight"


class OpenWeight(Protocol):
    """A weight whose values stay in compute memory while a function runs."""

    values: torch.Tensor
    """Values in the parameter's shape; for a DTensor, this rank's part."""
    is_lasting: bool
    """Whether a view of the memory may outlive the function, because the weight's module is running."""

    def become_copy(self) -> None:
        """Make the parameter show a copy of the values until the weight is closed."""


class Weight(Protocol):
    """One parameter of an engine, as its class sees it."""

    @property
    def name(self) -> str:
        """Name of the parameter, for messages."""

    @property
    def num_bindings(self) -> int:
        """Number of times that `.data` was replaced."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a torch function that was given the parameter, or a view of it."""

    @property
    def param(self) -> torch.nn.Parameter:
        """The parameter."""

    @property
    def is_held(self) -> bool:
        """Whether the parameter shows its values now, and at least until the next function."""

    def opened(self, *, writes: bool) -> AbstractContextManager[OpenWeight]:
        """Make the parameter show its values while the context is open; writes reach the home at its end."""

    def saved_for_backward(self) -> AbstractContextManager[None]:
        """Save weights for backward as places in chunks while the context is open."""

    def finish_update(self) -> None:
        """Wait until the weight is not being written."""

    def count_write(self) -> None:
        """Record a write, so that graphs that have saved the parameter notice it, as with torch's version counter."""

    def stamp(self) -> object:
        """Return an object that is unequal to a later one once the values may have changed."""

    def call_shared(self, func: Callable[..., Any], args: Any, kwargs: Any, params: Sequence[torch.Tensor]) -> Any:
        """Call a function that uses weights, so that gradients of shared ones may be delivered use by use."""

    def assign(self, values: torch.Tensor) -> None:
        """Write values as `.data = values` would."""

    def load(self, values: torch.Tensor) -> None:
        """Write values of a wider dtype, which the master keeps."""

    def pinned(self) -> torch.Tensor:
        """Return an up-to-date copy of the values; the same object as long as something refers to it."""

    def gradient(self) -> torch.Tensor | None:
        """Return the tensor that represents the waiting gradient; None if none waits."""

    def read_gradient(self) -> torch.Tensor | None:
        """Return the waiting gradient in the parameter's dtype; None if none waits."""

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """Add to the waiting gradient."""

    def set_gradient(self, gradient: torch.Tensor | None) -> None:
        """Replace the waiting gradient."""


def _run(args: tuple[Any, ...], kwargs: Mapping[str, Any], func: Any) -> Any:
    """Run a function with the weight of the first managed argument."""
    weight = _first_weight(args) or _first_weight(kwargs.values())
    if weight is None:  # a subclass of these classes, or an attribute of the class itself
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    return weight.run(func, args, kwargs)


def _first_weight(values: Any) -> Weight | None:
    for value in values:
        found: Weight | None = getattr(value, _WEIGHT, None)
        if found is None and isinstance(value, (list, tuple)):
            found = _first_weight(value)
        if found is not None:
            return found
    return None


class ManagedParameter(torch.nn.Parameter):
    """A parameter of a GeminiDDP; it reads as its current value in any tier, see [Note: Managed parameters]."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(args, kwargs or {}, func)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(_plain_copy(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = _plain_copy(self)
        copied: torch.nn.Parameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain_copy(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _plain_copy(param: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(param.detach().clone(), requires_grad=param.requires_grad)


_managed_types: dict[type, type] = {torch.nn.Parameter: ManagedParameter}
_plain_types: dict[type, type] = {ManagedParameter: torch.nn.Parameter}


def _managed_type(kind: type) -> type:
    """Return the class of managed parameters whose plain class is `kind`; for a managed class, the class itself."""
    if kind in _plain_types:
        return kind
    if kind not in _managed_types:
        names = ("__torch_function__", "__repr__", "__deepcopy__", "__reduce_ex__")
        members = {name: vars(ManagedParameter)[name] for name in names}
        managed = type(f"Managed{kind.__name__}", (kind,), {"__slots__": (), **members})
        _managed_types[kind], _plain_types[managed] = managed, kind
    return _managed_types[kind]


def manage(param: torch.nn.Parameter, weight: Weight) -> None:
    """Make a parameter read as a weight's value from now on."""
    setattr(param, _WEIGHT, weight)
    param.__class__ = _managed_type(type(param))


def release(param: torch.nn.Parameter) -> None:
    """Undo `manage`."""
    hide(param)
    delattr(param, _WEIGHT)


def hide(param: torch.nn.Parameter) -> None:
    """Make a managed parameter plain for code compiled by torch.compile, which must not see the managed class."""
    if type(param) in _plain_types:
        param.__class__ = _plain_types[type(param)]


def show(param: torch.nn.Parameter) -> None:
    """Undo `hide`."""
    if hasattr(param, _WEIGHT):
        param.__class__ = _managed_type(type(param))


def is_placeless(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has no memory of its own, so that its values must be copied to outlive a module."""
    return isinstance(tensor, WeightAlias) or type(tensor) in _plain_types


def weight_of(tensor: object) -> Weight | None:
    """Return the weight behind a managed parameter or behind a view of one; None for anything else."""
    weight: Weight | None = getattr(tensor, _WEIGHT, None) if isinstance(tensor, torch.Tensor) else None
    return weight


@dataclass(frozen=True, slots=True)
class Geometry:
    """The position of a view's elements in the memory of a weight's values."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    begin_nbytes: int
    """First byte of the view, counted from the first byte of the values."""


class _View(torch.Tensor):
    """A view of a weight; copies and saved forms of it are plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(args, kwargs or {}, func)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class WeightAlias(_View):
    """A view of a weight that needs no gradient. It holds no memory; code that uses it finds the weight's values.

    Writes through it change the weight, as with any view. Calls that bypass torch's functions, such as torch.vmap or
    torch.tensor, reach torch's dispatcher, which asks this class as well.
    """

    _geometry: Geometry
    _keeps_version: bool
    """Whether writes through it do not count as the parameter's, as for `.data`."""
    _binding: int
    _pinned: torch.Tensor | None = None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with torch.no_grad():  # calls that arrive here have passed autograd
            return _run(args, kwargs or {}, func)

    def check_current(self, *, writes: bool) -> None:
        """Refuse use once the parameter's `.data` has been replaced: plain torch would show the old memory.

        Args:
            writes: whether the view is about to be written.

        Raises:
            ModelError: the data was replaced.
        """
        weight = weight_of(self)
        assert weight is not None
        if weight.num_bindings != self._binding:
            raise refuse(
                weight,
                "a view of it is used after its .data was replaced",
                "take a new view from the parameter, or write with copy_ instead of replacing .data",
            )


class GraphView(_View):
    """A view of a weight in the graph, with separate memory."""

    _stamp: object

    def check_current(self, *, writes: bool) -> None:
        """Refuse writes, and reads once the weight has changed.

        Args:
            writes: whether the view is about to be written.

        Raises:
            ModelError: the view is written, or the weight has changed.
        """
        weight = weight_of(self)
        assert weight is not None
        if writes:
            raise refuse(weight, "a view of it in the graph was written in place", "write the parameter itself")
        if weight.stamp() != self._stamp:
            raise refuse(
                weight,
                "a view of it in the graph is read after the weight has changed",
                "take the view anew, from the parameter",
            )


_INSTEAD_OF_A_VIEW = "assign the new values to the parameter's .grad, or clone the tensor to change the copy"


class WaitingGradient(torch.Tensor):
    """A weight's gradient while it waits for the optimizer's step: may be read and added to, not changed otherwise."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        if kind is FunctionKind.METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in (torch.Tensor.__iadd__, torch.Tensor.add_) and isinstance(args[0], cls):
            return _add_gradient(*args, **kwargs)
        if kind is FunctionKind.DATA_GET or func in (torch.Tensor.detach, torch.Tensor.detach_):
            return args[0]
        is_written = any(isinstance(each, cls) for each in _flat(written_arguments(func, args, kwargs), {}))
        if is_written or kind in (FunctionKind.DATA_SET, FunctionKind.GRAD_SET):
            changed = next(weight for weight in map(weight_of, _flat(args, kwargs)) if weight is not None)
            raise foreign_write_error(func.__name__, changed.name)
        values = [gradient_value(each) for each in args]
        result = func(*values, **{name: gradient_value(each) for name, each in kwargs.items()})
        if kind is FunctionKind.ADDRESS and hasattr(result, "flags"):
            result.flags.writeable = False  # an array, through which a write would be lost
        for value, each in zip(values, args, strict=True):
            if isinstance(each, cls):
                result = _mark_views(result, value, f"a view of the gradient of {_name_of(each)}", _INSTEAD_OF_A_VIEW)
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _add_gradient(waiting: torch.Tensor, other: Any, *, alpha: float = 1) -> torch.Tensor:
    """Add to a waiting gradient, as `param.grad += other` does in plain torch."""
    weight = weight_of(waiting)
    assert weight is not None
    with torch.no_grad():
        if alpha == 1:
            weight.add_gradient(torch.zeros_like(waiting).add_(gradient_value(other)))
        else:
            weight.set_gradient(torch.add(gradient_value(waiting), gradient_value(other), alpha=alpha))
    return waiting


class WeightCopy(torch.Tensor):
    """A read-only copy where plain torch would return the object itself, for example a weight in a state dict."""

    what = ""
    """Description of the object, for messages."""
    instead = (
        "write the parameter itself under torch.no_grad(), call engine.load_state_dict, or clone the tensor to change "
        "the copy"
    )
    """Remedy, for messages."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copies = [value for value in _flat(args, kwargs) if isinstance(value, cls)]
        if any(isinstance(each, cls) for each in _flat(written_arguments(func, args, kwargs), {})):
            raise ModelError(
                f"{copies[0].what} of a model in a GeminiDDP was written in place; it is a copy, so the model would "
                f"not change: {copies[0].instead}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            for copy in copies:
                result = _mark_views(result, copy, copy.what, copy.instead)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _mark_views(result: Any, copy: torch.Tensor, what: str, instead: str) -> Any:
    """Return a function's result, read only where it is a view of a copy."""
    if type(result) is not torch.Tensor or result.layout is not torch.strided:
        return result
    if result.untyped_storage()._cdata != copy.untyped_storage()._cdata:
        return result
    view: WeightCopy = result.as_subclass(WeightCopy)
    view.what, view.instead = what, instead
    return view


def _name_of(tensor: torch.Tensor) -> str:
    weight = weight_of(tensor)
    return "a parameter" if weight is None else weight.name


def gradient_value(value: Any) -> Any:
    """Return an argument with values in place of waiting gradients; lists and tuples are searched."""
    if type(value) in (list, tuple):
        return type(value)(map(gradient_value, value))
    if not isinstance(value, WaitingGradient):
        return value
    weight = weight_of(value)
    assert weight is not None
    gradient = weight.read_gradient()
    if gradient is None:  # a step used it or it was dropped; its last value
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(torch.Tensor)
    return gradient


def _flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    flat: list[Any] = []
    for value in (*args, *kwargs.values()):
        flat += value if isinstance(value, (list, tuple)) else [value]
    return flat


def alias_of(weight: Weight, geometry: Geometry, device: torch.device, *, keeps_version: bool) -> WeightAlias:
    """Return a view of a weight without memory.

    Args:
        weight: the weight.
        geometry: position of its elements in the weight.
        device: device that it reports.
        keeps_version: whether writes through it do not count as the parameter's.

    Returns:
        The view.
    """
    like = torch.empty((), dtype=geometry.dtype, device=device).expand(geometry.size)
    alias: WeightAlias = make_placeholder(WeightAlias, weight, like)
    alias._geometry = geometry
    alias._keeps_version = keeps_version
    alias._binding = weight.num_bindings
    return alias


def make_placeholder(kind: type, weight: Weight, like: torch.Tensor) -> Any:
    """Return a tensor of a class, with a tensor's size, dtype and device and no memory."""
    empty = torch.full((), float("nan") if like.dtype.is_floating_point else 0, dtype=like.dtype, device=like.device)
    torch._C._set_throw_on_mutable_data_ptr(empty)
    made: Any = empty.expand(like.size()).as_subclass(kind)
    setattr(made, _WEIGHT, weight)
    return made


def refuse(weight: Weight, what: str, instead: str) -> ModelError:
    """Return the error for a use of a weight that cannot be honoured."""
    return ModelError(f"parameter {weight.name} of a GeminiDDP: {what}; {instead}")
