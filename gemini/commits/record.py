"""The record of a commit: the update of each chunk, and the small remainder of a run's state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from gemini.kernels.adam_tile import AdamHyper, AdamSegment
from gemini.update.job import PlannedUpdate

__all__ = ["CommittedStep", "decode_record", "encode_record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedStep:
    """A record's content."""

    num_steps: int
    """Optimizer steps that have been taken, this one included."""
    planned: Mapping[int, PlannedUpdate]
    """Update of each chunk's home, in the home's coordinates, by chunk id."""
    run_state: bytes
    """As gemini.checkpoint.run_state encodes it."""


def encode_record(step: CommittedStep) -> bytes:
    """Encode a step: a line of JSON, whose numbers are exact, and then the run's state."""
    hypers: dict[AdamHyper, int] = {}
    planned = [
        [
            chunk_id,
            update.grad_scale,
            [[s.begin, s.end, s.step, hypers.setdefault(s.hyper, len(hypers))] for s in update.segments],
        ]
        for chunk_id, update in step.planned.items()
    ]
    fields = {"num_steps": step.num_steps, "hypers": [dataclasses.asdict(hyper) for hyper in hypers], "wishes": planned}
    return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode() + b"\n" + step.run_state


def decode_record(content: bytes) -> CommittedStep:
    """Decode what `encode_record` has encoded."""
    line, _, run_state = content.partition(b"\n")
    fields = json.loads(line)
    hypers = [AdamHyper(**hyper) for hyper in fields["hypers"]]
    planned = {
        chunk_id: PlannedUpdate(
            tuple(AdamSegment(begin=b, end=e, hyper=hypers[h], step=step) for b, e, step, h in segments), grad_scale
        )
        for chunk_id, grad_scale, segments in fields["wishes"]
    }
    return CommittedStep(num_steps=fields["num_steps"], planned=planned, run_state=run_state)
