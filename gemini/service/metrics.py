"""The service's state as Prometheus metrics, collected on request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gemini.service.history import History

if TYPE_CHECKING:
    from prometheus_client import Metric

    from gemini.service.node_service import NodeService

__all__ = ["ServiceCollector"]


class ServiceCollector(Collector):
    """All metrics of one service.

    Args:
        service: the service to report.
        history: its history, which knows the drive.
    """

    def __init__(self, service: NodeService, history: History) -> None:
        self._service, self._history = service, history

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now."""
        yield from self._memory()
        yield from self._jobs()
        leases = self._service.leases
        yield CounterMetricFamily("gemini_leases_granted", "Leases granted.", value=leases.num_granted)
        yield CounterMetricFamily("gemini_messages_received", "Messages of clients.", value=self._service.num_messages)
        yield CounterMetricFamily(
            "gemini_connections_refused", "Connections ended because of a message.", value=self._service.num_malformed
        )
        moved = self._history.drive_nbytes()
        if moved is not None:
            drive = CounterMetricFamily(
                "gemini_drive_bytes", "Bytes that all programs moved since the service began.", labels=["direction"]
            )
            drive.add_metric(["read"], moved[0])
            drive.add_metric(["written"], moved[1])
            yield drive

    def _memory(self) -> Iterator[Metric]:
        budget = GaugeMetricFamily("gemini_budget_bytes", "Bytes that may be granted.", labels=["tier"])
        held = GaugeMetricFamily("gemini_held_bytes", "Bytes that are taken.", labels=["tier", "purpose"])
        administration = self._service.administration
        for name, tier in (("host", administration.host_state()), ("disk", administration.disk_state())):
            budget.add_metric([name], tier.total)
            for purpose in ("leased", "kept", "shared", "warm"):
                held.add_metric([name, purpose], getattr(tier, purpose))
        yield budget
        yield held

    def _jobs(self) -> Iterator[Metric]:
        ranks = GaugeMetricFamily("gemini_ranks", "Ranks of jobs.", labels=["state"])
        leased = GaugeMetricFamily("gemini_job_bytes", "Bytes leased to a job.", labels=["user", "job", "tier"])
        rows = self._service.administration.member_rows()
        for state in ("idle", "waiting", "running", "kept", "lost"):
            ranks.add_metric([state], sum(row.state == state for row in rows))
        for user, job in sorted({(row.user, row.job) for row in rows}):
            own = [row for row in rows if (row.user, row.job) == (user, job)]
            leased.add_metric([str(user), job, "host"], sum(row.host_nbytes for row in own))
            leased.add_metric([str(user), job, "disk"], sum(row.disk_nbytes for row in own))
        yield ranks
        yield leased
        chunks = GaugeMetricFamily("gemini_shared_chunks", "Shared chunks.")
        chunks.add_metric([], len(self._service.ledger.shared.holds))
        yield chunks
