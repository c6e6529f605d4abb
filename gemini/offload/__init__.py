"""Transport of bytes between host memory, the disk and the device."""

from gemini.offload.disk_offloader import DiskOffloader

__all__ = ["DiskOffloader"]
