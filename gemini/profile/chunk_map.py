"""The place of each chunk at each moment of a step."""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass

from gemini.profile.description import ChunkDescription
from gemini.profile.events import Moment, Step
from gemini.profile.recording import Recording

__all__ = ["ChunkMap", "Place", "chunk_map", "describe_moment"]


class Place(enum.Enum):
    """State or operation of a chunk's working weights; values are for readers."""

    NVME = "at home on NVMe"
    HOST = "at home in host memory"
    DEVICE = "at home on the device"
    FETCHING = "on its way"
    READY = "in compute memory"
    HELD = "in use"
    UPDATING = "being updated"


_PLACE_OF_STATE = {
    "fetching": Place.FETCHING,
    "ready": Place.READY,
    "held": Place.HELD,
    "leased": Place.HELD,  # as recordings of earlier versions say
    "updating": Place.UPDATING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMap:
    """Places of chunks, by moment."""

    moments: tuple[Moment, ...]
    places: tuple[tuple[Place, ...], ...]
    """Place of each chunk, by chunk id, then by moment."""


def chunk_map(recording: Recording, step: Step) -> ChunkMap:
    """Build the map of one step.

    Args:
        recording: the rank's recording.
        step: a step with details.

    Returns:
        The map; each place holds from just after its moment.
    """
    moments = tuple(moment for moment in recording.moments if step.begin_ns <= moment.at_ns <= step.end_ns)
    times: dict[int, list[int]] = defaultdict(list)
    states: dict[int, list[str]] = defaultdict(list)
    for change in recording.chunk_changes:
        times[change.chunk_id].append(change.at_ns)
        states[change.chunk_id].append(change.state)

    def place(chunk: ChunkDescription, at_ns: int) -> Place:
        position = bisect_right(times[chunk.chunk_id], at_ns) - 1
        state = states[chunk.chunk_id][position] if position >= 0 else ""
        return _PLACE_OF_STATE.get(state) or _home_of(chunk)

    places = tuple(tuple(place(chunk, moment.at_ns) for moment in moments) for chunk in recording.run.chunks)
    return ChunkMap(moments=moments, places=places)


def describe_moment(moment: Moment, units: tuple[str, ...]) -> str:
    """Return a moment's name: "enter transformer.h.3"."""
    if moment.unit_id is None:
        return moment.kind
    name = units[moment.unit_id] or "the model"
    return f"{moment.kind} {name}"


def _home_of(chunk: ChunkDescription) -> Place:
    """Return the place of a chunk that is at home, the tier of most of it."""
    by_tier = chunk.homes["weights"] or {"host": 0}
    return Place[max(by_tier, key=lambda tier: by_tier[tier]).upper()]
