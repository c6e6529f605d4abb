"""Users of one service: nobody reaches what is another's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from patience import PATIENCE_S
from service_process import MIB, ServiceProcess, client_process, running_service, wait_until

from gemini.errors import ServiceError

OTHER = 54321

pytestmark = [pytest.mark.processes, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")]


@pytest.fixture
def open_service() -> Iterator[ServiceProcess]:
    """A service that every user may connect to."""
    with running_service("--mode", "0666") as service:
        service.directory.chmod(0o711)
        yield service


def as_other(service: ServiceProcess, code: str) -> str:
    """Run code as another user; return what it says."""
    with client_process(service, f"os.setgroups([]); os.setgid({OTHER}); os.setuid({OTHER})\n" + code) as process:
        said, _ = process.communicate(timeout=PATIENCE_S)
    return said


REFUSED = """
try: {what}
except Exception as error: say(type(error).__name__, error)
else: say("done")
"""


def test_the_socket_lets_in_nobody_else(service):
    service.directory.chmod(0o711)
    assert os.stat(service.socket).st_mode & 0o777 == 0o600
    assert "no memory service answers" in as_other(service, REFUSED.format(what='connect("job")'))
    assert "(Permission denied)" in as_other(service, REFUSED.format(what='connect("job")'))


def test_a_group_can_be_let_in():
    with running_service("--mode", "0660", "--group", "nogroup") as service:
        service.directory.chmod(0o711)
        assert as_other(service, REFUSED.format(what='connect("job")')).startswith("NoServiceError")
        code = f"import grp; os.setgroups([grp.getgrnam('nogroup').gr_gid]); os.setgid({OTHER}); os.setuid({OTHER})\n"
        with client_process(service, code + REFUSED.format(what='connect("job")')) as process:
            assert process.communicate(timeout=PATIENCE_S)[0] == "done\n"


def test_one_job_name_of_two_users_is_two_jobs(open_service):
    with open_service.client("job") as mine:
        mine.lease(MIB, 0)
        said = as_other(open_service, 'client = connect("job"); client.lease(1 << 20, 0); say("held"); client.close()')
        assert said == "held\n"


def test_neither_shared_chunks_nor_kept_state_nor_files_reach_another_user(open_service):
    with open_service.client("job") as mine:
        lease = mine.lease(2 * MIB, MIB, shared={"weights": MIB})
        lease.keep_file(MIB)
        mine.shared("weights", MIB).fill_done("digest")
        path = str(lease.disk.path)
        mine.close(keep=True)
    wait_until(lambda: [row.state for row in open_service.rows("job")] == ["kept"])
    open_service.disk.chmod(0o711)
    code = f"""
client = connect("job")
say(client.kept, client.shared("weights", 1 << 20).is_filled)
try: os.open({path!r}, os.O_RDONLY)
except PermissionError: say("not the file")
try: client.take_kept()
except Exception as error: say(error)
client.close()
"""
    said = as_other(open_service, code).splitlines()
    assert said == ["None False", "not the file", "memory service: nothing is kept of this rank"]


def test_content_of_one_digest_is_not_shared_between_users(open_service):
    with open_service.client("job") as mine:
        chunk = mine.shared("weights", MIB)
        os.pwrite(chunk.fd, b"secret", 0)
        chunk.fill_done("digest")
        code = """
chunk = connect("job").shared("other", 1 << 20)
os.pwrite(chunk.fd, b"own", 0)
chunk.fill_done("digest")
say(os.pread(chunk.fd, 6, 0))
"""
        assert as_other(open_service, code) == repr(b"own\0\0\0") + "\n"


def test_others_see_and_administer_their_own_only(open_service):
    code = """
from gemini.service.admin_client import AdminClient
own = connect("own")
with AdminClient(sys.argv[1] if len(sys.argv) > 1 else PATH) as client:
    say([row.job for row in client.state().members])
    for act in (lambda: client.evict("mine", user=0, timeout_s=1), lambda: client.drain(timeout_s=None)):
        try: act()
        except Exception as error: say(error)
try: connect("urgent", priority=1)
except Exception as error: say(error)
"""
    with open_service.client("mine"):
        said = as_other(open_service, f"PATH = {str(open_service.socket)!r}\n" + code).splitlines()
        assert said[0] == "['own']"
        assert "only root and the service's own user may evict jobs of other users" in said[1]
        assert "only root and the service's own user may drain the service" in said[2]
        assert "only root and the service's own user may use a priority above 0" in said[3]
        assert [row.job for row in open_service.state().members] == ["mine"]


def test_a_user_cannot_adopt_what_was_anothers(open_service):
    with open_service.client("job") as mine:
        lease = mine.lease(MIB, MIB)
        code = f"""
from gemini.service.messages import AdoptLease
client = connect("job")
name = {lease.disk.path.name!r}
try: client.ask(lambda id: AdoptLease(id=id, lease=1, host_nbytes=0, disk_nbytes=1 << 20, disk_name=name, meta=b""))
except Exception as error: say(error)
"""
        assert "no earlier service is known to have granted this lease" in as_other(open_service, code)
    with pytest.raises(ServiceError, match="is gone"):
        mine.budget()
