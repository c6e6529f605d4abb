"""The CPU allocator: no block overlaps another, memory stays near what is alive, and training does not notice."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S

from gemini import HeapUnavailableError, heap
from gemini.heap.build import build_allocator, cache_dir

KIB, MIB = 1 << 10, 1 << 20
SLACK = 32 * MIB
"""What may be resident beyond what was alive at once."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _needs_headers() -> None:
    if not (Path(torch.__file__).parent / "include" / "c10").is_dir():
        pytest.skip("this torch was installed without its C++ headers")


@pytest.fixture
def pool() -> Iterator[None]:
    """Install the allocator for one test."""
    gc.collect()  # so that nothing but the test frees blocks
    heap.install()
    yield
    heap.uninstall()


def read() -> heap.HeapStatistics:
    statistics = heap.statistics()
    assert statistics is not None
    return statistics


def make_block(nbytes: int, value: int) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


def is_intact(block: torch.Tensor, value: int) -> bool:
    return bool((block == value).all())


def run_python(code: str, **environment: str) -> Any:
    """Run a program in a process of its own and return what its last line says, as JSON."""
    # A warning is an error there too, but for torch's about forks among threads, which is what one of them is about.
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", code]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=variables, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


# ---------------------------------------------------------------- blocks


@pytest.mark.usefixtures("pool")
@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(200 * KIB, 5 * MIB)), st.tuples(st.just("free"), st.integers(0, 99))
        ),
        max_size=40,
    )
)
def test_blocks_keep_their_bytes_and_all_of_them_come_back(actions: list[tuple[str, int]]) -> None:
    before = read()
    held: list[tuple[torch.Tensor, int]] = []
    for number, (action, argument) in enumerate(actions):
        if action == "take":
            held.append((make_block(argument, number % 251), number % 251))
        elif held:
            assert is_intact(*held.pop(argument % len(held)))
    large = [block.nbytes for block, _ in held if block.nbytes >= 256 * KIB]
    now = read()
    assert now.live_nbytes - before.live_nbytes == sum(-(-nbytes // 64) * 64 for nbytes in large)
    assert now.num_live_blocks - before.num_live_blocks == len(large)
    assert all(is_intact(block, value) for block, value in held)
    held.clear()
    assert (read().live_nbytes, read().num_live_blocks) == (before.live_nbytes, before.num_live_blocks)


@pytest.mark.usefixtures("pool")
def test_threads_never_share_a_block() -> None:
    before, damaged = read(), []

    def churn(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        held: list[torch.Tensor] = []
        for number in range(200):
            nbytes = int(torch.randint(256 * KIB, 2 * MIB, (), generator=generator))
            held.append(make_block(nbytes, seed))
            if number % 3:
                block = held.pop(int(torch.randint(len(held), (), generator=generator)))
                damaged.extend([] if is_intact(block, seed) else [seed])
            held = held[-8:]

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert damaged == []
    assert read().live_nbytes == before.live_nbytes


@pytest.mark.quick_cases(3)
@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("nbytes", [1, 100, 256 * KIB - 1, 256 * KIB, 256 * KIB + 1, 3 * MIB + 7])
def test_blocks_are_aligned_as_torchs_are(nbytes: int) -> None:
    assert [torch.empty(nbytes, dtype=torch.uint8).data_ptr() % 64 for _ in range(3)] == [0, 0, 0]


@pytest.mark.usefixtures("pool")
def test_an_empty_tensor_takes_no_block() -> None:
    before = read()
    assert torch.empty(0).data_ptr() == 0
    assert read() == before


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("nbytes", [1 << 50, 1 << 62])
def test_a_request_beyond_all_memory_fails_as_torchs_does(nbytes: int) -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(nbytes, dtype=torch.uint8)
    assert is_intact(make_block(MIB, 7), 7)


OVERCOMMIT = """
import json, psutil, torch
from gemini import heap
machine = psutil.virtual_memory().total
absurd = 2 * machine + psutil.swap_memory().total

def can_have(nbytes):
    try:
        torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError:
        return False
    return True

plain = can_have(absurd)
heap.install()
found = [can_have(absurd)]
blocks = [torch.empty(machine // 4 * 3, dtype=torch.uint8) for _ in range(4)]
served = heap.statistics().num_live_blocks
del blocks  # which leaves a free span that is long enough
found.append(can_have(absurd))
print(json.dumps([plain, found, served]))
"""


def test_memory_that_the_machine_lacks_is_refused_as_without_the_pool() -> None:
    plain, found, served = run_python(OVERCOMMIT)
    assert served == 4
    assert found == [plain, plain]


def test_blocks_survive_a_change_of_allocator() -> None:
    heap.uninstall()
    blocks = [make_block(MIB, 0)]
    heap.install()
    before = read()
    blocks.append(make_block(MIB, 1))
    heap.uninstall()
    blocks.append(make_block(MIB, 2))
    heap.install()
    assert all(is_intact(block, value) for value, block in enumerate(blocks))
    assert read().num_live_blocks == before.num_live_blocks + 1
    blocks.clear()
    assert read().live_nbytes == before.live_nbytes
    heap.uninstall()


@pytest.mark.usefixtures("pool")
def test_a_resized_storage_keeps_its_bytes() -> None:
    block = make_block(MIB, 5)
    block.resize_(4 * MIB)
    assert is_intact(block[:MIB], 5)


# ---------------------------------------------------------------- memory

LAYOUT = """
import json, torch
from gemini import heap
heap.install()
take = lambda mib: torch.empty(mib << 20, dtype=torch.uint8)
first, second, third, guard = take(1), take(2), take(3), take(1)
base = first.data_ptr()
offsets = [(block.data_ptr() - base) >> 20 for block in (first, second, third, guard)]
del third, first
num_apart = heap.statistics().num_free_spans
del second
num_joined = heap.statistics().num_free_spans
whole = take(6)
offsets.append((whole.data_ptr() - base) >> 20)
print(json.dumps([offsets, num_apart, num_joined]))
"""


def test_free_neighbours_are_joined_and_the_lowest_span_serves() -> None:
    offsets, num_apart, num_joined = run_python(LAYOUT)
    assert offsets == [0, 1, 3, 6, 0]
    assert (num_apart, num_joined) == (3, 2)  # the last of each is the end of the range


HOLES = """
import json, pathlib, torch
from gemini import heap
def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) << 10
heap.install()
take = lambda mib: torch.ones(mib << 20, dtype=torch.uint8)
take(1)
before = status("VmRSS")
for _ in range(4):
    pairs = [(take(20), take(1)) for _ in range(6)]  # 126 MiB
    small = [pair[1] for pair in pairs]
    del pairs
    large = [take(40), take(40)]  # fits into no hole of 20 MiB
    del large, small
statistics = heap.statistics()
print(json.dumps([statistics.peak_live_nbytes, statistics.peak_resident_nbytes, status("VmHWM") - before]))
"""


def test_holes_never_take_more_than_the_slack() -> None:
    peak_live, peak_resident, measured = run_python(HOLES)
    assert peak_live == 126 * MIB
    assert peak_resident <= peak_live + SLACK
    assert measured <= peak_live + SLACK


@pytest.mark.usefixtures("pool")
def test_what_is_needed_again_is_kept() -> None:
    def step() -> None:
        blocks = [make_block(16 * MIB, 1) for _ in range(6)]
        blocks.clear()

    step()
    released = read().released_nbytes
    for _ in range(5):
        step()
    assert read().released_nbytes == released


@pytest.mark.usefixtures("pool")
def test_release_gives_free_pages_back_to_the_system() -> None:
    process = psutil.Process()
    guard, block = make_block(MIB, 1), make_block(64 * MIB, 1)
    del block
    before = process.memory_info().rss
    heap.release()
    assert before - process.memory_info().rss >= 60 * MIB
    assert read().resident_nbytes <= read().live_nbytes + 4 * MIB * read().num_live_blocks
    assert is_intact(guard, 1)


# ---------------------------------------------------------------- the process around it

FORKS = """
import json, os, signal, threading, torch
from gemini import heap
heap.install()
stop = threading.Event()
def churn():
    while not stop.is_set():
        torch.empty(1 << 20, dtype=torch.uint8)
threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads:
    thread.start()
kept = torch.full((1 << 20,), 7, dtype=torch.uint8)
statuses = []
for _ in range(100):
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # the end of patience
        block = torch.empty(1 << 20, dtype=torch.uint8)
        os._exit(0 if kept.sum() == 7 << 20 and block.data_ptr() != kept.data_ptr() else 1)
    statuses.append(os.waitpid(child, 0)[1])
    if statuses[-1]:
        break
stop.set()
data = torch.utils.data.DataLoader(torch.arange(8), num_workers=1, collate_fn=lambda _: torch.ones(1 << 20))
print(json.dumps([statuses, sum(batch.numel() for batch in data)]))
"""


@pytest.mark.slow
def test_a_forked_child_can_allocate() -> None:
    statuses, numel = run_python("import torch; torch.set_num_threads(1)\n" + FORKS)
    assert statuses == [0] * 100
    assert numel == 8 << 20


@pytest.mark.usefixtures("pool")
def test_the_profiler_sees_the_memory() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        block = torch.empty(MIB, dtype=torch.uint8)
    assert block.nbytes == MIB
    assert {event.key: event.self_cpu_memory_usage for event in profile.key_averages()}["aten::empty"] == MIB


TRAINING = """
import json, pathlib, sys, torch
from gemini import GeminiConfig, GeminiDDP, HybridAdam
torch.manual_seed(0)
torch.set_num_threads(1)
widths = [256, 1024, 768, 320, 896, 512]
pairs = zip(widths, widths[1:] + widths[:1])
model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(*pair), torch.nn.GELU()) for pair in pairs])
engine = GeminiDDP(model, GeminiConfig(device="cpu", dtype=torch.float32, cpu_allocator=sys.argv[1]))
optimizer = HybridAdam(engine.parameters(), lr=1e-3)
losses = []
for step in range(6):
    loss = engine(torch.randn(1500 + 300 * (step % 3), 256)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
report = engine.memory_report()
print(json.dumps([losses, peak, report.heap and report.heap.peak_live_nbytes, str(report)]))
"""


@pytest.mark.slow
def test_training_is_the_same_to_the_bit_in_less_memory() -> None:
    program = "import sys; sys.argv = ['-', {!r}]\n" + TRAINING
    losses, peak, peak_live, report = run_python(program.format("pool"))
    stock_losses, stock_peak, stock_live, stock_report = run_python(program.format("system"))
    assert losses == stock_losses
    assert stock_live is None
    assert peak < stock_peak - 8 * MIB
    assert f"{peak_live >> 20}" in report
    assert "heap:" not in stock_report


# ---------------------------------------------------------------- where it cannot be had


def test_a_library_built_before_is_used_again(tmp_path: Path) -> None:
    built = build_allocator(cache_dir())
    shutil.copy(built, tmp_path)
    assert build_allocator(tmp_path, compiler="/bin/false") == tmp_path / built.name
    assert [path.name for path in tmp_path.iterdir()] == [built.name]


def test_a_compilers_failure_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HeapUnavailableError, match="/bin/false failed"):
        build_allocator(tmp_path, compiler="/bin/false")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_reported() -> None:
    with pytest.raises(HeapUnavailableError, match="cannot be compiled: .*/dev/null"):
        build_allocator(Path("/dev/null/cache"))


def test_somebody_elses_allocator_is_left_in_place(tmp_path: Path) -> None:
    heap.uninstall()
    other = ctypes.CDLL(shutil.copy(build_allocator(cache_dir()), tmp_path / "other.so"))
    assert other.gn_heap_install() == 0
    try:
        with pytest.raises(HeapUnavailableError, match="another library"):
            heap.install()
    finally:
        other.gn_heap_uninstall()


WITHOUT_COMPILER = """
import json, logging, torch
from gemini import ConfigError, GeminiConfig, GeminiDDP, heap
logging.basicConfig(level=logging.INFO, filename="log")
make = lambda choice: GeminiDDP(torch.nn.Linear(8, 8), GeminiConfig(device="cpu", cpu_allocator=choice))
with make("auto") as engine:
    shape = list(engine(torch.ones(2, 8, dtype=torch.bfloat16)).shape)
try:
    make("pool")
    refusal = ""
except ConfigError as error:
    refusal = str(error)
print(json.dumps([shape, heap.statistics(), refusal, [line for line in open("log") if "allocator" in line]]))
"""


@pytest.mark.slow
def test_everything_works_without_a_compiler(tmp_path: Path) -> None:
    program = f"import os; os.chdir({str(tmp_path)!r})\n" + WITHOUT_COMPILER
    shape, statistics, refusal, log = run_python(program, PATH="", TORCH_HOME=str(tmp_path / "cache"))
    assert shape == [2, 8]
    assert statistics is None
    assert refusal.startswith('GeminiConfig.cpu_allocator: "pool" is not available')
    assert "no C++ compiler" in refusal
    assert len(log) == 1


def test_auto_takes_the_allocator_only_to_compute_on_the_cpu() -> None:
    heap.install()
    heap.uninstall()
    before = read().num_live_blocks
    heap.serve_cpu_memory("auto", is_compute_on_cpu=False)
    heap.serve_cpu_memory("system", is_compute_on_cpu=True)
    blocks = [make_block(MIB, 1)]
    assert read().num_live_blocks == before
    heap.serve_cpu_memory("auto", is_compute_on_cpu=True)
    blocks.append(make_block(MIB, 1))
    assert read().num_live_blocks == before + 1
    heap.uninstall()
