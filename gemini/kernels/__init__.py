"""Arithmetic on optimizer state: native CPU kernels and the worker pool that runs them."""

from gemini.kernels.adam_tile import (
    AdamHyper,
    AdamSegment,
    AdamTile,
    SegmentFactors,
    StateFormat,
    segment_factors,
    state_format_of,
)
from gemini.kernels.cpu import (
    GradMode,
    Isa,
    adam_update,
    cast,
    join_master,
    resolve_isa,
    split_master,
    store_gradient,
    supported_isas,
)
from gemini.kernels.journal import TileJournal
from gemini.kernels.pool import BACKGROUND_PRIORITY, GradTicket, SweepTicket, Ticket, WorkerPool

__all__ = [
    "BACKGROUND_PRIORITY",
    "AdamHyper",
    "AdamSegment",
    "AdamTile",
    "GradMode",
    "GradTicket",
    "Isa",
    "SegmentFactors",
    "StateFormat",
    "SweepTicket",
    "Ticket",
    "TileJournal",
    "WorkerPool",
    "adam_update",
    "cast",
    "join_master",
    "resolve_isa",
    "segment_factors",
    "split_master",
    "state_format_of",
    "store_gradient",
    "supported_isas",
]
