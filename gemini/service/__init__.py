"""The node's memory as a service: one process grants host memory and disk to the jobs of a machine.

`python -m gemini serve` is the service, `ServiceClient` a job's side of it. Neither imports torch.
"""

__all__: list[str] = []
