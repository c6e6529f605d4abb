"""The service's death: clients work on, and the next service counts what they hold before it grants anything."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
from patience import PATIENCE_S
from service_process import MIB, ROOT, ServiceProcess, client_process, wait_until, waits_for

from gemini.errors import ServiceError

pytestmark = pytest.mark.processes


def kill_and_start(service: ServiceProcess, *options: str) -> None:
    service.kill()
    service.start(*options)


def test_a_client_works_on_and_tells_the_next_service_what_it_holds(service, caplog):
    caplog.set_level(logging.WARNING)
    with service.client("job") as client:
        lease = client.lease(30 * MIB, 8 * MIB)
        kept = lease.keep_file(MIB)
        chunk = client.shared("weights", MIB)
        chunk.fill_done("digest")
        service.kill()
        wait_until(lambda: not client.is_connected)
        os.pwrite(kept, b"state", 0)
        os.pwrite(lease.disk.fd, b"more", 0)
        lease.set_meta(b"step 8")
        with pytest.raises(ServiceError, match="is gone; reconnecting every second"):
            client.budget()
        service.start()
        wait_until(lambda: client.is_connected)
        (row,) = service.rows("job")
        assert (row.state, row.host_nbytes, row.disk_nbytes) == ("running", 30 * MIB, 8 * MIB)
        assert row.shared_nbytes == MIB
        client.close(keep=True)
    with service.client("job") as client:
        taken = client.take_kept()
        assert taken.meta == b"step 8"
        assert os.pread(taken.fd, 5, 0) + os.pread(taken.lease.disk.fd, 4, 0) == b"statemore"
        assert client.shared("weights", MIB).is_filled
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    assert f"the memory service at {service.address} is gone" in warned[0]
    assert f"the memory service at {service.address} is back" in warned[1]


def test_nobody_gets_what_a_client_holds_that_has_not_come_back_yet(service):
    code = 'lease = connect("stopped").lease(40 << 20, 0); say("held"); sys.stdin.read()'
    with client_process(service, code) as process:
        assert process.stdout.readline() == "held\n"
        os.kill(process.pid, signal.SIGSTOP)  # it cannot come back
        kill_and_start(service)
        assert [(row.state, row.host_nbytes) for row in service.rows("stopped")] == [("lost", 40 * MIB)]
        with service.client("new") as client:
            assert "of which 24.00 MiB are free" in waits_for(client, 30 * MIB)
            os.kill(process.pid, signal.SIGCONT)
            wait_until(lambda: [row.state for row in service.rows("stopped")] == ["running"])
            process.kill()
            client.lease(64 * MIB, 0, timeout_s=PATIENCE_S)


def test_shared_chunks_of_clients_that_have_not_come_back_are_counted_and_not_filled_twice(service):
    code = """
