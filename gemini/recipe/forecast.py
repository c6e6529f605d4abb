"""The expected needs of a batch, counted before the model has any memory: operations, activations, seconds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemini.assembly.blueprint import draw_layout
from gemini.config import GeminiConfig
from gemini.ddp import GeminiDDP
from gemini.errors import MissingRateError
from gemini.placement.cost_model import HardwareProfile, StepPrediction
from gemini.planning.rehearsal import Rehearsal, rehearse

__all__ = ["Forecast", "forecast_batch", "predict_engine_step"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Predicted needs of forward and backward of one full batch."""

    flops_per_token: float
    """Operations of matrix products per token, forward and backward, without recomputation."""
    rehearsal: Rehearsal
    """Rehearsal that includes recomputation."""


def forecast_batch(
    model: torch.nn.Module,
    config: GeminiConfig,
    *,
    num_rows: int,
    sequence_length: int,
    save_memory: Callable[[], None],
) -> Forecast | None:
    """Rehearse a batch twice: once plainly, and once as it will be trained on.

    Args:
        model: a causal language model of transformers on the meta device.
        config: the engine's configuration.
        num_rows: number of rows in the batch.
        sequence_length: tokens in each row.
        save_memory: lets the model recompute activations; always called, exactly once.

    Returns:
        The forecast; None if the model's forward needs values, which a rehearsal does not have.
    """

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        token_ids = torch.zeros(num_rows, sequence_length, dtype=torch.int64)
        loss: torch.Tensor = model(input_ids=token_ids, labels=token_ids).loss
        return loss

    def rehearsed() -> Rehearsal | None:
        has_device = config.device is not None and torch.device(config.device).type != "cpu"
        try:
            return rehearse(model, loss_of, config, draw_layout(model, config), has_device=has_device)
        except Exception as error:  # errors of any type from a model's own code; training works without a forecast
            logger.info("no prediction for %s: %s", type(model).__name__, error)
            return None

    plain = rehearsed()
    save_memory()
    trained = rehearsed() if plain is not None else None
    if plain is None or trained is None:
        return None
    flops = plain.work.forward + plain.work.backward
    return Forecast(flops_per_token=flops / (num_rows * sequence_length), rehearsal=trained)


def predict_engine_step(
    engine: GeminiDDP, forecast: Forecast, profile: HardwareProfile, *, num_batches: int
) -> StepPrediction | None:
    """Predict the time of a step under the plan that an engine has chosen.

    Args:
        engine: an engine built from the rehearsed model.
        forecast: the forecast of a batch.
        profile: this machine's rates.
        num_batches: number of batches in a step.

    Returns:
        The prediction; None if the profile lacks a rate, or if the step has several batches: weights then travel again
        for each of them, which the cost model does not know.
    """
    if num_batches != 1:
        return None
    try:
        return engine.memory_report(profile=profile, flops=forecast.rehearsal.work).predicted
    except MissingRateError as error:
        logger.info("no time is predicted: %s", error)
        return None
