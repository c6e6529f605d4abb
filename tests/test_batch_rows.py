"""What has rows of the batch is divided and put together again; what is shared is left alone; the rest is refused."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemini import ModelError
from gemini.batch_rows import JoinedOutputs, has_rows, slice_bounds, take_apart

Pair = namedtuple("Pair", "first second")

# ---------------------------------------------------------------- dividing


@given(num_rows=st.integers(1, 300), num_slices=st.integers(1, 40))
def test_slices_cover_the_batch_in_order_and_differ_by_one_row_at_most(num_rows, num_slices):
    bounds = slice_bounds(num_rows, num_slices)
    assert [row for begin, end in bounds for row in range(begin, end)] == list(range(num_rows))
    lengths = [end - begin for begin, end in bounds]
    assert len(bounds) == min(num_rows, num_slices)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("shape", "first_shape", "expected"),
    [
        ((4, 16), (4, 16, 32), True),  # position ids
        ((4, 1, 16, 16), (4, 16, 32), True),  # a mask for each row
        ((1, 1, 16, 16), (4, 16, 32), False),  # a mask for all
        ((1, 16, 8), (4, 16, 32), False),  # rotary tables
        ((16, 16), (4, 16, 32), False),
        ((), (4, 16, 32), False),
        ((8, 1, 16), (4, 16, 32), False),  # a row for each head of each row: nobody can know
        ((4,), (4, 16, 32), True),
        ((16, 16), (16, 16, 32), None),  # rows of the batch, or positions?
        ((16,), (16, 16, 32), None),
        ((32,), (32, 16, 32), None),  # rows of the batch, or features?
        ((16, 1, 16, 16), (16, 16, 32), True),
        ((16, 16, 32), (16, 16, 32), True),
        ((1, 16), (1, 16, 32), True),
        ((4, 8), (4,), True),
    ],
)
def test_dimension_0_tells_what_has_rows(shape, first_shape, expected):
    assert has_rows(shape, first_shape) is expected


def test_arguments_are_divided_wherever_they_are_nested():
    batch, mask, table = torch.randn(5, 3, 2), torch.randn(5, 1, 3, 3), torch.randn(1, 3, 2)
    args = (batch, None, [mask, 7])
    kwargs = {"tables": Pair(table, table), "deep": {"ids": torch.arange(15).view(5, 3)}, "name": "x"}
    call, tensors = take_apart(args, kwargs, block_name="block")  # type: ignore[misc]
    found_args, found_kwargs = call.arguments(call.rows_of(tensors, 1, 3))
    assert call.num_rows == 5
    assert torch.equal(found_args[0], batch[1:3])
    assert found_args[1] is None
    assert torch.equal(found_args[2][0], mask[1:3])
    assert found_args[2][1] == 7
    assert isinstance(found_kwargs["tables"], Pair)
    assert found_kwargs["tables"].second is table
    assert torch.equal(found_kwargs["deep"]["ids"], torch.arange(3, 9).view(2, 3))
    assert found_kwargs["name"] == "x"


def test_a_call_keeps_no_tensor():
    call, _ = take_apart((torch.ones(2, 2),), {"mask": torch.ones(2, 1)}, block_name="block")  # type: ignore[misc]
    assert not any(isinstance(leaf, torch.Tensor) for leaf in call.leaves)


def test_a_call_without_tensors_has_no_batch():
    assert take_apart((3,), {"name": "x"}, block_name="block") is None


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (torch.ones(4, 3),),
            {"past": SimpleNamespace()},
            r"'past'\] of block b is a SimpleNamespace.*use_cache",
        ),
        ((torch.ones(4, 3), [1, {2}]), {}, r"argument \[1\]\[1\] of block b is a set"),
        ((torch.ones(()),), {}, "of block b is a scalar"),
        (
            (torch.ones(3, 3, 2),),
            {"mask": torch.ones(3, 3)},
            r"'mask'\] of block b has shape \(3, 3\).*be told",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(args, kwargs, message):
    with pytest.raises(ModelError, match=message):
        take_apart(args, kwargs, block_name="block b")


# ---------------------------------------------------------------- putting together


def join(*outputs: tuple[Any, int, int], num_rows: int = 3) -> Any:
    joined = JoinedOutputs(num_rows, block_name="block b")
    for output, begin, end in outputs:
        joined.add(output, begin, end)
    return joined.build(joined.leaves)


@given(num_rows=st.integers(1, 9), num_slices=st.integers(1, 5))
def test_what_was_divided_is_put_together_again(num_rows, num_slices):
    whole = {"hidden": torch.randn(num_rows, 2), "others": (torch.arange(num_rows), None, "tag")}
    slices = [
        ({"hidden": whole["hidden"][a:b], "others": (whole["others"][0][a:b], None, "tag")}, a, b)
        for a, b in slice_bounds(num_rows, num_slices)
    ]
    found = join(*slices, num_rows=num_rows)
    assert torch.equal(found["hidden"], whole["hidden"])
    assert torch.equal(found["others"][0], whole["others"][0])
    assert found["others"][1:] == (None, "tag")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([(torch.ones(()), 0, 2)], r"block b returned a tensor of shape \(\) for a slice of 2 rows"),
        ([((torch.ones(2, 1), torch.ones(1, 5)), 0, 2)], r"a tensor of shape \(1, 5\) for a slice of 2 rows"),
        ([(SimpleNamespace(), 0, 2)], "returned a SimpleNamespace"),
        ([(torch.ones(2, 1), 0, 2), ((torch.ones(1, 1),), 2, 3)], "another structure"),
        ([(torch.ones(2, 1), 0, 2), (torch.ones(1, 2), 2, 3)], "another value or shape"),
        ([((torch.ones(2, 1), 1), 0, 2), ((torch.ones(1, 1), 2), 2, 3)], "another value or shape"),
    ],
)
def test_what_cannot_be_put_together_is_refused(outputs, message):
    with pytest.raises(ModelError, match=message):
        join(*outputs)
