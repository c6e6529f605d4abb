"""Leases between real processes: never more than the budget, and nothing left of the dead."""

from __future__ import annotations

import os
import random
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from patience import PATIENCE_S
from service_process import MIB, client_process, running_service, wait_until, waits_for

from gemini.errors import OutOfTierMemoryError, ServiceError
from gemini.service import ServiceClient

pytestmark = pytest.mark.processes


HOLD = """
client = connect(sys.argv[1])
lease = client.lease(int(sys.argv[2]), int(sys.argv[3]))
say("held")
sys.stdin.read()
"""


def test_the_service_is_small_and_does_not_load_torch(service):
    with open(f"/proc/{service.process.pid}/maps") as maps:
        assert "torch" not in maps.read()
    assert service.resident_nbytes() < 60e6


def test_two_jobs_run_and_the_third_waits_and_then_runs(service):
    sizes = [str(30 * MIB), "0"]
    with (
        client_process(service, HOLD, "first", *sizes) as first,
        client_process(service, HOLD, "second", *sizes) as second,
    ):
        assert first.stdout.readline() == second.stdout.readline() == "held\n"
        with client_process(service, HOLD, "third", *sizes) as third:
            wait_until(lambda: [row.state for row in service.rows("third")] == ["waiting"])
            assert service.rows("third")[0].waits_for == "30.00 MiB of host memory, of which 4.00 MiB are free"
            assert service.state().host.leased == 60 * MIB
            first.kill()
            assert third.stdout.readline() == "held\n"
            assert service.state().host.leased == 60 * MIB


def test_the_budget_holds_while_many_come_and_go(service):
    """Eight clients lease and end at random; the sum of what they know they hold is looked at throughout.

    Once all hold something at the same time.
    """
    held = 0
    most = 0
    lock = threading.Lock()
    all_hold = threading.Barrier(8)

    def come_and_go(number: int) -> None:
        nonlocal held, most
        choose = random.Random(number)
        with service.client(f"job{number}") as client:
            for turn in range(25):
                with client.lease(choose.randrange(40 * MIB) if turn else 6 * MIB, 0) as lease:
                    with lock:
                        held += lease.host_nbytes
                        most = max(most, held)
                    if turn == 0:
                        all_hold.wait(PATIENCE_S)
                    with lock:
                        held -= lease.host_nbytes

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 48 * MIB <= most <= 64 * MIB
    wait_until(service.holds_nothing)


def test_what_can_never_fit_is_refused_with_the_numbers(service):
    with service.client("job") as client, pytest.raises(OutOfTierMemoryError, match="1.00 GiB of host memory and 0 B"):
        client.lease(1 << 30, 0)


def test_ranks_are_granted_together(service):
    with service.client("gang", rank=0, num_ranks=2) as first, service.client("gang", rank=1, num_ranks=2) as second:
        assert waits_for(first, MIB) == "the other ranks of its job, which have not asked yet: 1 of 2"
        with pytest.raises(ServiceError, match=r"not granted within 0\.1 s; it waits for "):
            first.lease(MIB, 0, timeout_s=0.1)
        other = threading.Thread(target=lambda: second.lease(MIB, 0))
        other.start()
        first.lease(MIB, 0, timeout_s=PATIENCE_S)
        other.join()


def test_a_disk_lease_is_a_reserved_file_that_goes_with_it(service):
    with service.client("job") as client:
        lease = client.lease(0, 8 * MIB)
        status = os.fstat(lease.disk.fd)
        assert (status.st_size, status.st_blocks * 512) == (8 * MIB, 8 * MIB)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert service.files() == [lease.disk.path.name]
        os.pwrite(lease.disk.fd, b"bytes", 8 * MIB - 5)
        lease.end()
        wait_until(lambda: service.files() == [])


def test_more_disk_than_the_file_system_has_is_an_error_that_says_so():
    with running_service(disk="500TB") as service, service.client("job") as client:
        with pytest.raises(ServiceError, match="cannot reserve .*: (No space left|File too large)"):
            client.lease(MIB, 400 * 10**12)
        assert service.files() == []
        assert client.budget().host_free == 64 * MIB


def test_the_budget_says_what_is_free_and_what_is_fair(service):
    with service.client("a") as first, service.client("b", num_ranks=2) as second:
        first.lease(48 * MIB, 16 * MIB)
        budget = second.budget()
        assert (budget.host_total, budget.host_free, budget.host_share) == (64 * MIB, 16 * MIB, 16 * MIB)
        assert (budget.disk_total, budget.disk_free) == (64 * MIB, 48 * MIB)


