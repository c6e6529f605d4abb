"""Runs torch functions that are given managed parameters, or views of them; see [Note: Managed parameters]."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from gemini.autograd.functions import (
    FunctionKind,
    copied_arguments,
    kind_of,
    reshapes_in_place,
    returns_new_tensors,
    written_arguments,
)
from gemini.autograd.managed_parameter import (
    WEIGHT_ATTRIBUTE,
    Geometry,
    GraphView,
    OpenWeight,
    WaitingGradient,
    Weight,
    WeightAlias,
    alias_of,
    gradient_value,
    refuse,
    weight_of,
)
from gemini.autograd.tracers import is_transforming, outside_transforms
from gemini.model.tensor_parallel import is_dtensor

__all__ = ["run_function"]


def run_function(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a torch function that was given a managed parameter, or a view of one."""
    kind = kind_of(func)
    if reshapes_in_place(func):
        _check_reshaping(func, args, kwargs)
    if kind is FunctionKind.METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if kind is FunctionKind.VALUES:
        return _run_transformed(func, args, kwargs) if is_transforming() else _run(func, args, kwargs)
    if kind is FunctionKind.DIFFERENTIATE:
        return func(*_with_edges(args), **_with_edges(kwargs))
    return _look_at(kind, func, args, kwargs)


