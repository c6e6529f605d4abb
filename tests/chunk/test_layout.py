"""Packing: where each parameter lies, and which chunks a unit needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gemini.chunk.layout import PLACE_ALIGNMENT_NUMEL, ChunkLayout, build_layout, layout_summary
from gemini.model.module_tree import ModuleNode, ModuleTree, ParamEntry, describe_model
from gemini.model.params import ParamSpec
from gemini.tiers import round_up

BF16 = torch.bfloat16


def layout_of(model: nn.Module, *, max_small_nbytes: int = 0) -> ChunkLayout:
    return build_layout(describe_model(model, working_dtype=BF16), max_small_nbytes=max_small_nbytes)


def units_of(layout: ChunkLayout) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return [(unit.module_name, unit.own_chunk_ids, unit.chunk_ids) for unit in layout.units]


class Tied(nn.Module):
    """An embedding, two blocks and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_params_start_at_multiples_of_the_alignment() -> None:
    layout = layout_of(nn.Linear(10, 10))
    assert [(place.spec.name, place.begin, place.end) for place in layout.chunks[0].places] == [
        ("weight", 0, 100),
        ("bias", 128, 138),
    ]
    assert layout.chunks[0].numel == 192
    assert layout.chunks[0].working_nbytes == 384


def test_single_leaf_is_a_root_unit_with_one_chunk() -> None:
    assert units_of(layout_of(nn.Linear(4, 4))) == [("", (0,), (0,))]


def test_root_unit_is_first_even_where_it_owns_nothing() -> None:
    layout = layout_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert units_of(layout) == [("", (), ()), ("0", (0,), (0,)), ("1", (1,), (1,))]


def test_model_without_parameters_has_a_root_unit_and_no_chunk() -> None:
    assert units_of(layout_of(nn.ReLU())) == [("", (), ())]


def test_tied_params_have_one_slot_and_both_units_need_its_chunk() -> None:
    layout = layout_of(Tied())
    assert units_of(layout) == [
        ("", (), ()),
        ("embed", (0,), (0,)),
        ("blocks.0", (1,), (1,)),
        ("blocks.1", (2,), (2,)),
        ("head", (), (0,)),
    ]
    assert "head.weight" not in layout.place_by_name


def test_tied_params_that_the_root_holds_belong_to_the_root() -> None:
    layout = layout_of(Tied(), max_small_nbytes=1600)
    assert units_of(layout) == [("", (0,), (0,)), ("blocks.0", (1,), (1,)), ("blocks.1", (2,), (2,))]


def test_unit_without_chunks_of_its_own_or_of_others_is_left_out() -> None:
    model = Tied()
    model.register_parameter("table", model.embed.weight)
    assert [unit.module_name for unit in layout_of(model).units] == ["", "blocks.0", "blocks.1"]


def test_equal_units_get_equal_chunks() -> None:
    layout = layout_of(nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10)))
    first, second = layout.chunks
    assert [place.begin for place in first.places] == [place.begin for place in second.places]
    assert first.numel == second.numel


def test_frozen_and_trainable_params_lie_in_separate_chunks() -> None:
    block = nn.Linear(16, 16)
    block.weight.requires_grad_(False)
    layout = layout_of(nn.Sequential(block, nn.Linear(16, 16)))
    assert [(chunk.unit_id, chunk.is_trainable, chunk.numel) for chunk in layout.chunks] == [
        (1, False, 256),
        (1, True, 64),
        (2, True, 320),
    ]
    assert layout.units[1].own_chunk_ids == (0, 1)


