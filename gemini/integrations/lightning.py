"""Lightning: a Strategy that trains a LightningModule through a GeminiDDP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemini.config import GeminiConfig
from gemini.ddp import GeminiDDP
from gemini.errors import ConfigError, MissingLibraryError
from gemini.integrations import overrides
from gemini.integrations.random_numbers import unchanged_random_numbers
from gemini.offload.resources import device_of
from gemini.optimizer import HybridAdam

try:
    from lightning.pytorch import callbacks
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.strategies import SingleDeviceStrategy
except ImportError as error:
    raise MissingLibraryError(f"{__name__} needs lightning (pip install lightning): {error}") from error

__all__ = ["GeminiStrategy"]

_CHECKPOINT_NAME = "gemini"
_REST_NAME = "lightning.ckpt"


class GeminiStrategy(SingleDeviceStrategy):
    """Trains on one device through a GeminiDDP: `Trainer(strategy=GeminiStrategy(config))`.

    `configure_optimizers` returns a HybridAdam over `self.parameters()`, with or without a scheduler. A checkpoint is a
    directory: the engine's own, streamed, and Lightning's small rest; with only weights it is the usual file.

    Args:
        config: budgets and choices; None: defaults.

    Attributes:
        engine: built when training or evaluation begins; None before. Its `close()` frees memory and disk.
    """

    strategy_name = "gemini"

    def __init__(self, config: GeminiConfig | None = None) -> None:
        self._config = config or GeminiConfig()
        self.engine: GeminiDDP | None = None
        self._precision = _GeminiPrecision(self)
        device = device_of(self._config)
        super().__init__(device=device if isinstance(device, torch.device) else "cpu")  # a simulated one is memory

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's plugin for casts and clipping: casts nothing, clips through the engine."""
        return self._precision

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and type(plugin) is not Precision:
            raise ConfigError(
                f'Trainer.precision: expected "32-true", the default, got {plugin.precision!r}: the engine has its own '
                "working dtype and float32 masters; set it with GeminiConfig(dtype=...)"
            )

    # ---------------------------------------------------------------- preparing

    def setup(self, trainer: Any) -> None:
        """Build the engine and, for training, the optimizer.

        Args:
            trainer: Lightning's trainer.

        Raises:
            ConfigError: the module or a callback does something that an engine does not support.
        """
        if trainer.training:
            _check_training(trainer)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Leave the module where it is; the engine moves it."""
        self.lightning_module._device = self.root_device

    def _setup_model(self, model: torch.nn.Module) -> GeminiDDP:
        if self.engine is None or self.engine.module is not model:
            self.engine = GeminiDDP(model, self._config)
        return self.engine

    def setup_optimizers(self, trainer: Any) -> None:
        """Have the module build its optimizer.

        Args:
            trainer: Lightning's trainer.

        Raises:
            ConfigError: the module does not build exactly one HybridAdam.
        """
        super().setup_optimizers(trainer)
        names = [type(optimizer).__name__ for optimizer in self.optimizers]
        if len(self.optimizers) != 1 or not isinstance(self.optimizers[0], HybridAdam):
            raise ConfigError(
                f"LightningModule.configure_optimizers: expected one HybridAdam over self.parameters(), got {names}"
            )

    def teardown(self) -> None:
        """End a run; the engine and its weights stay."""
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # ---------------------------------------------------------------- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether the engine must exist before a checkpoint is loaded; it must."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return an empty dictionary: the engine's checkpoint has the weights."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return an empty dictionary: the engine's checkpoint has the optimizer's state.

        Args:
            optimizer: the HybridAdam.

        Returns:
            An empty dictionary.
        """
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a directory, or a file if only weights are wanted.

        Args:
            checkpoint: Lightning's own part.
            filepath: path to save to.
            storage_options: as in Lightning.
        """
        assert self.engine is not None
        path = Path(filepath)
        if "optimizer_states" not in checkpoint:
            checkpoint["state_dict"] = self.engine.state_dict()
        else:
            path.mkdir(parents=True, exist_ok=True)
            self.engine.save_checkpoint(path / _CHECKPOINT_NAME, keep_last=1)
            path = path / _REST_NAME
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a directory that `save_checkpoint` wrote, or a file of Lightning.

        Args:
            checkpoint_path: the directory or file.
            weights_only: as in Lightning, for the file.

        Returns:
            Lightning's own part.
        """
        path = Path(checkpoint_path)
        if path.is_dir():
            assert self.engine is not None
            with unchanged_random_numbers():
                self.engine.load_checkpoint(path / _CHECKPOINT_NAME)
            path = path / _REST_NAME
        checkpoint: dict[str, Any] = super().load_checkpoint(path, weights_only)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of a Lightning file; those of a directory are already loaded.

        Args:
            checkpoint: Lightning's own part.
            strict: whether names must match exactly.
        """
        assert self.engine is not None
        if checkpoint["state_dict"]:
            self.engine.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state of an AdamW from a Lightning file; that of a directory is already loaded.

        Args:
            checkpoint: Lightning's own part.
        """
        (state,) = checkpoint["optimizer_states"]
        if state:
            self.optimizers[0].load_state_dict(state)


overrides.check_overrides(GeminiStrategy, SingleDeviceStrategy)


def _check_training(trainer: Any) -> None:
    """Refuse loops in which backward runs inside forward, and callbacks that read or write weights themselves."""
    if not trainer.lightning_module.automatic_optimization:
        raise ConfigError(
            "LightningModule.automatic_optimization: expected True: training_step is the engine's forward, and "
            "backward and the optimizer's step cannot run inside it; use accumulate_grad_batches and "
            "gradient_clip_val, or GeminiDDP in a plain loop"
        )
    averaging = (callbacks.StochasticWeightAveraging, callbacks.WeightAveraging)
    for callback in trainer.callbacks:
        if isinstance(callback, averaging):
            raise ConfigError(
                f"Trainer.callbacks: {type(callback).__name__} averages the module's weights in place, but "
                "between steps an engine's weights are not in memory: average the result of "
                "engine.master_state_dict()"
            )


class _GeminiPrecision(Precision):
    """Casts nothing, and clips gradients where they wait."""

    def __init__(self, strategy: GeminiStrategy) -> None:
        super().__init__()
        self._strategy = strategy

    def clip_grad_by_norm(self, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        assert self._strategy.engine is not None
        self._strategy.engine.clip_grad_norm_(float(clip_val))

    def clip_grad_by_value(self, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        raise ConfigError(
            'Trainer.gradient_clip_algorithm: expected "norm": gradients of a GeminiDDP are clipped by their norm alone'
        )


overrides.check_overrides(_GeminiPrecision, Precision)
