"""Data for the page and the metrics of a service, with a limited history."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from gemini.service.node_service import NodeService

__all__ = ["Drive", "History", "Sample", "drive_of"]

MAX_SAMPLES = 900
"""Number of samples kept: half an hour at one every two seconds."""
SAMPLE_S = 2.0
SECTOR_NBYTES = 512
"""Sector size in /proc/diskstats, whatever the drive's own sector size is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The node's state at one moment."""

    time_s: float
    """Time in seconds since the epoch."""
    host: tuple[int, int, int, int]
    """Bytes leased, kept, shared and unused."""
    disk: tuple[int, int]
    """Bytes leased and kept."""
    read_rate: float
    """Bytes per second read from the drive by all programs."""
    write_rate: float


@dataclass(frozen=True, slots=True)
class Drive:
    """A block device and the kernel's counters for it."""

    major: int
    minor: int

    def counters(self) -> tuple[int, int] | None:
        """Return the bytes read from and written to it since the machine started; None if they are not counted.

        Source: Linux's Documentation/admin-guide/iostats.rst, fields 3 and 7 after the name.
        """
        for line in Path("/proc/diskstats").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if (int(fields[0]), int(fields[1])) == (self.major, self.minor):
                return int(fields[5]) * SECTOR_NBYTES, int(fields[9]) * SECTOR_NBYTES
        return None


def drive_of(directory: Path | None) -> Drive | None:
    """Return the drive that holds a directory; None if the kernel counts none, for example on a network file system."""
    if directory is None:
        return None
    device = directory.stat().st_dev
    drive = Drive(os.major(device), os.minor(device))
    return drive if drive.counters() is not None else None


class History:
    """Samples of a service; the oldest are dropped.

    Args:
        service: the service to sample.
        endurance_nbytes: total bytes the drive is rated for; None: not known.
    """

    def __init__(self, service: NodeService, *, endurance_nbytes: int | None) -> None:
        self.samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self.endurance_nbytes = endurance_nbytes
        self._service = service
        self._drive = drive_of(service.options.disk_directory)
        self._first = self._last = self._drive.counters() if self._drive is not None else None
        self._last_s = time.monotonic()

    def sample(self) -> None:
        """Take one sample."""
        administration, now_s = self._service.administration, time.monotonic()
        host, disk = administration.host_state(), administration.disk_state()
        counters = self._drive.counters() if self._drive is not None else None
        read_rate = write_rate = 0.0
        if counters is not None and self._last is not None and now_s > self._last_s:
            read_rate, write_rate = (
                (now - before) / (now_s - self._last_s) for now, before in zip(counters, self._last, strict=True)
            )
        self._last, self._last_s = counters, now_s
        self.samples.append(
            Sample(
                time_s=time.time(),
                host=(host.leased, host.kept, host.shared, host.warm),
                disk=(disk.leased, disk.kept),
                read_rate=read_rate,
                write_rate=write_rate,
            )
        )

    def drive_nbytes(self) -> tuple[int, int] | None:
        """Return the bytes that all programs read and wrote since the service started; None if not counted."""
        if self._last is None or self._first is None:
            return None
        return self._last[0] - self._first[0], self._last[1] - self._first[1]

    def state(self) -> dict[str, Any]:
        """Return everything that the page shows, in JSON types."""
        service, administration = self._service, self._service.administration
        moved = self.drive_nbytes()
        written = None if moved is None else moved[1]
        wear = None if written is None or self.endurance_nbytes is None else written / self.endurance_nbytes
        state: dict[str, Any] = msgspec.to_builtins(
            {
                "time_s": time.time(),
                "uptime_s": time.monotonic() - service.started_s,
                "is_draining": administration.is_draining,
                "host": administration.host_state(),
                "disk": administration.disk_state(),
                "members": administration.member_rows(),
                "shared": administration.shared_rows(),
                "drive": {"read_nbytes": moved and moved[0], "written_nbytes": written, "wear": wear},
                "samples": list(self.samples),
            }
        )
        return state
