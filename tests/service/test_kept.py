"""Kept state: what a killed rank leaves, for its successor, for a while."""

from __future__ import annotations

import os

import pytest
from patience import PATIENCE_S
from service_process import MIB, client_process, running_service, wait_until

from gemini.errors import ServiceError

pytestmark = pytest.mark.processes


COMMIT = """
client = connect("job")
lease = client.lease(8 << 20, 4 << 20)
file = lease.keep_file(2 << 20)
mapping = mmap.mmap(file, 2 << 20)
mapping[:5] = b"state"
os.pwrite(lease.disk.fd, b"more", 4096)
lease.set_meta(b"step 7")
say("committed")
sys.stdin.read()
"""


def killed_after_commit(service):
    with client_process(service, COMMIT) as process:
        assert process.stdout.readline() == "committed\n"
        process.kill()
        process.wait()
    wait_until(lambda: [row.state for row in service.rows("job")] == ["kept"])


def test_the_successor_of_a_killed_rank_finds_its_bytes_in_memory_and_on_disk(service):
    killed_after_commit(service)
    assert service.state().host.kept == 8 * MIB
    with service.client("job") as client:
        described = client.kept
        assert (described.host_nbytes, described.disk_nbytes, described.file_nbytes) == (8 * MIB, 4 * MIB, 2 * MIB)
        kept = client.take_kept()
        assert kept.meta == b"step 7"
        assert os.pread(kept.fd, 5, 0) == b"state"
        assert os.pread(kept.lease.disk.fd, 4, 4096) == b"more"
        assert client.kept is None
        assert [(row.state, row.host_nbytes) for row in service.rows("job")] == [("running", 8 * MIB)]
        kept.lease.end()
        wait_until(lambda: service.state().host.leased == 0)


def test_what_is_taken_is_kept_again_when_the_successor_is_killed(service):
    killed_after_commit(service)
    code = 'kept = connect("job").take_kept(); kept.lease.set_meta(b"step 8"); say("taken"); sys.stdin.read()'
    with client_process(service, code) as process:
        assert process.stdout.readline() == "taken\n"
        process.kill()
    wait_until(lambda: [row.state for row in service.rows("job")] == ["kept"])
    with service.client("job") as client:
        assert client.take_kept().meta == b"step 8"


def test_a_successor_may_drop_it(service):
    killed_after_commit(service)
    with service.client("job") as client:
        client.drop_kept()
        assert client.kept is None
        client.lease(64 * MIB, 64 * MIB, timeout_s=PATIENCE_S)


def test_other_ranks_and_jobs_find_nothing(service):
    killed_after_commit(service)
    with service.client("other") as client:
        assert client.kept is None
        with pytest.raises(ServiceError, match="nothing is kept of this rank"):
            client.take_kept()


def test_a_clean_end_keeps_nothing_unless_asked(service):
    for keep, states in ((False, []), (True, ["kept"])):
        client = service.client("job")
        client.lease(MIB, 0).keep_file(MIB)
        client.close(keep=keep)
        wait_until(lambda states=states: [row.state for row in service.rows("job")] == states)


def test_nobody_waits_for_a_successor_longer_than_the_grace():
    with running_service("--grace", "1") as service:
        killed_after_commit(service)
        wait_until(service.holds_nothing)


def test_the_kept_file_has_one_length_and_is_part_of_its_lease(service):
    with service.client("job") as client:
        lease = client.lease(MIB, 0)
        with pytest.raises(ServiceError, match="a kept file of 1048577 bytes is larger than its lease of 1048576"):
            lease.keep_file(MIB + 1)
        descriptor = lease.keep_file(MIB)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 2 * MIB)
        with pytest.raises(ServiceError, match="this rank has a kept file already"):
            lease.keep_file(MIB)
        with pytest.raises(ServiceError, match="meta: expected at most 16384 bytes, got 16385"):
            lease.set_meta(bytes(16385))


def test_what_is_kept_last_replaces_what_was_kept_before_and_not_taken(service):
    killed_after_commit(service)
    with service.client("job") as client:
        client.lease(3 * MIB, 0).keep_file(1 * MIB)
        client.close(keep=True)
    wait_until(lambda: service.state().host.kept == 3 * MIB)
    assert service.state().host.leased == 0
    assert service.files() == []
