"""Words that processes share: who waits is woken by who stores, and finds what was stored before."""

from __future__ import annotations

import mmap
import os
import threading
import warnings

import pytest
import torch
from patience import PATIENCE_S

from gemini.kernels.events import SharedWords

pytestmark = pytest.mark.processes


def shared_memory() -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.uint8)


def wait_for(words: SharedWords, index: int, value: int) -> None:
    while True:
        seen = words.event()
        if words.load(index) >= value:
            return
        assert words.wait(seen, PATIENCE_S)


def test_words_are_stored_and_loaded():
    words = SharedWords(shared_memory())
    assert words.num_words == 511
    words.store(510, 1 << 63)
    assert [words.load(index) for index in (0, 509, 510)] == [0, 0, 1 << 63]


def test_a_wait_for_a_signal_that_has_come_returns_at_once():
    words = SharedWords(shared_memory())
    seen = words.event()
    words.signal()
    assert words.wait(seen, PATIENCE_S)
    assert words.event() == seen + 1


def test_a_wait_ends_with_its_time():
    words = SharedWords(shared_memory())
    assert not words.wait(words.event(), 0.01)


def test_a_waiting_thread_leaves_the_interpreter_to_others():
    words = SharedWords(shared_memory())
    waiter = threading.Thread(target=wait_for, args=(words, 3, 1))
    waiter.start()
    words.store(3, 1)
    words.signal()
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive()


def test_another_process_is_woken_and_sees_what_was_stored():
    memory = shared_memory()
    mine, theirs = SharedWords(memory[:2048]), SharedWords(memory[2048:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        for number in range(1, 101):
            wait_for(mine, 0, number)
            is_right = mine.load(1) == number * number
            theirs.store(0, number if is_right else 1000)
            theirs.signal()
        os._exit(0)
    for number in range(1, 101):
        mine.store(1, number * number)
        mine.store(0, number)
        mine.signal()
        wait_for(theirs, 0, number)
    assert theirs.load(0) == 100
    assert os.waitpid(child, 0)[1] == 0
