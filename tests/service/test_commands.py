"""ps, evict and drain as a user calls them, and what SIGTERM does to the service."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
from patience import PATIENCE_S
from service_process import MIB, ROOT, client_process, running_service, wait_until

from gemini.__main__ import main
from gemini.cli.ps import format_age
from gemini.errors import ServiceError

pytestmark = pytest.mark.processes


HOLD = 'lease = connect("job").lease(8 << 20, 1 << 20); lease.keep_file(1 << 20); say("held"); sys.stdin.read()'
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HOLD


def command(service, *words):
    return main([*words, "--socket", str(service.socket)])


def test_ps_shows_who_holds_what(service, capsys):
    with service.client("job", priority=3) as client:
        client.lease(8 * MIB, 2 * MIB, shared={"weights": MIB})
        client.shared("weights", MIB).fill_done("digest")
        assert command(service, "ps", "--json") == 0
        state = json.loads(capsys.readouterr().out)
        assert state["host"] == {"total": 64 * MIB, "leased": 8 * MIB, "kept": 0, "shared": MIB, "warm": 0}
        (row,) = state["members"]
        assert (row["job"], row["state"], row["disk_nbytes"], row["priority"]) == ("job", "running", 2 * MIB, 3)
        assert command(service, "ps") == 0
        shown = capsys.readouterr().out
        for text in ("8.00 MiB", "55.00 MiB", "running", "weights", "root" if client else ""):
            assert text in shown


def test_ps_shows_more_than_fits_in_one_packet(service):
    clients = [service.client(f"job{number}" + "x" * 100, rank=0) for number in range(150)]
    assert len(service.state().members) == 150
    for client in clients:
        client.close()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (9000, "2 h 30 min")])
def test_ages_have_one_unit_or_two(seconds, text):
    assert format_age(seconds) == text


@pytest.mark.parametrize("words", [["ps"], ["evict", "job"], ["drain"]])
def test_without_a_service_the_exit_code_is_three(tmp_path, words, capsys):
    assert main([*words, "--socket", str(tmp_path / "none")]) == 3
    assert "no memory service answers at" in capsys.readouterr().err


def test_evict_asks_a_job_to_end_and_keeps_nothing_of_it(service, capsys):
    with client_process(service, HOLD) as process:
        assert process.stdout.readline() == "held\n"
        assert command(service, "evict", "job") == 0
        assert process.wait(PATIENCE_S) == -15
        wait_until(service.holds_nothing)


def test_evict_kills_a_job_that_does_not_end(service, capsys):
    with client_process(service, STUBBORN) as process:
        assert process.stdout.readline() == "held\n"
        assert command(service, "evict", "job", "--timeout", "0.3") == 0
        assert process.wait(PATIENCE_S) == -9
        wait_until(service.holds_nothing)


def test_evict_frees_what_is_kept_and_warm_of_a_job(service, capsys):
    client = service.client("job")
    client.lease(MIB, MIB, shared={"weights": MIB}).keep_file(MIB)
    client.shared("weights", MIB).fill_done("digest")
    client.close(keep=True)
    wait_until(lambda: service.state().host.kept == MIB)
    assert command(service, "evict", "job") == 0
    assert service.holds_nothing()
    assert service.state().host.warm == 0
    assert command(service, "evict", "job") == 2
    assert "user 0 has no job job here" in capsys.readouterr().err


def test_drain_grants_no_more_and_ends_with_the_last_job(service, capsys):
    with service.client("runs") as runs, service.client("waits") as waits:
        runs.lease(40 * MIB, 0)
        refused = []

        def wait():
            with pytest.raises(ServiceError, match="draining") as raised:
                waits.lease(40 * MIB, 0)
            refused.append(raised)

        waiting = threading.Thread(target=wait)
        waiting.start()
        wait_until(lambda: service.rows("waits")[0].state == "waiting")
        drain = subprocess.Popen(
            [sys.executable, "-m", "gemini", "drain", "--socket", str(service.socket)], cwd=ROOT, stderr=subprocess.PIPE
        )
        waiting.join(PATIENCE_S)
        assert len(refused) == 1
        with pytest.raises(ServiceError, match="draining and takes no new jobs"):
            service.client("new")
        assert service.process.poll() is None
    _, errors = drain.communicate(timeout=PATIENCE_S)
    assert (drain.returncode, errors) == (0, b"")
    assert service.process.wait(PATIENCE_S) == 0


def test_drain_evicts_after_its_timeout(service, capsys):
    with client_process(service, HOLD) as process:
        assert process.stdout.readline() == "held\n"
        assert command(service, "drain", "--timeout", "0.3") == 0
        assert process.wait(PATIENCE_S) == -15
        assert service.process.wait(PATIENCE_S) == 0
        assert service.files() == []


def test_sigterm_leaves_jobs_with_what_they_have_and_a_later_service_finds_them(service):
    with service.client("job") as client:
        client.lease(8 * MIB, MIB)
        service.terminate()
        assert service.process.returncode == 0
        assert not service.socket.exists()
        assert len(service.files()) == 1
        service.start()
        wait_until(lambda: client.is_connected)
        assert [(row.state, row.disk_nbytes) for row in service.rows("job")] == [("running", MIB)]


def test_sigterm_without_jobs_ends_at_once_and_leaves_nothing():
    with running_service("--drain-timeout", str(100 * PATIENCE_S)) as service:
        service.client("job").close()
        service.terminate()  # and does not wait for jobs, of which there are none
        assert service.process.returncode == 0
        assert service.files() == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--host-budget", "plenty"], "--host-budget: cannot read 'plenty' as bytes"),
        (
            ["--host-budget", "1GiB", "--nvme", "500GiB"],
            '--nvme: expected a directory and bytes such as "/nvme:500GiB"',
        ),
        (["--host-budget", "1GiB", "--nvme", "/no/such/place:1GiB"], "cannot open /no/such/place/.gemini-service.lock"),
        (["--host-budget", "1GiB", "--group", "nobodys-group"], "--group: this machine has no group 'nobodys-group'"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said_in_one_line(tmp_path, words, text):
    serve = [sys.executable, "-m", "gemini", "serve", "--socket", str(tmp_path / "s"), *words]
    refused = subprocess.run(serve, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert refused.returncode == 2
    assert text in refused.stderr
    assert refused.stderr.count("\n") == 1
