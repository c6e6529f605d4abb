"""The objects that the parts of a running service share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gemini.service.lease_manager import LeaseManager
from gemini.service.ledger import NodeLedger
from gemini.service.session import Session
from gemini.service.shared_chunk_manager import SharedChunkManager

__all__ = ["ServiceState"]


@dataclass(slots=True, kw_only=True)
class ServiceState:
    """What is granted, to which clients, and which clients wait."""

    ledger: NodeLedger
    leases: LeaseManager
    shared_chunks: SharedChunkManager
    sessions: set[Session] = field(default_factory=set)
    started_s: float = field(default_factory=time.monotonic)
    """Start of the service, by time.monotonic, in seconds."""