client = connect("stopped")
chunk = client.shared("weights", 40 << 20)
chunk.fill_done("digest")
say("filled")
sys.stdin.read()
"""
    found = []
    with client_process(service, code) as process, service.client("new") as client:
        assert process.stdout.readline() == "filled\n"
        os.kill(process.pid, signal.SIGSTOP)
        kill_and_start(service)
        wait_until(lambda: client.is_connected)
        assert "of which 24.00 MiB are free" in waits_for(client, 30 * MIB)
        finding = threading.Thread(target=lambda: found.append(client.shared("weights", 40 * MIB)))
        before = client.num_messages
        finding.start()
        wait_until(lambda: client.num_messages > before)
        os.kill(process.pid, signal.SIGCONT)
        finding.join(PATIENCE_S)
        assert found[0].is_filled
        assert service.state().host.shared == 40 * MIB
        assert service.state().host.leased == 0


def test_shared_chunks_of_clients_that_died_meanwhile_are_free(service):
    with service.client("new") as client:
        code = 'connect("dies").shared("weights", 40 << 20).fill_done("digest"); say("filled"); sys.stdin.read()'
        with client_process(service, code) as process:
            assert process.stdout.readline() == "filled\n"
            service.kill()
            process.kill()
            process.wait()
        service.start()
        client.lease(64 * MIB, 0, timeout_s=PATIENCE_S)


def test_what_clients_held_that_died_meanwhile_is_freed_with_its_files(service):
    code = 'lease = connect("dies").lease(40 << 20, 1 << 20); say("held"); sys.stdin.read()'
    with client_process(service, code) as process:
        assert process.stdout.readline() == "held\n"
        service.kill()
        assert len(service.files()) == 1
        process.kill()
        process.wait()
        service.start()
        wait_until(service.holds_nothing)


def test_files_that_nobody_knows_of_count_until_the_grace_is_over(service):
    service.kill()
    (service.disk / "gemini-lease-0-0123456789abcdef.swap").write_bytes(bytes(MIB))
    (service.disk / "of-somebody-else").write_bytes(b"x")
    service.start("--grace", "600")
    assert service.state().disk.leased == MIB
    assert len(service.files()) == 2
    kill_and_start(service, "--grace", "0")
    wait_until(lambda: service.files() == ["of-somebody-else"])
    assert service.state().disk.leased == 0


def test_a_smaller_budget_grants_nothing_until_leases_fit(service):
    with service.client("old") as old:
        lease = old.lease(50 * MIB, 0)
        service.kill()
        service.start("--host-budget", "32MiB")
        wait_until(lambda: old.is_connected)
        with service.client("new") as new:
            assert waits_for(new, MIB)
            lease.end()
            new.lease(MIB, 0, timeout_s=PATIENCE_S)


def test_who_waits_for_a_lease_waits_on_at_the_next_service(service):
    with service.client("holds") as holds, service.client("waits") as waits:
        lease = holds.lease(40 * MIB, 0)
        granted = []
        waiting = threading.Thread(target=lambda: granted.append(waits.lease(40 * MIB, 0)))
        waiting.start()
        wait_until(lambda: [row.state for row in service.rows("waits")] == ["waiting"])
        kill_and_start(service)
        wait_until(lambda: [row.state for row in service.rows("waits")] == ["waiting"])
        lease.end()
        waiting.join(PATIENCE_S)
        assert granted[0].host_nbytes == 40 * MIB


def test_what_is_given_back_while_no_service_is_there_is_free_at_the_next(service):
    with service.client("job") as client:
        leases = [client.lease(20 * MIB, MIB) for _ in range(2)]
        service.kill()
        wait_until(lambda: not client.is_connected)
        leases[0].end()
        service.start()
        wait_until(lambda: client.is_connected)
        wait_until(lambda: [row.host_nbytes for row in service.rows("job")] == [20 * MIB])
        assert service.files() == [leases[1].disk.path.name]


def test_a_lease_nobody_granted_is_not_adopted(service):
    """A client that makes up a larger lease is told so, and what it had counts as before, until it has told all."""
    with service.client("job") as client:
        lease = client.lease(MIB, MIB)
        service.kill()
        lease.host_nbytes = 60 * MIB
        service.start()
        wait_until(lambda: client.is_connected)
        assert [row.host_nbytes for row in service.rows("job")] == [0]


def test_a_manifest_that_cannot_be_read_is_no_manifest(service):
    with service.client("job") as client:
        client.lease(MIB, MIB)
        manifest = service.directory / "socket.manifest"
        wait_until(lambda: len(json.loads(manifest.read_text())["leases"]) == 1)
        service.kill()
        manifest.write_bytes(b"\x00\xffrubbish")
        service.start()
        wait_until(lambda: [row.disk_nbytes for row in service.rows("job")] == [MIB])


def test_one_service_at_a_time_has_a_socket_and_a_directory(service):
    for socket, lock in ((service.socket, "socket.lock"), (service.directory / "other", "disk/.gemini-service.lock")):
        command = [sys.executable, "-m", "gemini", "serve", "--socket", str(socket), *service.options]
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert refused.returncode == 2
        assert f"{lock} is locked: another service uses it" in refused.stderr


@pytest.mark.quick_cases(1)
def test_training_survives_kills_of_the_service_under_load(service):
    """Six clients work in shared and leased memory and the service is killed five times; their bytes stay right."""
    code = """
client = connect(f"worker{sys.argv[1]}")
lease = client.lease(4 << 20, 1 << 20, shared={"weights": 1 << 20})
with client.shared("weights", 1 << 20) as chunk:
    if not chunk.is_filled:
        os.pwrite(chunk.fd, b"w" * (1 << 20), 0)
        chunk.fill_done("digest")
kept = mmap.mmap(lease.keep_file(1 << 20), 1 << 20)
weights = mmap.mmap(chunk.fd, 1 << 20, prot=mmap.PROT_READ)
say("begins")
step = 0
while step < 30 or not os.path.exists(sys.argv[2]):
    step += 1
    kept[:8] = step.to_bytes(8, "little")
    os.pwrite(lease.disk.fd, kept[:8], 0)
    assert os.pread(lease.disk.fd, 8, 0) == kept[:8]
    assert weights[step % (1 << 20)] == ord("w")
    lease.set_meta(str(step).encode())
    time.sleep(0.002)  # leaves the processor to the others
say(step, int.from_bytes(kept[:8], "little"))
while not client.is_connected: time.sleep(0.01)
client.close()
"""
    stop = service.directory / "stop"
    workers = [client_process(service, code, str(number), str(stop)) for number in range(6)]
    processes = [worker.__enter__() for worker in workers]
    for process in processes:
        assert process.stdout.readline() == "begins\n"
    for _ in range(5):
        kill_and_start(service)
    wait_until(lambda: [row.state for row in service.state().members] == ["running"] * 6)
    assert service.state().host.leased == 6 * 4 * MIB
    stop.touch()
    for process in processes:
        steps, last = process.stdout.readline().split()
        assert int(steps) == int(last) >= 30
        assert process.wait(PATIENCE_S) == 0
    for worker in workers:
        worker.__exit__(None, None, None)
    wait_until(service.holds_nothing)


def test_what_was_given_back_while_no_service_was_there_is_free_when_the_job_asks_again(service):
    client = service.client("job")
    client.lease(40 * MIB, 0)
    service.kill()
    wait_until(lambda: not client.is_connected)
    client.close()
    service.start()
    with service.client("job") as client:
        client.lease(40 * MIB, 0, timeout_s=PATIENCE_S)
        assert service.state().host.leased == 40 * MIB
