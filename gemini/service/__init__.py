"""The node's memory as a service: one process grants host memory and disk to the jobs of a machine.

`python -m gemini serve` is the service, `ServiceClient` a job's side of it. Neither imports torch; both need the extra
`service`.
"""

from gemini.service.client import ServiceClient
from gemini.service.holdings import DiskLease, KeptState, Lease, NodeBudget, SharedChunk

__all__ = ["DiskLease", "KeptState", "Lease", "NodeBudget", "ServiceClient", "SharedChunk"]
