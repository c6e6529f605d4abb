"""The worker pool: results, order, waiting and closing."""

import dataclasses
import errno
import functools
import gc
import mmap
import operator
import os
import signal
import threading
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from gemini._native import ffi, lib
from patience import PATIENCE_S
from small_resources import resident_pages

from gemini.errors import WorkerError
from gemini.kernels.cpu import AdamHyper, AdamSegment, AdamTile, GradMode, adam_update, store_gradient
from gemini.kernels.pool import BACKGROUND_PRIORITY, WorkerPool

pytestmark = pytest.mark.processes


BLOCK_NUMEL = 65536
HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
# Two blocks and more, so that threads share a job; not a multiple of anything.
NUMEL = 3 * BLOCK_NUMEL + 4097


def make_tile(numel, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    working = torch.randn(numel, generator=generator).to(torch.bfloat16)
    residual = torch.randint(-32768, 32768, (numel,), generator=generator).to(torch.int16)
    momentum, variance = torch.randn(numel, generator=generator), torch.rand(numel, generator=generator)
    # Borders of segments inside, at and across borders of blocks.
    ends = [numel // 7, min(numel, BLOCK_NUMEL), min(numel, 2 * BLOCK_NUMEL + 5), numel]
    begins = [0, *ends[:-1]]
    segments = tuple(
        AdamSegment(begin=a, end=b, hyper=HYPER, step=i + 1) for i, (a, b) in enumerate(zip(begins, ends, strict=True))
    )
    grad = torch.randn(numel, generator=generator)
    return AdamTile(working, residual, momentum, variance, grad, 0.5, segments)


def state_of(tile):
    return [tile.working.view(torch.int16), tile.master, tile.momentum, tile.variance]


class Gate:
    """A job that occupies every thread for a while: it reads pages that were never written, so it takes no memory."""

    def __init__(self, pool):
        self.ticket = pool.submit_gradient(None, torch.from_numpy(np.zeros(1 << 28, np.float32)), priority=-100)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(num_threads):
    tile, expected = make_tile(NUMEL), make_tile(NUMEL)
    adam_update(expected)
    dst, expected_dst = torch.ones(NUMEL), torch.ones(NUMEL)
    expected_sumsq = store_gradient(expected_dst, expected.grad, mode=GradMode.ADD)
    with WorkerPool(num_threads) as pool:
        adam = pool.submit_adam(tile)
        gradient = pool.submit_gradient(dst, tile.grad, mode=GradMode.ADD)
        adam.wait()
        assert gradient.sumsq() == expected_sumsq
    assert torch.equal(dst, expected_dst)
    assert all(torch.equal(a, b) for a, b in zip(state_of(tile), state_of(expected), strict=True))


@pytest.mark.parametrize("numel", [0, 1, 4096, BLOCK_NUMEL, BLOCK_NUMEL + 1])
def test_jobs_of_any_length_complete(numel):
    src, copy = torch.randn(numel), torch.zeros(numel)
    with WorkerPool(2) as pool:
        gradient = pool.submit_gradient(None, src)
        pool.submit_copy(copy, src).wait()
        pool.submit_adam(make_tile(numel)).wait()
        assert gradient.sumsq() == store_gradient(None, src)
    assert torch.equal(copy, src)


def test_copy_moves_bytes_of_any_dtype_and_shape():
    src = torch.randint(0, 255, (1_000_003,), dtype=torch.uint8)
    whole = torch.zeros(1_000_005, dtype=torch.uint8)
    with WorkerPool(3) as pool:
        pool.submit_copy(whole[1:-1], src).wait()
        table = torch.randn(6, 4)
        integers = torch.zeros(24, dtype=torch.int32)
        pool.submit_copy(integers, table).wait()
    assert torch.equal(whole[1:-1], src)
    assert whole[0] == 0
    assert whole[-1] == 0
    assert torch.equal(integers.view(torch.float32).view(6, 4), table)


@pytest.mark.parametrize("nbytes", [4096, (20 << 20) + 4096])
def test_memory_that_is_populated_exists_and_keeps_its_content(nbytes):
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    memory[-1] = 7
    with WorkerPool(3) as pool:
        pool.submit_populate(memory).wait()
    assert resident_pages(memory) == nbytes // 4096
    assert int(memory.sum(dtype=torch.int64)) == 7


def test_where_the_kernel_knows_no_better_every_page_is_touched():
    mapping = mmap.mmap(-1, 5 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    memory[4096] = 9
    address = ffi.cast("void *", memory.data_ptr())
    assert resident_pages(memory) == 1
    assert lib.gn_memory_populate(address, 4 * 4096, lib.GN_POPULATE_BY_TOUCH) == 0
    assert resident_pages(memory) == 4
    assert int(memory[4096]) == int(memory.sum(dtype=torch.int64)) == 9
    assert lib.gn_memory_populate(address, 4096, 3) == -errno.EINVAL


def test_a_thousand_small_jobs_complete():
    with WorkerPool(3) as pool:
        gradients = [torch.full((n % 50,), float(n)) for n in range(1000)]
        tickets = [pool.submit_gradient(None, gradient) for gradient in gradients]
        sums = [ticket.sumsq() for ticket in tickets]
    assert sums == [float(n * n * (n % 50)) for n in range(1000)]


def test_urgent_jobs_start_first_and_equal_ones_in_order():
    tile, expected = make_tile(100), make_tile(100)
    jobs = [dataclasses.replace(tile, grad=torch.randn(100)) for _ in range(6)]
    with WorkerPool(1) as pool:
        gate = Gate(pool)
        for job, priority in zip(jobs, [5, 0, 5, -1, 0, 7], strict=True):
            pool.submit_adam(job, priority=priority)
        last = pool.submit_copy(torch.empty(1), torch.empty(1), priority=100)
        assert not gate.ticket.is_done()
        last.wait()
    # Updates do not commute: the state tells the order they came in.
    for index in (3, 1, 4, 0, 2, 5):
        adam_update(dataclasses.replace(expected, grad=jobs[index].grad))
    assert all(torch.equal(a, b) for a, b in zip(state_of(tile), state_of(expected), strict=True))


def test_wait_times_out_and_can_be_repeated():
    with WorkerPool(1) as pool:
        gate = Gate(pool)
        ticket = pool.submit_gradient(None, torch.ones(10))
        assert not ticket.is_done()
        with pytest.raises(TimeoutError, match=r"gradient \(ticket 2\) not done within 0.001 s"):
            ticket.wait(timeout_s=0.001)
        ticket.wait(timeout_s=float("inf"))
        ticket.wait(timeout_s=0.0)
        ticket.wait()
        assert ticket.is_done()
        assert gate.ticket.is_done()
        assert ticket.sumsq() == 10.0


def test_waiting_does_not_hold_the_interpreter_lock():
    with WorkerPool(1) as pool:
        gate = Gate(pool)
        waiter = threading.Thread(target=gate.ticket.wait)
        waiter.start()
        num_steps = 0
        while not gate.ticket.is_done():
            num_steps += 1
        waiter.join()
    assert num_steps > 1


def test_close_cancels_queued_jobs_and_finishes_running_ones():
    pool = WorkerPool(1)
    src = torch.from_numpy(np.zeros(1 << 28, np.uint8))
    dst = torch.ones(1 << 28, dtype=torch.uint8)
    running = pool.submit_copy(dst, src)
    while dst[0] == 1:
        time.sleep(0)
    untouched = torch.zeros(10)
    for _ in range(50):
        Gate(pool)  # seconds of work that come next, should the copy be done before the pool is closed
    queued = [pool.submit_gradient(untouched, torch.ones(10)) for _ in range(5)]
    pool.close()
    running.wait(timeout_s=0.0)
    assert not dst.any()
    for ticket in queued:
        assert ticket.is_done()
        with pytest.raises(WorkerError, match="was cancelled: the worker pool was closed before it began"):
            ticket.sumsq()
    assert untouched.tolist() == [0.0] * 10


def test_close_releases_threads_that_wait_for_queued_jobs():
    pool = WorkerPool(1)
    for _ in range(50):
        Gate(pool)  # seconds of work, which closing does not wait for
    ticket = pool.submit_gradient(None, torch.ones(10))
    errors, all_wait = [], threading.Barrier(4)

    def wait():
        all_wait.wait(PATIENCE_S)
        try:
            ticket.wait()
        except WorkerError as error:
            errors.append(error)

    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    all_wait.wait(PATIENCE_S)
    pool.close()
    for waiter in waiters:
        waiter.join(PATIENCE_S)
        assert not waiter.is_alive()
    assert len(errors) == 3


def test_a_closed_pool_refuses_jobs_and_still_answers_for_finished_ones():
    with WorkerPool(2) as pool:
        ticket = pool.submit_gradient(None, torch.ones(10))
        ticket.wait()
    pool.close()
    assert ticket.sumsq() == 10.0
    with pytest.raises(WorkerError, match="cannot submit copy: the worker pool is closed"):
        pool.submit_copy(torch.zeros(1), torch.ones(1))


def test_tensors_live_until_the_job_has_completed_and_no_longer():
    with WorkerPool(1) as pool:
        gate = Gate(pool)
        tensor = torch.ones(100)
        alive = weakref.ref(tensor)
        ticket = pool.submit_gradient(None, tensor)
        del tensor
        gc.collect()
        assert alive() is not None
        ticket.wait()
        gc.collect()
        assert alive() is None
        gate.ticket.wait()


def test_jobs_nobody_waits_for_do_not_keep_their_tensors_for_ever():
    with WorkerPool(1) as pool:
        refs = []
        for _ in range(200):
            tensor = torch.ones(10)
            refs.append(weakref.ref(tensor))
            last = pool.submit_gradient(None, tensor)
            last.wait()
            pool.submit_gradient(None, tensor)
            del tensor
        gc.collect()
        assert sum(ref() is not None for ref in refs) <= 64


def test_a_ticket_keeps_its_pool_alive():
    ticket = WorkerPool(1).submit_gradient(None, torch.ones(1000))
    gc.collect()
    assert ticket.sumsq() == 1000.0


def test_worker_threads_keep_subnormals_whatever_their_creator_set():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        pool = WorkerPool(1)
    finally:
        torch.set_flush_denormal(False)
    with pool:
        assert pool.submit_gradient(None, torch.full((8,), 2.0**-149)).sumsq() == 8 * 2.0**-298


def xor_of_words(tensor):
    raw = tensor.numpy().tobytes()
    words = np.frombuffer(raw + bytes(-len(raw) % 8), np.uint64)
    return functools.reduce(operator.xor, map(int, words), 0)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    "nbytes", [(0, 0, 0), (1, 7, 64), (63, 0, 129), (100_003, 200_000, 1), (3_000_001, 12_345, 6_000_000)]
)
def test_a_sweep_reads_every_byte_and_inverts_those_it_may(nbytes, num_threads):
    generator = torch.Generator().manual_seed(1)
    read, first, second = (torch.randint(0, 256, (n,), generator=generator).to(torch.uint8) for n in nbytes)
    before = [tensor.clone() for tensor in (read, first, second)]
    with WorkerPool(num_threads) as pool:
        checksum = pool.submit_sweep([read], [first, second]).checksum()
    assert checksum == functools.reduce(operator.xor, map(xor_of_words, before))
    assert torch.equal(read, before[0])
    assert torch.equal(first, ~before[1])
    assert torch.equal(second, ~before[2])


def test_limited_background_jobs_run_one_at_a_time_and_in_order():
    # Every update is one block on the same tile: two at once, or in another order, would give other bits.
    tile, expected = make_tile(BLOCK_NUMEL), make_tile(BLOCK_NUMEL)
    with WorkerPool(4) as pool:
        pool.limit_background(1)
        for index in range(100):
            grad = torch.full((BLOCK_NUMEL,), float(index))
            last = pool.submit_adam(dataclasses.replace(tile, grad=grad), priority=BACKGROUND_PRIORITY)
            adam_update(dataclasses.replace(expected, grad=grad))
        last.wait()
    assert all(torch.equal(a, b) for a, b in zip(state_of(tile), state_of(expected), strict=True))


def test_urgent_jobs_need_not_wait_for_limited_background_jobs():
    with WorkerPool(2) as pool:
        pool.limit_background(1)
        background = pool.submit_gradient(
            None, torch.from_numpy(np.zeros(1 << 28, np.float32)), priority=BACKGROUND_PRIORITY
        )
        assert [pool.submit_gradient(None, torch.ones(n)).sumsq() for n in range(50)] == list(range(50))
        assert not background.is_done()
        background.wait()


def busy_threads(thread_ids, work):
    """Return how many of the threads ran for at least a millisecond while `work` was called."""

    def run_times_ns():
        return [int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) for thread in thread_ids]

    before = run_times_ns()
    work()
    return sum(after - begin > 1_000_000 for begin, after in zip(before, run_times_ns(), strict=True))


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's accounting of threads")
def test_a_waiting_thread_can_lift_the_limit_on_background_jobs():
    src = torch.from_numpy(np.zeros(1 << 28, np.float32))
    others = set(os.listdir("/proc/self/task"))
    with WorkerPool(2) as pool:
        thread_ids = set(os.listdir("/proc/self/task")) - others
        pool.limit_background(1)
        job = pool.submit_gradient(None, src, priority=BACKGROUND_PRIORITY)

        def wait():
            with pool.background_unlimited():
                job.wait()

        assert busy_threads(thread_ids, wait) == 2
        job = pool.submit_gradient(None, src, priority=BACKGROUND_PRIORITY)
        assert busy_threads(thread_ids, job.wait) == 1
        with pytest.raises(ValueError, match="max_threads: expected at least 1, got 0"):
            pool.limit_background(0)


def run_in_fork(body):
    """Return the exit status of a forked child that ran `body`; None if it had to be killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which is the point
        child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def test_a_forked_process_is_refused_instead_of_hanging():
    pool = WorkerPool(2)
    gate = Gate(pool)
    ticket = pool.submit_gradient(None, torch.ones(10))

    def use_the_pool():
        refused = "the worker pool belongs to process .* forked from it without its threads"
        for use in (ticket.wait, ticket.is_done, lambda: pool.submit_gradient(None, torch.ones(1))):
            with pytest.raises(WorkerError, match=refused):
                use()
        with pytest.raises(WorkerError, match=refused):
            pool.limit_background(1)
        pool.close()

    assert run_in_fork(use_the_pool) == 0
    gate.ticket.wait()
    assert ticket.sumsq() == 10.0
    pool.close()


def test_a_native_pool_refuses_a_forked_process():
    pool = ffi.new("gn_pool **")
    assert lib.gn_pool_create(pool, 2) == 0

    def use_the_pool():
        number = ffi.new("uint64_t *")
        assert lib.gn_pool_wait(pool[0], 1, -1) == -errno.ESRCH
        assert lib.gn_pool_submit_copy(pool[0], ffi.NULL, ffi.NULL, 0, 0, number) == -errno.ESRCH
        assert lib.gn_pool_destroy(pool[0]) == -errno.ESRCH

    assert run_in_fork(use_the_pool) == 0
    assert lib.gn_pool_destroy(pool[0]) == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a second processor")
def test_spare_processors_keep_the_workers_off_the_launching_thread():
    allowed = os.sched_getaffinity(0)
    others = set(os.listdir("/proc/self/task"))
    with WorkerPool(1):
        (worker,) = set(os.listdir("/proc/self/task")) - others
        assert set() < os.sched_getaffinity(int(worker)) < allowed
        assert os.sched_getaffinity(0) == allowed


def test_cpu_wishes_that_cannot_be_met_are_ignored():
    with WorkerPool(2, cpus=[0, 100_000, -3]) as pool:
        assert pool.submit_gradient(None, torch.ones(10)).sumsq() == 10.0
    with WorkerPool(1, cpus=[100_000]) as pool:
        assert pool.submit_gradient(None, torch.ones(10)).sumsq() == 10.0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_threads: expected 1 to 4096, got 0"):
        WorkerPool(0)
    with WorkerPool(1) as pool:
        with pytest.raises(ValueError, match="dst has 8 bytes, src has 12; expected as many"):
            pool.submit_copy(torch.zeros(2), torch.zeros(3))
        with pytest.raises(ValueError, match="src: expected a contiguous CPU tensor"):
            pool.submit_copy(torch.zeros(2), torch.zeros(4)[::2])
        with pytest.raises(ValueError, match="dst: expected 3 elements, got 2"):
            pool.submit_gradient(torch.zeros(2), torch.zeros(3))


def test_native_pool_answers_einval_for_tickets_never_issued():
    pool = ffi.new("gn_pool **")
    assert lib.gn_pool_create(pool, 0) == -errno.EINVAL
    assert lib.gn_pool_create(pool, 1) == 0
    assert lib.gn_pool_wait(pool[0], 0, 0) == -errno.EINVAL
    assert lib.gn_pool_wait(pool[0], 1, -1) == -errno.EINVAL
    ticket = ffi.new("uint64_t *")
    assert lib.gn_pool_submit_copy(pool[0], ffi.NULL, ffi.NULL, 1, 0, ticket) == -errno.EINVAL
    assert lib.gn_pool_submit_copy(pool[0], ffi.NULL, ffi.NULL, 0, 0, ticket) == 0
    assert ticket[0] == 1
    assert lib.gn_pool_wait(pool[0], 1, 2**63 - 1) == 0
    assert lib.gn_pool_destroy(pool[0]) == 0
    assert lib.gn_pool_destroy(ffi.NULL) == 0