def _check_reshaping(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse in-place changes except of values; a parameter's own requires_grad is compared before each forward."""
    tensor = args[0]
    weight = weight_of(tensor)
    is_flag = func.__name__ == "requires_grad_"
    if weight is None or (is_flag and (tensor is weight.param or not all((*args[1:], *kwargs.values())))):
        return
    if is_flag:
        raise refuse(weight, "gradients were requested of a view that is in no graph", "clone it first")
    raise refuse(
        weight,
        f"{func.__name__} would change its shape, strides or storage in place",
        "use the function without the underscore, or change the model before wrapping it",
    )


def _with_edges(value: Any) -> Any:
    """Replace managed parameters by their places in the graph; asking for gradients reads no values."""
    if isinstance(value, Mapping):
        return {key: _with_edges(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_edges, value)) if type(value) in (list, tuple) else value
    if not isinstance(value, torch.Tensor) or weight_of(value) is None:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return torch.autograd.graph.get_gradient_edge(value) if value.requires_grad else value


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    found = [*_tensors_of(args), *_tensors_of(kwargs.values())]
    if any(isinstance(tensor, WaitingGradient) for tensor, _ in found):
        return func(*map(gradient_value, args), **{name: gradient_value(value) for name, value in kwargs.items()})
    weights = {id(weight): weight for _, weight in found}
    written = {id(weight) for _, weight in _tensors_of(written_arguments(func, args, kwargs))}
    first = found[0][1]
    if not written and returns_new_tensors(func) and all(w.is_held and t is w.param for t, w in found):
        with torch._C.DisableTorchFunctionSubclass(), first.saved_for_backward():
            return first.call_shared(func, args, kwargs, [tensor for tensor, _ in found])
    num_elements = max((len(each) for each in (*args, *kwargs.values()) if isinstance(each, (list, tuple))), default=0)
    if len(weights) > 1 and num_elements > 1 and getattr(func, "__name__", "").startswith("_foreach_"):
        return _run_one_by_one(func, args, kwargs)
    with ExitStack() as stack:
        for tensor, weight in found:
            if isinstance(tensor, (GraphView, WeightAlias)):
                tensor.check_current(writes=id(weight) in written)
        opened = {key: stack.enter_context(each.opened(writes=key in written)) for key, each in weights.items()}
        stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        stack.enter_context(first.saved_for_backward())
        result = _call(func, args, kwargs, found, opened)
        if any(_needs_own_memory(tensor, opened.values()) for tensor in _plain_tensors_in(result)):
            for each in opened.values():
                each.become_copy()
            result = _call(func, args, kwargs, found, opened)
        result = _hand_out(result, func, found, [(weights[key], each) for key, each in opened.items()])
    for tensor, weight in found:
        if isinstance(tensor, WeightAlias) and id(weight) in written and not tensor._keeps_version:
            weight.count_write()
    for target, source in copied_arguments(func, args, kwargs):
        _keep_precision(target, source)
    return result


def _run_transformed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a function within a transform of torch.func on copies of the weights made outside it; refuse writes."""
    for _, weight in _tensors_of(written_arguments(func, args, kwargs)):
        raise refuse(
            weight, "written in place within a transform of torch.func", "return the values and write them outside"
        )
    with outside_transforms():
        copies = {id(tensor): tensor.clone() for tensor, _ in (*_tensors_of(args), *_tensors_of(kwargs.values()))}
    return func(
        *(_replaced(value, copies) for value in args),
        **{name: _replaced(value, copies) for name, value in kwargs.items()},
    )


def _keep_precision(target: Any, source: Any) -> None:
    """Keep in a weight's master the precision of copied values that the weight's own dtype cannot hold."""
    weight = weight_of(target)
    if weight is None or not isinstance(source, torch.Tensor) or not source.is_floating_point():
        return
    own = target.dtype
    if own.is_floating_point and source.element_size() > own.itemsize and _is_whole(target, weight):
        weight.load(source.expand(target.shape))


def _is_whole(tensor: torch.Tensor, weight: Weight) -> bool:
    """Return whether a managed parameter, or a view of one, shows the weight as it is."""
    return tensor is weight.param or (
        isinstance(tensor, WeightAlias) and tensor._geometry == _full_geometry(weight.param)
    )


def _call(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    found: Sequence[tuple[torch.Tensor, Weight]],
    opened: Mapping[int, OpenWeight],
) -> Any:
    """Call a function on memory that holds values."""
    replacements = {id(tensor): _resolve(tensor, opened[id(weight)]) for tensor, weight in found}

    args = tuple(_replaced(value, replacements) for value in args)
    kwargs = {name: _replaced(value, replacements) for name, value in kwargs.items()}
    params = [tensor for tensor, weight in found if tensor is weight.param]
    result = found[0][1].call_shared(func, args, kwargs, params) if params else func(*args, **kwargs)
    originals = {id(replacements[id(tensor)]): tensor for tensor, _ in found}
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        return type(result)(originals.get(id(each), each) for each in result)
    return originals.get(id(result), result)


def _replaced(value: Any, replacements: Mapping[int, torch.Tensor]) -> Any:
    if type(value) in (list, tuple):
        return type(value)(_replaced(each, replacements) for each in value)
    return replacements.get(id(value), value)


def _needs_own_memory(tensor: torch.Tensor, opened: Collection[OpenWeight]) -> bool:
    """Return whether a tensor in the graph shows memory that other weights will take."""
    return _is_in_graph(tensor) and any(
        not each.is_lasting and weight_of(tensor) is None and _shares_memory(tensor, each.values) for each in opened
    )


def _is_in_graph(tensor: torch.Tensor) -> bool:
    """Return whether a tensor gets gradients; without them, views of a weight have none."""
    return tensor.requires_grad and torch.is_grad_enabled()


def _shares_memory(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Return whether a tensor is made of the same storage as a weight's values."""
    local = getattr(tensor, "_local_tensor", tensor)
    if local.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(local):
        return False
    return bool(local.untyped_storage()._cdata == values.untyped_storage()._cdata)


def _run_one_by_one(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a torch function with lists element by element, so that one weight at a time is in memory."""
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))]
    count = max((len(each) for each in lists), default=0)
    results = []
    for index in range(count):

        def pick(value: Any, index: int = index) -> Any:
            return [value[index]] if isinstance(value, (list, tuple)) and len(value) == count else value

        results.append(func(*map(pick, args), **{name: pick(value) for name, value in kwargs.items()}))
    if any(result is None for result in results):
        return None
    return type(results[0])(element for result in results for element in result)


def _tensors_of(values: Any) -> Iterator[tuple[torch.Tensor, Weight]]:
    """Yield the managed parameters, and views of them, among arguments; lists and tuples are searched."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors_of(value)
        else:
            weight = weight_of(value)
            if weight is not None:
                yield value, weight


def _plain_tensors_in(result: Any) -> Iterator[torch.Tensor]:
    for value in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(value, torch.Tensor):
            yield value


def _geometry_of(view: torch.Tensor, values: torch.Tensor) -> Geometry:
    begin = view.storage_offset() * view.element_size() - values.storage_offset() * values.element_size()
    return Geometry(view.dtype, view.size(), view.stride(), int(begin))


def _resolve(tensor: torch.Tensor, opened: OpenWeight) -> torch.Tensor:
    """Return a tensor that shows a parameter, or a view of it, in an opened weight's memory."""
    if isinstance(tensor, WeightAlias):
        return _view(tensor._geometry, opened.values)
    return tensor


def _view(geometry: Geometry, values: torch.Tensor) -> torch.Tensor:
    begin = values.storage_offset() * values.element_size() + geometry.begin_nbytes
    empty = torch.empty(0, dtype=geometry.dtype, device=values.device)
    with torch.no_grad():
        return empty.set_(values.untyped_storage(), begin // empty.element_size(), geometry.size, geometry.stride)


def _hand_out(
    result: Any,
    func: Any,
    found: Sequence[tuple[torch.Tensor, Weight]],
    opened: Sequence[tuple[Weight, OpenWeight]],
) -> Any:
    """Return a function's result with views of weights' memory made safe to keep."""
    if type(result) in (list, tuple):
        return type(result)(_hand_out(each, func, found, opened) for each in result)
    if not isinstance(result, torch.Tensor) or weight_of(result) is not None:
        return result
    for weight, each in opened:
        if not _shares_memory(result, each.values):
            continue
        if _is_in_graph(result):
            return result if each.is_lasting else _graph_view(result, weight, weight.stamp())
        if type(result) is not torch.Tensor or result.is_conj() or result.is_neg():  # a DTensor, or lazily computed
            return result.clone()
        sources = [tensor for tensor, owner in found if owner is weight and isinstance(tensor, WeightAlias)]
        keeps_version = any(tensor._keeps_version for tensor in sources)
        return alias_of(weight, _geometry_of(result, each.values), result.device, keeps_version=keeps_version)
    for tensor, weight in found:
        if isinstance(tensor, GraphView) and _shares_memory(result, tensor):
            return _graph_view(result, weight, tensor._stamp)
    return result


def _graph_view(view: torch.Tensor, weight: Weight, stamp: object) -> GraphView:
    view.__class__ = GraphView  # as_subclass would put a node between the view and its base
    seen: GraphView = view  # type: ignore[assignment]
    seen.__dict__[WEIGHT_ATTRIBUTE] = weight
    seen._stamp = stamp
    return seen


def _look_at(kind: FunctionKind, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Answer requests to a parameter, or a view of one, that do not concern its values."""
    tensor = args[0] if args else None
    weight = weight_of(tensor)
    if weight is None:  # another argument is the managed one
        raw = [each.clone() if weight_of(each) is not None else each for each in args]
        return func(*raw, **kwargs)
    assert tensor is not None
    if kind is FunctionKind.GRAD_GET:
        return weight.gradient() if tensor is weight.param else None
    if kind is FunctionKind.GRAD_SET:
        if tensor is not weight.param:
            raise refuse(weight, "a view of it was given a gradient", "give the parameter its gradient")
        weight.set_gradient(args[1] if len(args) > 1 else None)
        return None
    if kind is FunctionKind.DATA_SET:
        if tensor is not weight.param:
            raise refuse(weight, "the .data of a view of it was replaced", "write into the view with copy_")
        weight.assign(args[1])
        return None
    if isinstance(tensor, GraphView):
        tensor.check_current(writes=False)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            return _graph_view(found, weight, tensor._stamp) if isinstance(found, torch.Tensor) else found
    if kind is FunctionKind.DATA_GET:
        return _data_of(tensor, weight)
    if kind is FunctionKind.GEOMETRY:
        geometry = _full_geometry(tensor)
        twin = torch.empty_strided(geometry.size, geometry.stride, dtype=geometry.dtype, device="meta")
        if func.__name__ == "storage_offset":
            return geometry.begin_nbytes // twin.element_size()
        return func(twin, *args[1:], **kwargs)
    return _address(tensor, weight, func, args, kwargs)


def _full_geometry(tensor: torch.Tensor) -> Geometry:
    if isinstance(tensor, WeightAlias):
        return tensor._geometry
    with torch._C.DisableTorchFunctionSubclass():
        twin = torch.empty(tensor.size(), dtype=tensor.dtype, device="meta")
        return _geometry_of(twin, twin)


def _data_of(tensor: torch.Tensor, weight: Weight) -> torch.Tensor:
    geometry = _full_geometry(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        if is_dtensor(tensor):
            raise refuse(
                weight,
                "its .data was read, and it is divided among ranks",
                "read it with .detach(), and write it in place under torch.no_grad()",
            )
        return alias_of(weight, geometry, tensor.device, keeps_version=True)


def _address(tensor: torch.Tensor, weight: Weight, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return memory: the weight's own while its module runs, otherwise a copy that lives as long as its user."""
    is_array = func.__name__ in ("numpy", "__array__", "__dlpack__")
    if weight.is_held and tensor is weight.param and not is_array:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    pinned = weight.pinned()
    tensor._pinned = pinned  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunctionSubclass():
        memory = _view(tensor._geometry, pinned) if isinstance(tensor, WeightAlias) else pinned
        if is_array and tensor.requires_grad:
            memory = memory.clone().requires_grad_()  # torch refuses and says what to do
        found = func(memory, *args[1:], **kwargs)
        if is_array and hasattr(found, "flags"):
            found.flags.writeable = False  # a write here would not reach the weight
        return found
