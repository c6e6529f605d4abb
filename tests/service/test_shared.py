"""Shared chunks: one fills, all read, nobody can write, and what is not used stays for a while."""

from __future__ import annotations

import mmap
import os
import threading

import pytest
from patience import PATIENCE_S
from service_process import MIB, client_process, running_service, wait_until, waits_for

from gemini.errors import OutOfTierMemoryError, ServiceError

pytestmark = pytest.mark.processes


def fill(client, key, content, digest=None):
    with client.shared(key, len(content)) as chunk:
        assert not chunk.is_filled
        with mmap.mmap(chunk.fd, len(content)) as mapping:
            mapping[:] = content
        chunk.fill_done(digest or f"digest-of-{key}")
    return chunk


CONTENT = bytes(range(256)) * 4096  # 1 MiB


def test_the_second_job_maps_what_the_first_has_filled(service):
    with service.client("first") as first, service.client("second") as second:
        fill(first, "weights", CONTENT)
        found = second.shared("weights", MIB)
        assert found.is_filled
        assert found.digest == "digest-of-weights"
        with mmap.mmap(found.fd, MIB, prot=mmap.PROT_READ) as mapping:
            assert mapping[:] == CONTENT
        assert service.state().host.shared == MIB


def test_readers_and_the_filler_can_write_no_more(service):
    with service.client("first") as first, service.client("second") as second:
        filled = fill(first, "weights", CONTENT)
        for descriptor in (filled.fd, second.shared("weights", MIB).fd):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(descriptor, b"x")
            with pytest.raises(PermissionError):
                mmap.mmap(descriptor, MIB)
            writable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # the seal still holds
            with pytest.raises(PermissionError):
                os.write(writable, b"x")
            with pytest.raises(PermissionError):
                os.ftruncate(writable, 0)
            os.close(writable)


def test_a_chunk_that_is_still_mapped_for_writing_cannot_be_sealed(service):
    with service.client("job") as client, client.shared("weights", MIB) as chunk:
        with mmap.mmap(chunk.fd, MIB), pytest.raises(ServiceError, match="weights cannot be sealed .*: unmap"):
            chunk.fill_done("digest")
        chunk.fill_done("digest")


def test_others_wait_for_the_filler_and_the_next_fills_if_it_gives_up(service):
    reasons: list[str] = []
    found = []
    with service.client("first") as first, service.client("second") as second, service.client("third") as third:
        with first.shared("weights", MIB):
            waiting = threading.Thread(
                target=lambda: found.append(second.shared("weights", MIB, on_wait=reasons.append))
            )
            waiting.start()
            wait_until(lambda: bool(reasons))
        waiting.join()
        assert reasons == ["another process to fill shared chunk weights"]
        assert not found[0].is_filled
        later = threading.Thread(target=lambda: found.append(third.shared("weights", MIB)))
        later.start()
        wait_until(lambda: service.rows("third")[0].state == "waiting")
        os.pwrite(found[0].fd, CONTENT, 0)
        found[0].fill_done("digest")
        later.join()
        assert os.pread(found[1].fd, MIB, 0) == CONTENT


def test_when_the_filler_is_killed_the_next_starts_with_zeros(service):
    code = """
chunk = connect("filler").shared("weights", 1 << 20)
os.pwrite(chunk.fd, b"half", 0)
say("fills")
sys.stdin.read()
"""
    with service.client("next") as client, client_process(service, code) as process:
        assert process.stdout.readline() == "fills\n"
        threading.Timer(0.3, process.kill).start()
        chunk = client.shared("weights", MIB)
        assert not chunk.is_filled
        assert os.pread(chunk.fd, MIB, 0) == bytes(MIB)


def test_two_keys_of_one_content_are_one_chunk_and_counted_once(service):
    with service.client("first") as first, service.client("second") as second:
        one, other = fill(first, "a", CONTENT, "digest"), fill(second, "b", CONTENT, "digest")
        assert os.fstat(one.fd).st_ino == os.fstat(other.fd).st_ino
        assert service.state().host.shared == MIB


def test_a_key_stands_for_one_length(service):
    with service.client("job") as client:
        fill(client, "weights", CONTENT)
        with pytest.raises(ServiceError, match="shared chunk weights has 1048576 bytes, not 4096"):
            client.shared("weights", 4096)


def test_unused_chunks_stay_warm_until_their_time_is_over():
    with running_service("--warm", "1.5") as service:
        with service.client("job") as client:
            fill(client, "weights", CONTENT)
        wait_until(lambda: service.state().host.warm == MIB)
        with service.client("job") as client:
            assert client.shared("weights", MIB).is_filled
        wait_until(lambda: service.state().shared == [])


def test_unused_chunks_make_room_the_oldest_first(service):
    with service.client("job") as client:
        for key in ("old", "young"):
            client.release_shared(fill(client, key, bytes(20 * MIB)))
        with client.lease(40 * MIB, 0):
            assert [row.key for row in service.state().shared] == ["young"]


def test_a_lease_that_declares_its_chunks_waits_for_their_room_too(service):
    with service.client("first") as first, service.client("second") as second:
        held = first.lease(40 * MIB, 0)
        with pytest.raises(OutOfTierMemoryError, match="no room for the 31457280 bytes of shared chunk weights"):
            second.shared("weights", 30 * MIB)
        assert waits_for(second, MIB, shared={"weights": 30 * MIB})
        held.end()
        second.lease(MIB, 0, shared={"weights": 30 * MIB})
        assert not second.shared("weights", 30 * MIB).is_filled
        # It is there now, or about to be: the other job pays for itself only.
        first.lease(33 * MIB, 0, shared={"weights": 30 * MIB}, timeout_s=PATIENCE_S)


def test_what_was_declared_and_never_asked_for_is_freed_with_the_lease(service):
    with service.client("job") as client:
        client.lease(MIB, 0, shared={"weights": 30 * MIB}).end()
        wait_until(lambda: service.state().host.shared == 0)
        client.lease(60 * MIB, 0, timeout_s=PATIENCE_S)


def test_a_client_that_asks_twice_gets_the_same_descriptor(service):
    with service.client("job") as client:
        with client.shared("key", MIB) as chunk:
            chunk.fill_done("digest")
        assert client.shared("key", MIB) is chunk
        client.release_shared(chunk)
        assert client.shared("key", MIB) is not chunk
