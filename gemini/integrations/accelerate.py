"""Hugging Face accelerate: an Accelerator that leaves the engine's tasks to the engine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gemini.ddp import GeminiDDP
from gemini.errors import ConfigError, MissingLibraryError
from gemini.integrations import overrides
from gemini.optimizer import HybridAdam
from gemini.weights.ownership import runtime_of

try:
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise MissingLibraryError(f"{__name__} needs accelerate (pip install accelerate): {error}") from error

__all__ = ["GeminiAccelerator"]


class GeminiAccelerator(accelerate.Accelerator):
    """An Accelerator for models wrapped in GeminiDDP and trained with HybridAdam; it treats other models as usual.

    `prepare` returns the engine and its optimizer unchanged: nothing is moved, cast or wrapped again. `clip_grad_norm_`
    clips the gradients where they wait, and `save_state` streams weights and optimizer state into a checkpoint of the
    engine beside accelerate's own small files. All other methods are accelerate's.
    """

    _models: list[Any]
    _optimizers: list[Any]

    def prepare_model(
        self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> torch.nn.Module:
        """Return an engine, or the model inside one, unchanged; prepare any other model.

        Args:
            model: the model to prepare.
            device_placement: as in accelerate; an engine is never moved.
            evaluation_mode: as in accelerate.

        Returns:
            The model.

        Raises:
            ConfigError: the accelerator is configured to do what the engine does itself.
        """
        if not any(runtime_of(param) is not None for param in model.parameters()):
            prepared: torch.nn.Module = super().prepare_model(model, device_placement, evaluation_mode)
            return prepared
        self._refuse_double_work()
        if isinstance(model, GeminiDDP):
            self._check_engine(model)
            if model not in self._models:
                self._models.append(model)
        return model

    def _refuse_double_work(self) -> None:
        if self.mixed_precision != "no":
            raise ConfigError(
                f'Accelerator.mixed_precision: expected "no", got {self.mixed_precision!r}: the engine has its own '
                "working dtype and float32 masters; set it with GeminiConfig(dtype=...)"
            )
        if self.state.dynamo_plugin.backend != accelerate.utils.DynamoBackend.NO:
            raise ConfigError(
                "Accelerator.dynamo_plugin: a model compiled as a whole does not show which weights it needs; "
                "compile its blocks before wrapping it: for block in model.model.layers: block.compile()"
            )

    def _check_engine(self, engine: GeminiDDP) -> None:
        if self.num_processes > 1 and engine.runtime.sharding.is_alone:
            raise ConfigError(
                f"Accelerator.prepare: there are {self.num_processes} processes, but the engine has one rank: "
                "wrap the model with zero.shard(model, config) instead of GeminiDDP"
            )
        device = engine.runtime.resources.transfers.device
        if device.type != self.device.type:
            raise ConfigError(
                f"Accelerator.device: batches go to {self.device}, but the engine computes on {device}: give "
                "Accelerator(cpu=...) and GeminiConfig(device=...) the same device"
            )

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Wrap an optimizer; the state of a HybridAdam stays where it is.

        Args:
            optimizer: the optimizer to prepare.
            device_placement: as in accelerate; ignored for a HybridAdam.

        Returns:
            The wrapper.

        Raises:
            ConfigError: it is another optimizer over an engine's parameters, which would train nothing.
        """
        if isinstance(optimizer, HybridAdam):
            prepared = _PreparedHybridAdam(optimizer, device_placement=False)
            self._optimizers.append(prepared)
            return prepared
        if not isinstance(optimizer, AcceleratedOptimizer):
            params = (param for group in optimizer.param_groups for param in group["params"])
            if any(runtime_of(param) is not None for param in params):
                raise ConfigError(
                    "Accelerator.prepare: expected a HybridAdam for the parameters of a GeminiDDP, got a "
                    f"{type(optimizer).__name__}, which would find no gradients"
                )
        return super().prepare_optimizer(optimizer, device_placement)

    def unwrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Return the user's model; for an engine, the model that it wraps.

        Args:
            model: a model, wrapped or not.
            *args: as in accelerate.
            **kwargs: as in accelerate.

        Returns:
            The model, as in accelerate.
        """
        plain = model.module if isinstance(model, GeminiDDP) else model
        unwrapped: torch.nn.Module = super().unwrap_model(plain, *args, **kwargs)
        return unwrapped

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor] | torch.Tensor, max_norm: float, norm_type: float = 2
    ) -> torch.Tensor | None:
        """Clip gradients by their global norm.

        Args:
            parameters: all parameters that an engine trains, or none of them.
            max_norm: maximum norm; infinity only measures.
            norm_type: 2 for an engine's parameters.

        Returns:
            The norm before clipping, float32 []; NaN if a gradient of an engine is not finite: its next step is
            skipped.

        Raises:
            ConfigError: another norm was requested, some of an engine's parameters are missing or mixed with others, or
                the engine was never prepared.
        """
        params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        engine = self._engine_of(params)
        if engine is None:
            norm: torch.Tensor | None = super().clip_grad_norm_(params, max_norm, norm_type)
            return norm
        if norm_type != 2:
            raise ConfigError(f"Accelerator.clip_grad_norm_: norm_type: expected 2, got {norm_type!r}")
        given = {id(param) for param in params}
        if any(id(param) not in given for param in engine.parameters() if param.requires_grad):
            raise ConfigError(
                "Accelerator.clip_grad_norm_: parameters: expected all parameters that the engine trains, "
                "because their gradients are clipped together; pass model.parameters()"
            )
        if any(runtime_of(param) is not engine.runtime for param in params):
            raise ConfigError(
                "Accelerator.clip_grad_norm_: parameters: expected parameters of one GeminiDDP only, because its "
                "norm does not include other gradients; clip each model separately"
            )
        return engine.clip_grad_norm_(max_norm)

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor] | torch.Tensor, clip_value: float) -> None:
        """Clip each gradient's elements; not for an engine's parameters.

        Args:
            parameters: parameters that no engine manages.
            clip_value: maximum magnitude.

        Raises:
            ConfigError: an engine manages one of them.
        """
        params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if self._engine_of(params) is not None:
            raise ConfigError("Accelerator.clip_grad_value_: gradients of a GeminiDDP are clipped by their norm alone")
        super().clip_grad_value_(params, clip_value)

    def _engine_of(self, params: list[torch.Tensor]) -> GeminiDDP | None:
        runtime = next((found for found in map(runtime_of, params) if found is not None), None)
        if runtime is None:
            return None
        for model in self._models:
            if isinstance(model, GeminiDDP) and model.runtime is runtime:
                return model
        raise ConfigError("Accelerator: these are parameters of a GeminiDDP that was not passed to prepare()")

    # ---------------------------------------------------------------- checkpoints

    def save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Save as accelerate does, with a checkpoint of each engine and its optimizer in `gemini_N`.

        Args:
            output_dir: as in accelerate.
            *args: as in accelerate.
            **kwargs: as in accelerate.

        Returns:
            As in accelerate.
        """

        def save(models: Any, weights: Any, directory: str) -> None:
            for place, engine in _places(engines, directory):
                engine.save_checkpoint(place, keep_last=1)

        with self._without_engines() as engines:
            hook = self.register_save_state_pre_hook(save)
            try:
                return super().save_state(output_dir, *args, **kwargs)
            finally:
                hook.remove()

    def load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Load what `save_state` has saved, into engines prepared in the same order.

        Args:
            input_dir: as in accelerate.
            *args: as in accelerate.
            **kwargs: as in accelerate.
        """

        def load(models: Any, directory: str) -> None:
            for place, engine in _places(engines, directory):
                engine.load_checkpoint(place)

        with self._without_engines() as engines:
            hook = self.register_load_state_pre_hook(load)
            try:
                super().load_state(input_dir, *args, **kwargs)
            finally:
                hook.remove()

    @contextmanager
    def _without_engines(self) -> Iterator[list[GeminiDDP]]:
        """Hide engines and their optimizers from accelerate, which would gather all of them in memory."""
        models, optimizers = self._models, self._optimizers
        self._models = [model for model in models if not isinstance(model, GeminiDDP)]
        self._optimizers = [each for each in optimizers if not isinstance(each, _PreparedHybridAdam)]
        try:
            yield [model for model in models if isinstance(model, GeminiDDP)]
        finally:
            self._models, self._optimizers = models, optimizers


overrides.check_overrides(
    GeminiAccelerator,
    accelerate.Accelerator,
    added={"_refuse_double_work", "_check_engine", "_engine_of", "_without_engines"},
)


def _places(engines: list[GeminiDDP], directory: str | os.PathLike[str]) -> Iterator[tuple[Path, GeminiDDP]]:
    return ((Path(directory) / f"gemini_{number}", engine) for number, engine in enumerate(engines))


class _PreparedHybridAdam(AcceleratedOptimizer):
    """accelerate's wrapper; reports skipped steps of HybridAdam to schedulers."""

    @property
    def step_was_skipped(self) -> bool:
        norm = self.optimizer.last_grad_norm
        return norm is not None and not math.isfinite(norm)


overrides.check_overrides(_PreparedHybridAdam, AcceleratedOptimizer)
