"""Steps that change nothing because their gradients are not finite, and when there have been too many of them."""

from __future__ import annotations

import logging

from gemini.autograd.loss_scale import MIN_SCALE, LossScaler
from gemini.errors import SkippedStepsError

__all__ = ["SkippedSteps"]

logger = logging.getLogger(__name__)

_CAUSES = (
    "a gradient is infinite or NaN, most often because the learning rate is too high, the loss overflows or a "
    "batch is bad (NaN in it, no labels), or, rarely, because the loss reads weights outside the model's forward"
)
_SKIPPED = "skipped an optimizer step; nothing was changed: %s (further skips are counted, not printed)"


class SkippedSteps:
    """Counts steps that were skipped one after another.

    While a loss scale can still fall, a skip is how the scale is found and says nothing of the model: such skips are
    not counted.

    Args:
        scaler: of the loss; None: there is none.
        most_in_a_row: how many may follow one another; None: any number.
    """

    def __init__(self, scaler: LossScaler | None, *, most_in_a_row: int | None) -> None:
        self._num_in_a_row = 0
        self._has_warned = False
        self._scaler = scaler
        self._most_in_a_row = most_in_a_row

    def note_taken(self) -> None:
        """Note that a step has been taken."""
        self._num_in_a_row = 0

    def note_skipped(self) -> None:
        """Note that a step is skipped, and say so; lowers the loss scale."""
        scaler = self._scaler
        if scaler is not None and scaler.scale > MIN_SCALE:
            logger.info("step skipped: the gradients overflow; the loss scale falls from %g", scaler.scale)
        else:
            self._num_in_a_row += 1
            level = logging.DEBUG if self._has_warned else logging.WARNING
            self._has_warned = True
            logger.log(level, _SKIPPED, _CAUSES)
        if scaler is not None:
            scaler.update(found_overflow=True)

    def check(self) -> None:
        """Raise SkippedStepsError if too many steps in a row have been skipped."""
        if self._most_in_a_row is not None and self._num_in_a_row >= self._most_in_a_row:
            raise SkippedStepsError(
                f"the last {self._num_in_a_row} steps were skipped one after another and nothing has changed since: "
                f"{_CAUSES}. Lower the learning rate or warm it up, look at the loss and the batches "
                "(torch.autograd.detect_anomaly names the operation), or allow more with "
                "GeminiConfig(max_skipped_steps=...); None never stops"
            )
