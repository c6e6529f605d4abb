"""Where the parts of a state record lie, and masters split and put together again."""

from __future__ import annotations

import pytest
import torch

from gemini.update.state_record import follow_changes, join_masters, record_views, split_masters

# One is no bfloat16 (1 + 2**-9 lies between 1 and 1 + 2**-7), one no float16, one is both.
MASTERS = (1.001953125, 1.0001220703125, -2.5)


def test_a_record_has_three_padded_parts() -> None:
    record = torch.arange(3 * 8192, dtype=torch.int64).to(torch.uint8)
    master, momentum, variance = record_views(record[: 4096 + 2 * 8192], 2000, torch.bfloat16)
    assert master is not None
    assert (master.dtype, master.numel()) == (torch.int16, 2000)
    base = record.data_ptr()
    assert [master.data_ptr() - base, momentum.data_ptr() - base, variance.data_ptr() - base] == [0, 4096, 12_288]
    assert record_views(record[: 2 * 8192], 2000, torch.float32)[0] is None


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [(torch.bfloat16, 4096), (torch.float16, 8192), (torch.float32, 0)], ids=str
)
def test_moments_follow_the_master(dtype: torch.dtype, nbytes: int) -> None:
    record = torch.zeros(3 * 8192, dtype=torch.uint8)
    _, momentum, variance = record_views(record, 2000, dtype)
    starts = [part.data_ptr() - record.data_ptr() for part in (momentum, variance)]
    assert starts == [nbytes, nbytes + 8192]


def split(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the working weights of `MASTERS` and what the record has of them."""
    record = torch.zeros(3 * 4096, dtype=torch.uint8)
    working, rest = torch.zeros(3, dtype=dtype), record_views(record, 3, dtype)[0]
    split_masters(working, rest, torch.tensor(MASTERS))
    return working, rest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masters_survive_being_split(dtype: torch.dtype) -> None:
    working, rest = split(dtype)
    joined = torch.zeros(3)
    join_masters(joined, working, rest)
    assert joined.tolist() == list(MASTERS)
    assert torch.equal(working, torch.tensor(MASTERS).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_masters_of_changed_weights_follow(dtype: torch.dtype) -> None:
    working, rest = split(dtype)
    assert rest is not None
    new = working.clone()
    new[1] = 8.0
    follow_changes(rest, new, working)
    joined = torch.zeros(3)
    join_masters(joined, new, rest)
    assert joined.tolist() == [MASTERS[0], 8.0, MASTERS[2]]
