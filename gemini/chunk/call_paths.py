"""Which modules are used without being called, read off the bytecode of their parents.

A hook on a module sees only `module(...)`. Code such as `self.embeddings.weight`, `self.model.forward(x)` or
`self.vae.encode(x)` goes past it, so such a module cannot decide when its parameters are needed. Neither can a leaf
that is handed on, as in `self.head(x, self.embeddings)`: the receiver may read its weight.

The search follows attribute chains from `self` (and from local names assigned from them) through the methods that
forward reaches. It does not follow subscripts, loop variables or getattr: it finds the usual cases, not all.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import nn

__all__ = ["compiled_layers", "find_bypassed_modules", "unwrap_compiled"]


class _Chain(NamedTuple):
    """Attributes loaded one after the other, starting from `self`."""

    names: tuple[str, ...]
    is_handed_on: bool
    """Whether the last one becomes a value other code can do anything with; False where it is called or tested."""


_METADATA_NAMES = frozenset(
    {"device", "dtype", "dim", "element_size", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}
)
"""Attributes of a parameter that do not need its values."""


def find_bypassed_modules(modules: Iterable[nn.Module]) -> set[int]:
    """Find modules whose parameters, or whose descendants, some parent's code uses without calling them.

    Args:
        modules: all modules of a model; only their classes' code and their names of children are read.

    Returns:
        The ids of the modules found.
    """
    search = _Search()
    for module in modules:
        search.scan(unwrap_compiled(module), "forward")
    return search.bypassed


def compiled_layers(module: nn.Module) -> list[nn.Module]:
    """Return a module and, where it is a torch.compile wrapper, what it wraps, outermost first."""
    layers = [module]
    while (wrapped := layers[-1]._modules.get("_orig_mod")) is not None:
        layers.append(wrapped)
    return layers


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """Return the module inside a torch.compile wrapper, or the module itself."""
    return compiled_layers(module)[-1]


class _Search:
    """One pass over a model's code; remembers what it has already read."""

    def __init__(self) -> None:
        self.bypassed: set[int] = set()
        self._uses_by_entry: dict[tuple[int, str], bool] = {}
        self._chains_by_code: dict[CodeType, tuple[_Chain, ...]] = {}

    def scan(self, module: nn.Module, method_name: str) -> bool:
        """Follow one method of a module; return whether it needs parameters of the module or calls its children."""
        entry = (id(module), method_name)
        if entry not in self._uses_by_entry:
            self._uses_by_entry[entry] = False  # a recursive call adds nothing to what its caller finds
            uses = [
                self._follow(module, chain)
                for function in _functions(module, method_name)
                for chain in self._chains(function.__code__)
            ]
            self._uses_by_entry[entry] = any(uses)
        return self._uses_by_entry[entry]

    def _chains(self, code: CodeType) -> tuple[_Chain, ...]:
        if code not in self._chains_by_code:
            self._chains_by_code[code] = tuple(dict.fromkeys(_self_chains(code)))
        return self._chains_by_code[code]

    def _follow(self, module: nn.Module, chain: _Chain) -> bool:
        path: list[nn.Module] = []
        owner = module
        for position, name in enumerate(chain.names):
            child = owner._modules.get(name)
            if child is not None:
                path.append(child)
                owner = unwrap_compiled(child)
                continue
            is_used = self._uses_attribute(owner, name, chain.names[position + 1 :])
            if is_used:
                self._mark(path)
            return is_used
        is_leaf = not owner._modules and bool(owner._parameters)
        self._mark(path if chain.is_handed_on and is_leaf else path[:-1])
        return bool(path)

    def _uses_attribute(self, owner: nn.Module, name: str, rest: tuple[str, ...]) -> bool:
        if owner._parameters.get(name) is not None:
            return not (rest and rest[0] in _METADATA_NAMES)
        return self.scan(owner, name)

    def _mark(self, path: list[nn.Module]) -> None:
        for module in path:
            self.bypassed.update(id(layer) for layer in compiled_layers(module))


def _functions(module: nn.Module, name: str) -> Iterator[FunctionType]:
    """Yield every Python definition of a method or property along the class hierarchy, for `super()` may reach it."""
    if hasattr(nn.Module, name) and name != "forward":
        return
    holders: list[object] = [module, *(cls for cls in type(module).__mro__ if cls is not nn.Module)]
    for definition in (vars(holder).get(name) for holder in holders):
        function = definition.fget if isinstance(definition, property) else definition
        function = getattr(function, "__func__", function)
        function = inspect.unwrap(function) if callable(function) else None
        if isinstance(function, FunctionType):
            yield function


def _self_chains(code: CodeType) -> Iterator[_Chain]:
    """Yield attribute chains that start at a method's first argument, in its nested functions too."""
    if code.co_argcount > 0:
        yield from _alias_chains(code, {code.co_varnames[0]: ()})


def _alias_chains(code: CodeType, aliases: dict[str, tuple[str, ...]]) -> Iterator[_Chain]:
    names: tuple[str, ...] | None = None
    is_called = False
    previous_operation = ""
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        if names is not None and operation in ("LOAD_ATTR", "LOAD_METHOD"):
            names = (*names, instruction.argval)
            is_called = is_called or _is_method_load(instruction)
            continue
        if operation in ("STORE_FAST", "STORE_DEREF"):
            aliases.pop(instruction.argval, None)
            if names is not None:
                aliases[instruction.argval] = names
                names = None  # naming a module is not using it; what is done with the name follows
        if names:
            yield _Chain(names, is_handed_on=not is_called and not _is_call_or_test(instruction))
        names = None
        if operation.startswith(("LOAD_FAST", "LOAD_DEREF")):
            # Newer interpreters load two names in one instruction; the second ends on top of the stack.
            loaded = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
            names = aliases.get(loaded)
            is_called = previous_operation == "PUSH_NULL"
        previous_operation = operation
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _alias_chains(
                constant, {name: aliases[name] for name in constant.co_freevars if name in aliases}
            )


def _is_method_load(instruction: dis.Instruction) -> bool:
    """Return whether an attribute is loaded in order to be called at once."""
    has_call_flag = sys.version_info >= (3, 12) and bool((instruction.arg or 0) & 1)
    return instruction.opname == "LOAD_METHOD" or has_call_flag


def _is_call_or_test(instruction: dis.Instruction) -> bool:
    """Return whether the instruction after a load calls the value or only tests whether it is there."""
    is_none = instruction.opname == "LOAD_CONST" and instruction.argval is None
    return is_none or instruction.opname == "PUSH_NULL" or instruction.opname.startswith("POP_JUMP")
