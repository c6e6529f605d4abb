"""Refuses code of others that would silently train nothing or train wrongly: optimizers, clipping, loss scaling.

[Note: Foreign optimizers]
Gradients do not wait in `.grad`, so an optimizer other than HybridAdam finds none and does nothing. torch calls a hook
before every step of every optimizer of the process. This hook checks the parameters once for each set of them and each
change of the managed parameters. Optimizers over other parameters pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gemini.errors import ConfigError, ModelError
from gemini.model.module_calls import disable_compile

__all__ = ["GradScalerAttribute", "OptimizerGuard", "foreign_write_error", "grad_scaler_error"]

_IN_PLACE_OF_SCALERS = ("_amp_foreach_non_finite_check_and_unscale_",)


class OptimizerGuard:
    """Refuses steps of optimizers that have been given an engine's parameters.

    Args:
        is_trained_by_engine: returns whether an engine trains a parameter.
        is_ours: returns whether an optimizer is one that knows engines.
    """

    def __init__(
        self,
        is_trained_by_engine: Callable[[torch.Tensor], bool],
        is_ours: Callable[[torch.optim.Optimizer], bool],
    ) -> None:
        self._is_trained_by_engine = is_trained_by_engine
        self._is_ours = is_ours
        self._passed: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, ...]] = weakref.WeakKeyDictionary()
        """Optimizers that may step, with the parameters that they had when they were checked."""
        self._handle: Any = None

    def install(self) -> None:
        """Check every optimizer of the process from now on; earlier results are dropped."""
        self._passed.clear()
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._check)

    @disable_compile
    def _check(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_ours(optimizer):
            return
        groups = [group["params"] for group in optimizer.param_groups]
        seen = tuple(number for params in groups for number in (id(params), len(params)))
        if self._passed.get(optimizer) == seen:
            return
        refused = [param for params in groups for param in params if self._is_trained_by_engine(param)]
        if refused:
            num_params = sum(map(len, groups))
            raise ConfigError(
                f"{type(optimizer).__name__}.step: {len(refused)} of its {num_params} parameters belong to a "
                f"GeminiDDP (the first is of shape {tuple(refused[0].shape)}), whose gradients it cannot find, so "
                "it would not train them: use HybridAdam(engine.parameters()), and this optimizer only for other "
                "parameters"
            )
        self._passed[optimizer] = seen


def foreign_write_error(function_name: str, param_name: str) -> ConfigError | ModelError:
    """Return the error for code that changes a waiting gradient in place.

    Args:
        function_name: name of the torch function, such as "_foreach_mul_"; tells clipping from loss scaling.
        param_name: name of the parameter whose gradient it is.

    Returns:
        The error to raise.
    """
    if function_name in _IN_PLACE_OF_SCALERS:
        return grad_scaler_error()
    return ModelError(
        f"torch.{function_name} would change the gradient of {param_name} in place, but .grad only shows where it "
        "waits: clip with HybridAdam(..., max_grad_norm=...) or engine.clip_grad_norm_, not with functions of "
        "torch.nn.utils; drop gradients with zero_grad(); scale the loss, not gradients (in torch's pipeline "
        "schedules, scale_grads=False); change single gradients with parameter.register_hook, or assign a new "
        "tensor to .grad"
    )


def grad_scaler_error() -> ConfigError:
    """Return the error for a GradScaler around HybridAdam."""
    return ConfigError(
        "GradScaler around HybridAdam: leave it out, or create it with enabled=False: in float16, a GeminiDDP "
        "scales the loss itself (GeminiConfig.initial_loss_scale), and bfloat16 and float32 need no scaling"
    )


class GradScalerAttribute:
    """An optimizer's attribute that an enabled torch.amp.GradScaler reads before it steps; refuses that."""

    def __get__(self, optimizer: object, owner: type) -> bool:
        """Return False for the class; raise ConfigError for an optimizer."""
        if optimizer is None:
            return False
        raise grad_scaler_error()