def test_a_rank_does_not_wait_for_another_that_has_ended(service):
    with (
        service.client("gang", rank=0, num_ranks=2) as first,
        service.client("gang", rank=1, num_ranks=2) as second,
        ThreadPoolExecutor() as pool,
    ):
        asked = pool.submit(first.lease, MIB, 0)
        wait_until(lambda: [row.state for row in service.rows("gang")] == ["waiting", "idle"])
        second.close()
        with pytest.raises(ServiceError, match="another rank of the job has ended"):
            asked.result(10)
    assert service.holds_nothing()


def test_one_name_and_rank_is_one_process(service):
    with service.client("job"):
        with pytest.raises(ServiceError, match="rank 0 of job job is this process already: close its engine"):
            service.client("job")
        with pytest.raises(ServiceError, match="job job has 1 ranks here, not 2"):
            service.client("job", rank=1, num_ranks=2)


def test_clients_that_come_and_go_at_once_leave_no_descriptors(service):
    """The end of a connection is noticed by a thread while another closes it."""
    before = len(os.listdir("/proc/self/fd"))

    def come_and_go(number):
        for _ in range(40):
            service.client(f"job{number}").close()

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == before


def test_nobody_answers_where_no_service_is(tmp_path):
    with pytest.raises(ServiceError, match="no memory service answers at unix:.*python -m gemini serve --host-budget"):
        ServiceClient.connect(f"unix:{tmp_path}/none", job="job")


def test_holding_a_lease_sends_no_messages(service):
    with service.client("job") as client:
        client.lease(MIB, MIB)
        before = client.num_messages
        time.sleep(1.5)
        assert client.num_messages == before


def test_ctrl_c_ends_the_waiting_and_withdraws_the_request(service):
    code = """
client = connect("waits")
try: client.lease(60 << 20, 0, on_wait=lambda reason: say("waits"))
except KeyboardInterrupt: say("interrupted")
sys.stdin.read()
"""
    with service.client("holds") as holds:
        holds.lease(30 * MIB, 0)
        with client_process(service, code) as process:
            assert process.stdout.readline() == "waits\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            wait_until(lambda: [row.state for row in service.rows("waits")] == ["idle"])


def test_a_forked_child_holds_nothing_open_and_does_nothing(service):
    code = """
client = connect("parent")
lease = client.lease(1 << 20, 0)
if os.fork() == 0:
    lease.end(); client.close()
    say("child")
sys.stdin.read()
"""
    with client_process(service, code) as process:
        assert process.stdout.readline() == "child\n"
        assert [row.host_nbytes for row in service.rows("parent")] == [MIB]
        process.kill()
        wait_until(service.holds_nothing)


def test_a_process_that_dies_is_noticed_although_another_holds_its_socket_open(service):
    code = """
import ctypes
lease = connect("parent").lease(1 << 20, 0)
if ctypes.CDLL(None).fork():  # Python does not see it, and leaves the child its descriptors
    say("forked")
sys.stdin.read()
"""
    with client_process(service, code) as process:
        assert process.stdout.readline() == "forked\n"
        process.kill()
        wait_until(service.holds_nothing)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_leave_nothing():
    """Each victim leases memory and disk, fills shared chunks and waits, until it is killed."""
    code = """
import random
client = connect(f"victim{sys.argv[1]}")
say("begins")
number = 0
while True:
    number += 1
    key = f"chunk{random.randrange(3)}"
    try:
        with client.lease(random.randrange(20 << 20), random.randrange(1, 20 << 20), shared={key: 1 << 20}) as lease:
            with client.shared(key, 1 << 20) as chunk:
                if not chunk.is_filled:
                    os.pwrite(chunk.fd, b"x" * (1 << 20), 0)
                    chunk.fill_done(key)
            client.release_shared(chunk)
    except MemoryError: pass
    say(number)
"""

    def holds_nothing():
        return service.holds_nothing() and not service.state().shared

    choose = random.Random(7)
    with running_service("--warm", "0") as service:
        with client_process(service, code, "first") as process:  # descriptors that stay are open after it
            assert process.stdout.readline() == "begins\n"
            for number in range(1, 31):
                assert process.stdout.readline() == f"{number}\n"
        wait_until(holds_nothing)
        before = service.num_descriptors()
        for round_ in range(10):
            with ExitStack() as stack:
                victims = [client_process(service, code, f"{round_}-{number}") for number in range(5)]
                processes = [stack.enter_context(victim) for victim in victims]
                for process in processes:
                    assert process.stdout.readline() == "begins\n"
                for process in choose.sample(processes, 5):
                    for _ in range(choose.randrange(4)):
                        assert process.stdout.readline()
                    process.kill()
        wait_until(holds_nothing)
        wait_until(lambda: service.num_descriptors() <= before)
        assert service.process.poll() is None
        assert "Traceback" not in service.log.read_text()
