"""What has rows of the batch is divided and put together again; what is shared is left alone; the rest is refused."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gemini import ModelError
from gemini.slicing.batch_rows import ArgumentRules, JoinedOutputs, slice_bounds, take_apart

NO_RULES = ArgumentRules()
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
    ("name", "shape", "batch_shape", "expected"),
    [
        ("position_ids", (4, 16), (4, 16, 32), True),
        ("position_ids", (1, 16), (4, 16, 32), False),
        ("position_ids", (3, 3, 16), (3, 16, 32), None),  # one for each kind of position: three rows by chance
        ("attention_mask", (4, 16), (4, 16, 32), True),
        ("attention_mask", (4, 1, 16, 16), (4, 16, 32), True),
        ("attention_mask", (16, 1, 16, 16), (16, 16, 32), True),
        ("attention_mask", (1, 8, 16, 16), (4, 16, 32), False),
        ("attention_mask", (16, 16), (4, 16, 32), False),
        ("attention_mask", (16, 16), (16, 16, 32), None),  # rows of the batch, or queries?
        ("attention_mask", (8, 16, 16), (8, 16, 32), None),  # rows of the batch, or heads?
        ("position_embeddings", (1, 16, 8), (4, 16, 32), False),
        ("position_embeddings", (4, 16, 8), (4, 16, 32), True),
        ("position_embeddings", (16, 8), (16, 16, 32), None),
        ("encoder_hidden_states", (4, 9, 32), (4, 16, 32), True),
        ("position_bias", (4, 8, 16, 16), (4, 16, 32), True),
        ("position_bias", (8, 1, 16), (8, 16, 32), None),
        ("cache_position", (16,), (4, 16, 32), False),
        ("cache_position", (16,), (16, 16, 32), None),
        ("layer_head_mask", (8,), (8, 16, 32), None),
        ("alibi", (8, 1, 16), (4, 16, 32), False),  # a row for each head of each row: nobody can know
        ("x", (4, 16, 32), (4, 16, 32), None),
        ("x", (1, 16), (1, 16, 32), True),  # a batch of one row is not cut
        ("x", (), (4, 16, 32), False),
        ("mine", (4,), (4, 16, 32), True),
        ("mine", (3,), (4, 16, 32), False),
        ("ours", (4, 16, 32), (4, 16, 32), False),
    ],
)
def test_names_and_dimensions_tell_what_has_rows(name, shape, batch_shape, expected):
    rules = ArgumentRules(batch_names=("mine",), shared_names=("ours",))
    assert rules.has_rows(name, shape, batch_shape) is expected


def test_what_the_user_says_comes_before_what_names_say():
    rules = ArgumentRules(batch_names=("position_bias",), shared_names=("attention_mask",))
    assert rules.has_rows("position_bias", (8, 1, 16), (8, 16, 32)) is True
    assert rules.has_rows("attention_mask", (4, 1, 16, 16), (4, 16, 32)) is False


def test_names_of_torchs_blocks_say_nothing_about_others():
    assert ArgumentRules.of(nn.MultiheadAttention(4, 1)).has_rows("key", (3, 5, 4), (3, 5, 4)) is True
    assert ArgumentRules.of(nn.Identity()).has_rows("key", (3, 5, 4), (3, 5, 4)) is None


def test_positional_arguments_go_by_the_names_of_parameters():
    class Block(nn.Module):
        def forward(self, x: Any, mask: Any = None, *others: Any, ids: Any = None) -> None: ...

    rules = ArgumentRules.of(Block())
    assert [rules.name_of(position) for position in range(3)] == ["x", "mask", "2"]


def test_arguments_are_divided_wherever_they_are_nested():
    batch, mask, table = torch.randn(5, 3, 2), torch.randn(5, 1, 3, 3), torch.randn(1, 3, 2)
    args = (batch, None, [mask, 7])
    kwargs = {"tables": Pair(table, table), "deep": {"ids": torch.arange(15).view(5, 3)}, "name": "x"}
    rules = ArgumentRules(positional_names=("x", "scale", "masks"), batch_names=("masks", "deep"))
    call, tensors = take_apart(args, kwargs, block_name="block", rules=rules)  # type: ignore[misc]
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


def test_the_batch_is_the_first_tensor_that_is_not_shared():
    mask, batch = torch.ones(4, 4), torch.ones(3, 4, 2)
    rules = ArgumentRules(shared_names=("mask",))
    call, tensors = take_apart((), {"mask": mask, "x": batch}, block_name="block", rules=rules)  # type: ignore[misc]
    assert tensors[call.batch_index] is batch
    assert (call.num_rows, call.is_sliced) == (3, (False, True))
    assert take_apart((), {"mask": mask}, block_name="block", rules=rules) is None


def test_the_batch_may_be_given_twice_and_be_shared_once():
    batch = torch.ones(3, 4, 2)
    rules = ArgumentRules(shared_names=("context",))
    call, _ = take_apart((batch, batch), {"context": batch}, block_name="block", rules=rules)  # type: ignore[misc]
    assert call.is_sliced == (True, True, False)


def test_a_call_keeps_no_tensor():
    args = (torch.ones(2, 2), [torch.ones(1, 2)])
    call, _ = take_apart(args, {"mask": torch.ones(3, 1)}, block_name="block", rules=NO_RULES)  # type: ignore[misc]
    assert not any(isinstance(leaf, torch.Tensor) for leaf in call.leaves)


def test_a_call_without_tensors_has_no_batch():
    assert take_apart((3,), {"name": "x"}, block_name="block", rules=NO_RULES) is None


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
            r"'mask'\] of block b has shape \(3, 3\).*name \"mask\" in GeminiConfig.batch_arguments or",
        ),
        (
            (torch.ones(3, 2), [torch.ones(3, 5)]),
            {},
            r"argument \[1\]\[0\] of block b .*name \"1\" in.*if \[0\], the first",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(args, kwargs, message):
    with pytest.raises(ModelError, match=message):
        take_apart(args, kwargs, block_name="block b", rules=NO_RULES)


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
