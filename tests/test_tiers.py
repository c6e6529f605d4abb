"""Bytes as text and the ledger that counts them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini.errors import ConfigError, OutOfTierMemoryError
from gemini.tiers import MemoryTier, TierLedger, TileGrid, format_nbytes, parse_nbytes, round_up, size_class

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        ("1", 1),
        ("4096 B", 4096),
        ("6GiB", 6 * 2**30),
        ("6GB", 6 * 10**9),
        ("1.5 KiB", 1536),
        (" 2 mib ", 2 * 2**20),
        ("0.5TB", 5 * 10**11),
        ("3kb", 3000),
        ("1.9B", 1),
    ],
)
def test_bytes_are_read_in_either_kind_of_unit(text: str | int, nbytes: int) -> None:
    assert parse_nbytes(text, name="x") == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "6 XiB", "-1GiB", "6 GiB extra", "1e3", "1,5GiB", ".5GiB", "six"])
def test_text_that_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r'^my_budget: cannot read .* as bytes; write for example "6GiB"'):
        parse_nbytes(text, name="my_budget")


@pytest.mark.parametrize("value", [True, 1.5, None, b"6GiB", float("nan")])
def test_values_of_another_type_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^my_budget: expected bytes as an int or a str .* got "):
        parse_nbytes(value, name="my_budget")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, "0", "0.4B", "0GiB"])
def test_nothing_is_no_budget(value: str | int) -> None:
    with pytest.raises(ConfigError, match=r"^my_budget: expected more than 0 bytes, got "):
        parse_nbytes(value, name="my_budget")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**29, "1.50 GiB"), (-(2**20), "-1.00 MiB")],
)
def test_bytes_are_written_with_a_binary_unit(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_rounding_up_gives_the_next_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple


@pytest.mark.parametrize(
    ("numel", "ranges"),
    [
        (0, []),
        (1, [(0, 1)]),
        (4096, [(0, 4096)]),
        (4097, [(0, 4096), (4096, 4097)]),
        (10_000, [(0, 4096), (4096, 8192), (8192, 10_000)]),
    ],
)
def test_tiles_are_of_one_length_but_for_the_last(numel: int, ranges: list[tuple[int, int]]) -> None:
    grid = TileGrid(numel, 4096)
    assert [grid.range_of(tile) for tile in range(grid.num_tiles)] == ranges
    assert [grid.length_of(tile) for tile in range(grid.num_tiles)] == [end - begin for begin, end in ranges]


def test_ledger_counts_by_purpose_and_keeps_the_peak() -> None:
    ledger = TierLedger({HOST: 100})
    ledger.charge(HOST, "state", 60)
    ledger.charge(HOST, "working", 40)
    ledger.credit(HOST, "state", 60)
    assert ledger.by_purpose(HOST) == {"working": 40}
    assert (ledger.held_nbytes(HOST), ledger.peak_nbytes(HOST), ledger.budget_nbytes(HOST)) == (40, 100, 100)
    assert (ledger.held_nbytes(DEVICE), ledger.peak_nbytes(DEVICE), ledger.budget_nbytes(DEVICE)) == (0, 0, None)


def test_ledger_refuses_one_byte_too_many_and_records_nothing() -> None:
    ledger = TierLedger({HOST: 8192})
    ledger.charge(HOST, "state", 4096)
    message = (
        r"^host tier: 4.00 KiB more for working exceed the budget of 8.00 KiB, of which 4.00 KiB are held; "
        r"raise host_budget or keep more in a lower tier$"
    )
    with pytest.raises(OutOfTierMemoryError, match=message):
        ledger.charge(HOST, "working", 4097)
    assert ledger.by_purpose(HOST) == {"state": 4096}
    assert ledger.peak_nbytes(HOST) == 4096


def test_a_tier_without_a_budget_takes_everything() -> None:
    ledger = TierLedger({NVME: None})
    ledger.charge(NVME, "state", 2**60)
    ledger.charge(DEVICE, "state", 2**60)
    assert ledger.held_nbytes(NVME) == ledger.held_nbytes(DEVICE) == 2**60


@given(st.integers(1, 1 << 45))
def test_a_size_class_is_little_more_and_there_are_few(nbytes: int) -> None:
    found = size_class(nbytes)
    assert found % 4096 == 0
    assert nbytes <= found
    assert found < nbytes + max(4096, nbytes / 8)
    assert size_class(found) == found
    assert found // (1 << max(found.bit_length() - 4, 12)) * (1 << max(found.bit_length() - 4, 12)) == found
