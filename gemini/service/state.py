"""The objects that the parts of a running service share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gemini.service.lease_desk import LeaseDesk
from gemini.service.ledger import NodeLedger
from gemini.service.session import Session
from gemini.service.shared_shelf import SharedShelf

__all__ = ["ServiceState"]


@dataclass(slots=True, kw_only=True)
class ServiceState:
    """What is granted, who holds it, and who waits."""

    ledger: NodeLedger
    desk: LeaseDesk
    shelf: SharedShelf
    sessions: set[Session] = field(default_factory=set)
    started_s: float = field(default_factory=time.monotonic)
    """Start of the service, by time.monotonic, in seconds."""
