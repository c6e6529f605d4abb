"""How bytes travel: host memory, the disk, the device, and the ways between them."""

from gemini.offload.disk_offloader import DiskOffloader

__all__ = ["DiskOffloader"]
