"""What holds for every test: helpers are importable; `gpu` tests are skipped, with a reason, where there is none.

What a shell hands down to its background jobs, which is to ignore Ctrl-C, is not left to decide what tests find.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import settings

settings.register_profile("no clock", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("no clock")

sys.path.insert(0, str(Path(__file__).parent / "support"))  # importmode=importlib leaves sys.path alone


SLOWER = int(os.environ.get("GEMINI_TEST_SLOWER", "1"))
"""How many times as long as usual tests may take: `make stress` makes the machine slow."""


HAS_FAILED = pytest.StashKey[bool]()
"""Whether a part of a test has failed."""


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report


def _began_s(process: psutil.Process) -> float:
    """Return when a process began, by the clock that counts from the machine's start."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[19]) + 1) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(autouse=True)
def _programs_end_with_a_test_that_fails(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test has started, and could not end because it failed, must not run on beside the others."""
    begin_s = time.clock_gettime(time.CLOCK_BOOTTIME)  # what the kernel stamps processes with
    yield
    if request.node.stash.get(HAS_FAILED, False):
        for child in psutil.Process().children():
            if _began_s(child) >= begin_s and not any("multiprocessing" in word for word in child.cmdline()):
                for each in (*child.children(recursive=True), child):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Tensors of a few kilobytes: threads of torch's would cost more than they do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def mark_cases_beyond_the_quick_ones(items: list[pytest.Item]) -> None:
    """Mark a test's cases as slow, but for as many as its `quick_cases` names, which lie evenly in their list."""
    cases: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("quick_cases") is not None:
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_a_test in cases.values():
        num_quick = of_a_test[0].get_closest_marker("quick_cases").args[0]
        quick = {round(index * (len(of_a_test) - 1) / max(num_quick - 1, 1)) for index in range(num_quick)}
        for index, item in enumerate(of_a_test):
            if index not in quick:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at `-m "not slow"`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_cases_beyond_the_quick_ones(items)
    if SLOWER > 1:
        usual_s = float(config.getini("timeout"))
        for item in items:
            marker = item.get_closest_marker("timeout")
            item.add_marker(pytest.mark.timeout(SLOWER * (marker.args[0] if marker else usual_s)), append=False)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
