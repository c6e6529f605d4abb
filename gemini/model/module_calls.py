"""Facts about calls of modules: whether they are compiled, and whether one is within another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch

__all__ = ["disable_compile", "is_called_within_itself", "is_compiled"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_CALL_CODE = torch.nn.Module._call_impl.__code__


def disable_compile(function: _Function) -> _Function:
    """Keep a hook out of torch.compile's graphs."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether torch.compile runs a module, in either of its two forms."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def is_called_within_itself(module: torch.nn.Module) -> bool:
    """Return whether an outer call of a module that is being called is still running, rather than interrupted."""
    frame: FrameType | None = sys._getframe()
    num_calls = 0
    while frame is not None and num_calls < 2:
        num_calls += frame.f_code is _CALL_CODE and frame.f_locals["self"] is module
        frame = frame.f_back
    return num_calls == 2
