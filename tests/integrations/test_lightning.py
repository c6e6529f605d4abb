"""Lightning's Trainer over an engine trains, saves and resumes as on a single device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import HF_CASES
from trainer_runs import Texts, is_close
from training_harness import config_for, distance, hybrid_adam, plain_adamw, same_bits

from gemini import ConfigError

pl = pytest.importorskip("lightning.pytorch")
strategies = pytest.importorskip("gemini.integrations.lightning")

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, about a call of Lightning's


class Module(pl.LightningModule):
    def __init__(self, make_optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.model = HF_CASES["gpt2"].model()
        self.make_optimizer = make_optimizer
        self.losses: list[float] = []
        self.validation_losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.validation_losses.append(self.model(**batch).loss.item())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(module: Module, strategy: Any, checkpoint: Path | None = None, **fields: Any) -> Any:
    loader = torch.utils.data.DataLoader(Texts(), batch_size=2)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    defaults = {"accelerator": "cpu", "max_epochs": 2, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    trainer = pl.Trainer(strategy=strategy, **dict.fromkeys(quiet, False), **{**defaults, **fields})
    trainer.fit(module, loader, loader, ckpt_path=checkpoint)
    return trainer


def test_losses_are_those_of_a_single_device(tmp_path: Path) -> None:
    expected, found = Module(plain_adamw), Module(hybrid_adam)
    fit(expected, "auto")
    strategy = strategies.GeminiStrategy(config_for("nvme", tmp_path))
    fit(found, strategy)
    assert found.losses[0] == expected.losses[0]
    assert is_close(found.losses, expected.losses)
    assert is_close(found.validation_losses, expected.validation_losses)
    with strategy.engine as engine:
        assert distance(engine.master_state_dict(), expected.state_dict()) < 1e-6
        assert engine.memory_report().nvme_read_nbytes > 0


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    whole, first, second = (Module(hybrid_adam) for _ in range(3))
    with_disk, in_memory = config_for("nvme", tmp_path / "swap"), config_for("host")
    strategy = strategies.GeminiStrategy(in_memory)
    fit(whole, strategy)
    part = strategies.GeminiStrategy(with_disk)
    fit(first, part, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    part.engine.close()
    resumed = strategies.GeminiStrategy(with_disk)
    fit(second, resumed, tmp_path / "one.ckpt")
    assert first.losses + second.losses == whole.losses
    assert same_bits(resumed.engine.master_state_dict(), strategy.engine.master_state_dict())
    for each in (strategy, resumed):
        each.engine.close()


def test_a_file_of_a_single_device_can_be_gone_on_from(tmp_path: Path) -> None:
    plain, found = Module(plain_adamw), Module(hybrid_adam)
    fit(plain, "auto", max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    first = len(plain.losses)
    fit(plain, "auto", tmp_path / "plain.ckpt")
    strategy = strategies.GeminiStrategy(config_for("nvme", tmp_path))
    fit(found, strategy, tmp_path / "plain.ckpt")
    strategy.engine.close()
    assert is_close(found.losses, plain.losses[first:])


def test_weights_alone_are_a_file_that_the_plain_module_loads(tmp_path: Path) -> None:
    module = Module(hybrid_adam)
    strategy = strategies.GeminiStrategy(config_for("nvme", tmp_path))
    fit(module, strategy, max_epochs=1).save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    plain = Module(plain_adamw)
    plain.load_state_dict(torch.load(tmp_path / "weights.ckpt", weights_only=False)["state_dict"])
    with strategy.engine as engine:
        assert same_bits(dict(plain.state_dict()), dict(engine.state_dict()))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one HybridAdam"):
        fit(Module(plain_adamw), strategies.GeminiStrategy(config_for("host")))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true"])
def test_precisions_of_lightnings_are_refused(precision: str) -> None:
    with pytest.raises(ConfigError, match="Trainer.precision"):
        fit(Module(hybrid_adam), strategies.GeminiStrategy(config_for("host")), precision=precision)


def test_clipping_by_value_is_refused() -> None:
    strategy = strategies.GeminiStrategy(config_for("host"))
    with pytest.raises(ConfigError, match="gradient_clip_algorithm"):
        fit(Module(hybrid_adam), strategy, gradient_clip_algorithm="value")


def test_a_loop_of_the_modules_own_is_refused() -> None:
    module = Module(hybrid_adam)
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="LightningModule.automatic_optimization: expected True"):
        fit(module, strategies.GeminiStrategy(config_for("host")), gradient_clip_val=None, accumulate_grad_batches=1)


@pytest.mark.parametrize(
    "callback", [pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-3), pl.callbacks.EMAWeightAveraging()]
)
def test_callbacks_that_average_weights_are_refused(callback: Any) -> None:
    with pytest.raises(ConfigError, match=f"{type(callback).__name__} averages the module's weights"):
        fit(Module(hybrid_adam), strategies.GeminiStrategy(config_for("host")), callbacks=[callback])
