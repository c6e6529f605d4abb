"""A memory service in a process of its own, and clients in others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from patience import PATIENCE_S, wait_until

from gemini.errors import ServiceError
from gemini.service import ServiceClient
from gemini.service.admin_client import AdminClient
from gemini.service.messages import MemberRow, NodeState

MIB = 1 << 20
ROOT = Path(__file__).parent.parent.parent


def waits_for(client: ServiceClient, host_nbytes: int, **options: Any) -> str:
    """Ask for memory that is not granted; return what the service says is waited for, and withdraw."""

    class Told(Exception):
        pass

    def withdraw(reason: str) -> None:
        raise Told(reason)

    try:
        client.lease(host_nbytes, 0, on_wait=withdraw, **options)
    except Told as told:
        return str(told)
    raise AssertionError("it was granted")


class ServiceProcess:
    """`python -m gemini serve` with a socket, and a disk, in a new directory."""

    def __init__(self, *options: str, host: str = "64MiB", disk: str = "64MiB") -> None:
        # Not pytest's directory: the path of a socket has at most 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="gemini-service-"))
        self.socket = self.directory / "socket"
        self.disk = self.directory / "disk"
        self.disk.mkdir()
        self.log = self.directory / "log"
        self.options = ("--host-budget", host, "--nvme", f"{self.disk}:{disk}", "--drain-timeout", "0.2", *options)
        self.process = self.start()

    @property
    def address(self) -> str:
        return f"unix:{self.socket}"

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gemini", "serve", "--socket", str(self.socket), *self.options, *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log)

        def answers() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text())
            try:
                self.state()
            except ServiceError:
                return False
            return True

        wait_until(answers)
        return self.process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> str:
        """Tell it to end; return what it has logged."""
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        return self.log.read_text()

    def client(self, job: str, **options: int) -> ServiceClient:
        return ServiceClient.connect(self.address, job=job, **options)

    def state(self) -> NodeState:
        with AdminClient(self.socket) as client:
            return client.state()

    def rows(self, job: str) -> list[MemberRow]:
        return [row for row in self.state().members if row.job == job]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.disk.iterdir() if not path.name.startswith("."))

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_nbytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def holds_nothing(self) -> bool:
        state = self.state()
        taken = (state.host.leased, state.host.kept, state.host.shared, state.disk.leased, state.disk.kept)
        return not any(taken) and not state.members and not self.files()

    def close(self) -> None:
        if self.process.poll() is None:
            self.terminate()
        shutil.rmtree(self.directory)


@contextmanager
def running_service(*options: str, **budgets: str) -> Iterator[ServiceProcess]:
    service = ServiceProcess(*options, **budgets)
    try:
        yield service
    finally:
        service.close()


@contextmanager
def client_process(service: ServiceProcess, code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run code in a process with `connect` (a job's name and options to a client); it is killed in the end."""
    opening = (
        "import os, sys, time, mmap, signal\n"
        "from gemini.service import ServiceClient\n"
        f"def connect(job, **options): return ServiceClient.connect({service.address!r}, job=job, **options)\n"
        "def say(*words): print(*words, flush=True)\n"
    )
    command = [sys.executable, "-c", opening + code, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
