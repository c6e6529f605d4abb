"""The head of a recording, written before its first event: the plan in numbers and words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gemini.errors import RecordingError
from gemini.profile.typed import unfit_fields

__all__ = ["ChunkDescription", "Prediction", "RunDescription", "TierDescription"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDescription:
    """One chunk and its homes."""

    chunk_id: int
    name: str
    unit_id: int
    nbytes: int
    """Bytes of the working weights in compute memory."""
    is_trainable: bool
    is_resident: bool
    homes: dict[str, dict[str, int]]
    """Bytes by tier, for each of "weights", "state" and "gradients"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierDescription:
    """One tier and its plan."""

    tier: str
    budget_nbytes: int | None
    """Budget in bytes; None if the tier does not exist or has no limit."""
    planned_nbytes: dict[str, int]
    """Planned bytes by purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The cost model's prediction for a step."""

    step_s: float
    seconds: dict[str, float]
    """Busy seconds of each channel."""
    bottleneck: str
    overlap: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDescription:
    """The run at the recording's beginning."""

    rank: int
    began_ns: int
    """Beginning of the recording, on the events' clock."""
    began_unix_s: float
    compute_tier: str
    dtype: str
    overlap: str
    num_params: int
    num_slots: int
    slot_nbytes: int
    units: tuple[str, ...]
    """Module names by unit id; the first is the model itself, ""."""
    chunks: tuple[ChunkDescription, ...]
    """Chunks by id."""
    tiers: tuple[TierDescription, ...]
    predicted: Prediction | None
    """Predicted time of a step; None without a hardware profile."""
    predicted_activation_nbytes: int | None = None
    """Predicted peak of activations and temporaries in compute memory, from a rehearsal; None without one."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON can write them."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> RunDescription:
        """Read what `to_json` returned.

        Args:
            fields: fields read from JSON; unknown ones are ignored.

        Returns:
            The description.

        Raises:
            RecordingError: a field is missing or has another form.
        """
        try:
            known = {
                field.name: fields[field.name]
                for field in dataclasses.fields(RunDescription)
                if field.name in fields or field.default is dataclasses.MISSING
            }
            known["units"] = tuple(known["units"])
            known["chunks"] = tuple(ChunkDescription(**chunk) for chunk in known["chunks"])
            known["tiers"] = tuple(TierDescription(**tier) for tier in known["tiers"])
            known["predicted"] = None if known["predicted"] is None else Prediction(**known["predicted"])
            run = RunDescription(**known)
        except (KeyError, TypeError) as error:
            raise RecordingError(f"the recording's description is damaged: {error!r}") from error
        unfit = unfit_fields(run)
        if unfit or any(not 0 <= chunk.unit_id < len(run.units) for chunk in run.chunks):
            raise RecordingError(f"the recording's description is damaged: {', '.join(unfit) or 'units'}")
        return run
