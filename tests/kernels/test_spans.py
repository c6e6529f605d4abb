"""When native jobs and transfers ran: their spans lie where the clock says, and cost nothing while nobody asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gemini._native import ffi, lib

from gemini.kernels.pool import WorkerPool
from gemini.kernels.spans import SpanSource, read_spans
from gemini.offload.io import IoBackend, IoEngine, IoFile, IoOpenFlag, available_backends, empty_aligned
from gemini.offload.io_backends import native_number

NBYTES = 1 << 20


class Told(NamedTuple):
    ticket: int
    operation: str
    record: str
    nbytes: int


class Recorder:
    def __init__(self) -> None:
        self.told: list[Told] = []

    def submitted(self, source: SpanSource, ticket: int, *, operation: str, record: str, nbytes: int) -> None:
        self.told.append(Told(ticket, operation, record, nbytes))


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as made:
        yield made


@pytest.fixture
def native_pool() -> Iterator[Any]:
    pool = ffi.new("gn_pool **")
    assert lib.gn_pool_create(pool, 2) == 0
    yield pool[0]
    assert lib.gn_pool_destroy(pool[0]) == 0


@pytest.fixture(params=available_backends(), ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> IoBackend:
    assert isinstance(request.param, IoBackend)
    return request.param


@pytest.fixture
def engine(backend: IoBackend) -> Iterator[IoEngine]:
    with IoEngine(backend) as made:
        yield made


@pytest.fixture
def file(engine: IoEngine, tmp_path: Path) -> IoFile:
    return engine.open(tmp_path / "file", IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.CREATE)


def copy(pool: WorkerPool, record: str = "") -> None:
    pool.submit_copy(torch.empty(NBYTES), torch.zeros(NBYTES), record=record).wait()


def test_jobs_have_the_spans_in_which_they_ran(pool: WorkerPool) -> None:
    recorder = Recorder()
    pool.record_to(recorder)
    begin_ns = time.perf_counter_ns()
    copy(pool, "first")
    between_ns = time.perf_counter_ns()
    pool.submit_gradient(None, torch.ones(NBYTES), record="second").wait()
    end_ns = time.perf_counter_ns()
    first, second = pool.take_spans()
    assert begin_ns <= first.begin_ns < first.end_ns <= between_ns <= second.begin_ns < second.end_ns <= end_ns
    assert recorder.told == [
        (first.ticket, "copy", "first", 4 * NBYTES),
        (second.ticket, "gradient", "second", 4 * NBYTES),
    ]
    assert pool.take_spans() == []


def test_a_span_begins_when_the_job_does_and_not_when_it_is_queued() -> None:
    with WorkerPool(1) as pool:
        pool.record_to(Recorder())
        buffers = [(torch.empty(NBYTES), torch.zeros(NBYTES)) for _ in range(3)]
        tickets = [pool.submit_copy(dst, src) for dst, src in buffers]
        for ticket in tickets:
            ticket.wait()
        spans = pool.take_spans()
    assert len(spans) == 3
    assert all(a.end_ns <= b.begin_ns for a, b in pairwise(spans))


def test_nothing_is_kept_before_recording_and_after(pool: WorkerPool) -> None:
    recorder = Recorder()
    copy(pool)
    assert pool.take_spans() == []
    pool.record_to(recorder)
    copy(pool)
    pool.record_to(None)
    copy(pool)
    assert pool.take_spans() == []
    assert len(recorder.told) == 1


def test_more_spans_than_a_batch_come_in_their_order(pool: WorkerPool) -> None:
    pool.record_to(Recorder())
    for ticket in [pool.submit_copy(torch.empty(1), torch.ones(1)) for _ in range(2500)]:
        ticket.wait()
    ends = [span.end_ns for span in pool.take_spans()]
    assert len(ends) == 2500
    assert ends == sorted(ends)


def test_what_nobody_takes_is_lost_beyond_the_capacity(native_pool: Any) -> None:
    def copy_one_byte() -> None:
        source, target, ticket = ffi.new("char *"), ffi.new("char *"), ffi.new("uint64_t *")
        assert lib.gn_pool_submit_copy(native_pool, target, source, 1, 0, ticket) == 0
        assert lib.gn_pool_wait(native_pool, ticket[0], -1) == 0

    spans = ffi.new("gn_span[]", 9)
    assert lib.gn_pool_keep_spans(native_pool, 2) == 0
    for _ in range(5):
        copy_one_byte()
    assert lib.gn_pool_take_spans(native_pool, spans, 9) == 2
    copy_one_byte()
    assert lib.gn_pool_take_spans(native_pool, spans, 9) == 1


@pytest.mark.parametrize("capacity", [-1, lib.GN_MAX_SPANS + 1])
def test_a_capacity_out_of_range_is_refused(capacity: int, native_pool: Any, backend: IoBackend) -> None:
    assert lib.gn_pool_keep_spans(native_pool, capacity) == -22
    native_engine = ffi.new("gn_io **")
    assert lib.gn_io_create(native_engine, native_number(backend), 4, 2) == 0
    assert lib.gn_io_keep_spans(native_engine[0], capacity) == -22
    assert lib.gn_io_take_spans(native_engine[0], ffi.NULL, 1) == -22
    assert lib.gn_io_destroy(native_engine[0]) == 0


def test_an_error_ends_the_reading() -> None:
    assert read_spans(lambda spans, count: -22) == []


def test_transfers_have_the_spans_in_which_they_ran(engine: IoEngine, file: IoFile) -> None:
    recorder, buffer = Recorder(), empty_aligned(NBYTES, torch.uint8)
    engine.record_to(recorder)
    begin_ns = time.perf_counter_ns()
    file.write(buffer, 0).wait()
    between_ns = time.perf_counter_ns()
    file.read(buffer, 0).wait()
    end_ns = time.perf_counter_ns()
    first, second = engine.take_spans()
    assert begin_ns <= first.begin_ns < first.end_ns <= between_ns <= second.begin_ns < second.end_ns <= end_ns
    assert recorder.told == [(first.ticket, "write", "", NBYTES), (second.ticket, "read", "", NBYTES)]


def test_transfers_are_kept_only_while_they_are_recorded(engine: IoEngine, file: IoFile) -> None:
    buffer = empty_aligned(NBYTES, torch.uint8)
    file.write(buffer, 0).wait()
    engine.record_to(Recorder())
    engine.record_to(None)
    file.write(buffer, 0).wait()
    assert engine.take_spans() == []
