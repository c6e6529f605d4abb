"""The node's memory service: what a step costs with it, how soon a job begins, and leases granted a second.

A *lease* here is granted and given back, in order, as fast as a client can. Beside it stands the ceiling: as many
packets to and fro between as many clients and a process that does nothing but answer, over the same kind of socket.
Clients are processes of up to 16 threads each, a connection a thread. `messages_per_held_lease` is what a client and
the service say to each other while a lease is held for a second. Steps and beginnings are service_engine.py's; `ratio`
is a median over that of the engine alone, or of beginning from the drive.

    python benchmarks/service.py [--clients 1 64] [--seconds 2] [--passes 3] [--steps 8] [--json PATH]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from results_file import spread_of, write_results
from service_engine import measure_beginnings, measure_steps

from gemini.errors import ServiceError
from gemini.service import ServiceClient

COLUMNS = [
    "system",
    "what",
    "clients",
    "per_s",
    "per_s_min",
    "per_s_max",
    "median_ms",
    "p99_ms",
    "ratio",
    "messages_per_step",
]
THREADS = 16
REQUEST_NBYTES = 80
"""About the length of a request for a lease."""


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64], help="clients at once")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    parser.add_argument("--passes", type=int, default=3, help="times that each turn comes")
    parser.add_argument("--steps", type=int, default=8, help="timed of each engine; 0 leaves engines out")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    figures: dict[tuple[str, str, int], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name, echoing(Path(name) / "echo"), serving(Path(name)) as address:
        turns: list[tuple[str, str, Callable[[str, float], list[float]], str]] = [
            ("ceiling", "packet there and back, twice", exchange_packets, str(Path(name) / "echo")),
            ("gemini", "lease of host memory", take_host_leases, address),
            ("gemini", "lease of 1 MiB of disk", take_disk_leases, address),
            ("gemini", "attach and leave", attach, address),
        ]
        for _ in range(arguments.passes):
            for num_clients in arguments.clients:
                for system, what, act, place in turns:
                    seconds = run_clients(act, place, num_clients, arguments.seconds)
                    figures.setdefault((system, what, num_clients), []).append(seconds)
        held = messages_per_held_lease(address)
    rows = [row_of(*which, passes, arguments.seconds) for which, passes in figures.items()]
    if arguments.steps:
        with tempfile.TemporaryDirectory() as name, serving(Path(name), host="16GiB") as address:
            rows += measure_steps(address, arguments.steps)
            rows += measure_beginnings(address, arguments.passes)
    settings = {
        "seconds": arguments.seconds,
        "passes": arguments.passes,
        "steps": arguments.steps,
        "messages_per_held_lease": held,
    }
    write_results(arguments.json, rows, COLUMNS, settings=settings)
    print(f"\nmessages while a lease is held for a second: {held}")


def row_of(system: str, what: str, num_clients: int, passes: list[list[float]], seconds: float) -> dict[str, Any]:
    """Return the row of one kind of turn: rates of all clients together, and times of a single one."""
    everything = sorted(each for one in passes for each in one)
    return {
        "system": system,
        "what": what,
        "clients": num_clients,
        **spread_of([len(one) / seconds for one in passes], "per_s"),
        "median_ms": statistics.median(everything) * 1e3,
        "p99_ms": everything[int(len(everything) * 0.99)] * 1e3,
    }


# What a client does, again and again, each time returning the seconds of it


def exchange_packets(place: str, seconds: float) -> list[float]:
    """Say as much as a lease does to somebody who only answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connected:
        connected.connect(place)

        def there_and_back() -> None:
            for _ in range(2):
                connected.send(bytes(REQUEST_NBYTES))
                connected.recv(REQUEST_NBYTES)

        return repeat(there_and_back, seconds)


def take_host_leases(address: str, seconds: float) -> list[float]:
    """Lease host memory and give it back."""
    with ServiceClient.connect(address, job=unique_name()) as client:
        return repeat(lambda: client.lease(1 << 20, 0).end(), seconds)


def take_disk_leases(address: str, seconds: float) -> list[float]:
    """Lease a file and give it back."""
    with ServiceClient.connect(address, job=unique_name()) as client:
        return repeat(lambda: client.lease(0, 1 << 20).end(), seconds)


def attach(address: str, seconds: float) -> list[float]:
    """Connect, say who it is, and leave."""
    name = unique_name()
    return repeat(lambda: ServiceClient.connect(address, job=name).close(), seconds)


def unique_name() -> str:
    """Return a name that no other client has."""
    return f"job-{os.getpid()}-{threading.get_ident()}"


def repeat(act: Callable[[], object], seconds: float) -> list[float]:
    """Return how long each time took that began within so many seconds."""
    times = []
    until_s = time.perf_counter() + seconds
    while (begin_s := time.perf_counter()) < until_s:
        act()
        times.append(time.perf_counter() - begin_s)
    return times


def messages_per_held_lease(address: str) -> int:
    """Return what is said while a lease is held for a second."""
    with ServiceClient.connect(address, job="holds") as client, client.lease(1 << 20, 1 << 20):
        before = client.num_messages
        time.sleep(1)
        return client.num_messages - before


# Processes


def run_clients(act: Callable[[str, float], list[float]], place: str, num_clients: int, seconds: float) -> list[float]:
    """Return the times of so many clients at once."""
    num_processes = -(-num_clients // THREADS)
    shares = [num_clients // num_processes + (number < num_clients % num_processes) for number in range(num_processes)]
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[float]] = context.Queue()
    processes = [context.Process(target=run_threads, args=(act, place, share, seconds, queue)) for share in shares]
    for process in processes:
        process.start()
    times = [each for _ in processes for each in queue.get()]
    for process in processes:
        process.join()
    return times


def run_threads(
    act: Callable[[str, float], list[float]],
    place: str,
    num_threads: int,
    seconds: float,
    queue: multiprocessing.Queue[list[float]],
) -> None:
    """Put the times of so many threads at once into the queue."""
    times: list[float] = []
    threads = [threading.Thread(target=lambda: times.extend(act(place, seconds))) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put(times)


@contextmanager
def serving(directory: Path, *, host: str = "1GiB") -> Iterator[str]:
    """Run the service; yield its address."""
    path, disk = directory / "socket", directory / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "gemini", "serve", "--host-budget", host, "--nvme", f"{disk}:1GiB"]
    service = subprocess.Popen([*command, "--socket", str(path)], stderr=subprocess.DEVNULL)
    address = f"unix:{path}"
    try:
        for _ in range(500):
            try:
                ServiceClient.connect(address, job="first").close()
                break
            except ServiceError:
                time.sleep(0.02)
        yield address
    finally:
        service.terminate()
        service.wait()


@contextmanager
def echoing(path: Path) -> Iterator[None]:
    """Run a process that answers each packet with itself."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(512)
    process = multiprocessing.get_context("fork").Process(target=echo, args=(listener,), daemon=True)
    process.start()
    listener.close()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def echo(listener: socket.socket) -> None:
    """Answer whoever connects."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                connected = key.fileobj
                assert isinstance(connected, socket.socket)
                packet = connected.recv(REQUEST_NBYTES)
                if packet:
                    connected.send(packet)
                else:
                    selector.unregister(connected)
                    connected.close()


if __name__ == "__main__":
    main()