def test_integer_params_lie_in_a_chunk_of_their_dtype() -> None:
    model = nn.Linear(4, 4)
    model.register_parameter("codes", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    layout = layout_of(model)
    assert [(chunk.dtype, chunk.is_trainable) for chunk in layout.chunks] == [(BF16, True), (torch.int8, False)]


def test_default_threshold_leaves_up_to_one_mebibyte_to_the_root() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Embedding(2**19, 1)
            self.large = nn.Embedding(2**19 + 1, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.small(ids) + self.large(ids)

    with torch.device("meta"):
        tree = describe_model(Model(), working_dtype=BF16)
    assert [unit.module_name for unit in build_layout(tree).units] == ["", "large"]


def test_summary_names_counts_bytes_and_the_largest_unit() -> None:
    assert layout_summary(layout_of(Tied())).splitlines() == [
        "5 parameters in 3 chunks of 5 units: 2.88 KiB of working weights, 2.88 KiB trainable, 128 elements of padding",
        "root unit, needed during the whole step: 0 B",
        "largest other unit: embed, 1.62 KiB",
    ]


SPECS = st.tuples(
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from([torch.bfloat16, torch.float32, torch.int8]),
    st.booleans(),
)


def flat_tree(drawn: list[tuple[tuple[int, ...], torch.dtype, bool]], num_modules: int) -> ModuleTree:
    """Deal parameters out to the children of one ModuleList, in order."""
    specs = [
        ParamSpec(name=f"p{index:03}", index=index, shape=shape, dtype=dtype, is_trainable=is_trainable)
        for index, (shape, dtype, is_trainable) in enumerate(drawn)
    ]
    share = -(-len(specs) // num_modules) or 1
    leaves = [
        ModuleNode(
            name=str(index),
            class_name="Leaf",
            child_names=(),
            param_names=tuple(spec.name for spec in specs[index * share : (index + 1) * share]),
            is_called=True,
            is_container=False,
            is_atomic=False,
            is_compiled=False,
        )
        for index in range(num_modules)
    ]
    root = ModuleNode(
        name="",
        class_name="ModuleList",
        child_names=tuple(leaf.name for leaf in leaves),
        param_names=(),
        is_called=False,
        is_container=True,
        is_atomic=False,
        is_compiled=False,
    )
    return ModuleTree(nodes=(root, *leaves), params=tuple(ParamEntry(spec=spec, aliases=()) for spec in specs))


@given(drawn=st.lists(SPECS, max_size=30), num_modules=st.integers(1, 5))
def test_packing_is_aligned_ordered_and_complete(
    drawn: list[tuple[tuple[int, ...], torch.dtype, bool]], num_modules: int
) -> None:
    tree = flat_tree(drawn, num_modules)
    layout = build_layout(tree, max_small_nbytes=0)
    assert sorted(layout.place_by_name) == [entry.spec.name for entry in tree.params]
    assert sum(len(chunk.places) for chunk in layout.chunks) == len(drawn)
    for index, chunk in enumerate(layout.chunks):
        assert chunk.chunk_id == index
        assert index in layout.units[chunk.unit_id].own_chunk_ids
        assert chunk.numel == round_up(max(chunk.places[-1].end, 1), PLACE_ALIGNMENT_NUMEL)
        for place in chunk.places:
            assert place.begin % PLACE_ALIGNMENT_NUMEL == 0
            assert (place.chunk_id, place.spec.dtype) == (index, chunk.dtype)
            assert place.spec.is_trainable == chunk.is_trainable
        for before, after in zip(chunk.places, chunk.places[1:], strict=False):
            assert before.end <= after.begin
            assert before.spec.index < after.spec.index


@given(drawn=st.lists(SPECS, max_size=12), num_modules=st.integers(1, 4))
def test_layout_is_a_function_of_the_tree(
    drawn: list[tuple[tuple[int, ...], torch.dtype, bool]], num_modules: int
) -> None:
    assert build_layout(flat_tree(drawn, num_modules)) == build_layout(flat_tree(drawn, num_modules))


@given(order=st.permutations(["a", "b", "c", "d"]))
def test_units_and_chunks_follow_module_order(order: list[str]) -> None:
    layout = layout_of(nn.ModuleDict({name: nn.Linear(4, 4) for name in order}))
    assert [unit.module_name for unit in layout.units[1:]] == order
    assert [unit.own_chunk_ids for unit in layout.units[1:]] == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_params_have_slots(shape: tuple[int, ...]) -> None:
    model = nn.Linear(4, 4)
    model.register_parameter("extra", nn.Parameter(torch.zeros(shape)))
    layout = layout_of(model)
    place = layout.place_by_name["extra"]
    assert place.begin == 0 or place.begin % PLACE_ALIGNMENT_NUMEL == 0
    assert place.end - place.begin == (1 if shape == () else 0)
