"""Spans of copies on a device that plays its events: put on the host's clock, and none before it has ended."""

from __future__ import annotations

import time

import pytest
import torch

from gemini.offload.accelerator import Accelerator
from gemini.offload.device_spans import DeviceSpans
from gemini.offload.transfer import StreamTransfers
from gemini.tiers import MemoryTier, TierLedger


class Device:
    """A clock of its own, in milliseconds, and how far the device has come on it."""

    def __init__(self) -> None:
        self.now_ms = 5000.0
        self.reached_ms = 5000.0

    def event(self) -> Event:
        return Event(self, self.now_ms)


class Event:
    def __init__(self, device: Device, at_ms: float) -> None:
        self.device, self.at_ms = device, at_ms

    def query(self) -> bool:
        return self.device.reached_ms >= self.at_ms

    def synchronize(self) -> None:
        assert self.query()

    def elapsed_time(self, end_event: Event) -> float:
        assert self.query()
        assert end_event.query(), "CUDA refuses the time of an event that has not happened"
        return end_event.at_ms - self.at_ms


def test_spans_are_on_the_hosts_clock_and_come_when_the_device_has_ended_them() -> None:
    device = Device()
    before_ns = time.perf_counter_ns()
    spans = DeviceSpans(device.event)
    after_ns = time.perf_counter_ns()
    tickets = []
    for _ in range(2):
        device.now_ms += 1.0
        begin = spans.begin()
        device.now_ms += 2.5
        tickets.append(spans.end(begin))
    assert spans.take() == []
    device.reached_ms = 5003.5
    (first,) = spans.take()
    assert before_ns + 1_000_000 <= first.begin_ns <= after_ns + 1_000_000
    assert first.end_ns - first.begin_ns == 2_500_000
    device.reached_ms = 5100.0
    (second,) = spans.take()
    assert [first.ticket, second.ticket] == tickets
    assert second.begin_ns - first.end_ns == 1_000_000


@pytest.mark.gpu
def test_copies_of_a_gpu_ran_while_it_was_waited_for() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    transfers = StreamTransfers(Accelerator(device), TierLedger(dict.fromkeys(MemoryTier)))
    told: list[tuple[int, str, int]] = []

    class Recorder:
        def submitted(self, source: object, ticket: int, *, operation: str, record: str, nbytes: int) -> None:
            told.append((ticket, operation, nbytes))

    here = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    there = transfers.allocate(here.numel(), "test")
    transfers.upload(there, here).wait_on_host()
    transfers.record_to(Recorder())
    begin_ns = time.perf_counter_ns()
    transfers.upload(there, here).wait_on_host()
    transfers.download(here, there).wait_on_host()
    end_ns = time.perf_counter_ns()
    first, second = transfers.take_spans()
    transfers.record_to(None)
    slack_ns = 100_000  # between the device's clock and the host's
    assert begin_ns - slack_ns <= first.begin_ns < first.end_ns <= second.begin_ns < second.end_ns <= end_ns + slack_ns
    assert told == [(first.ticket, "upload", here.numel()), (second.ticket, "download", here.numel())]
