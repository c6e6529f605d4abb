"""What describe_model reads off a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemini.errors import ModelError
from gemini.model.module_tree import ModuleTree, describe_model

BF16 = torch.bfloat16


def describe(model: nn.Module) -> ModuleTree:
    return describe_model(model, working_dtype=BF16)


def compiled(module: nn.Module) -> nn.Module:
    # The default backend would import for seconds.
    return torch.compile(module, backend="eager")


def test_nodes_are_listed_in_preorder_with_their_own_params() -> None:
    tree = describe(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3))))
    assert [(node.name, node.class_name, node.child_names, node.param_names) for node in tree.nodes] == [
        ("", "Sequential", ("0", "1"), ()),
        ("0", "Linear", (), ("0.weight", "0.bias")),
        ("1", "Sequential", ("1.0",), ()),
        ("1.0", "LayerNorm", (), ("1.0.weight", "1.0.bias")),
    ]


def test_containers_without_forward_are_not_called() -> None:
    model = nn.ModuleDict({"row": nn.ModuleList([nn.Linear(1, 1)]), "chain": nn.Sequential(nn.Linear(1, 1))})
    model["bag"] = nn.ParameterList([torch.zeros(1)])
    nodes = describe(model).node_by_name
    assert {name: nodes[name].is_called for name in ("", "row", "chain", "bag", "row.0")} == {
        "": False,
        "row": False,
        "chain": True,
        "bag": False,
        "row.0": True,
    }
    assert [name for name in nodes if nodes[name].is_container] == ["", "row", "chain"]


def test_tied_params_have_one_entry_at_the_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    tree = describe(model)
    assert [(entry.spec.name, entry.aliases) for entry in tree.params] == [("0.weight", ("1.weight",))]
    assert tree.node_by_name["1"].param_names == ("0.weight",)


def test_shared_module_is_one_node_under_both_parents() -> None:
    shared = nn.Linear(2, 2, bias=False)
    tree = describe(nn.Sequential(nn.Sequential(shared), nn.Sequential(shared)))
    assert [node.name for node in tree.nodes] == ["", "0", "0.0", "1"]
    assert tree.node_by_name["1"].child_names == ("0.0",)
    assert tree.params[0].aliases == ("1.0.weight",)


def test_compiled_module_is_one_node_at_the_wrapper() -> None:
    model = nn.Sequential(compiled(nn.Sequential(nn.Linear(2, 2))), nn.Linear(2, 2))
    tree = describe(model)
    wrapper = tree.node_by_name["0"]
    assert [node.name for node in tree.nodes] == ["", "0", "0._orig_mod.0", "1"]
    assert (wrapper.class_name, wrapper.is_compiled, wrapper.is_called) == ("Sequential", True, True)
    assert wrapper.child_names == ("0._orig_mod.0",)
    assert tree.params[0].spec.name == "0._orig_mod.0.weight"


def test_compiled_model_keeps_its_parameter_names() -> None:
    tree = describe(compiled(nn.Linear(2, 2)))
    assert [node.name for node in tree.nodes] == [""]
    assert tree.nodes[0].param_names == ("_orig_mod.weight", "_orig_mod.bias")


def test_module_both_compiled_and_bare_is_one_node() -> None:
    inner = nn.Linear(2, 2)
    tree = describe(nn.ModuleList([inner, compiled(inner)]))
    assert [(node.name, node.child_names) for node in tree.nodes] == [("", ("0", "0")), ("0", ())]


def test_attention_is_atomic() -> None:
    nodes = describe(nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))).node_by_name
    assert [name for name in nodes if nodes[name].is_atomic] == ["0"]


@pytest.mark.parametrize("listed", [["Linear"], ("Linear",), {"Linear"}, "Linear"])
def test_no_split_classes_are_gathered_from_any_module(listed: object) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    model._no_split_modules = None
    model[0]._no_split_modules = listed
    assert describe(model).no_split_classes == {"Linear"}


def test_floating_point_params_get_the_working_dtype_and_others_keep_theirs() -> None:
    model = nn.ParameterDict({"weight": torch.zeros(2), "frozen": nn.Parameter(torch.zeros(2).half(), False)})
    model["codes"] = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    specs = {entry.spec.name: (entry.spec.dtype, entry.spec.is_trainable) for entry in describe(model).params}
    assert specs == {"weight": (BF16, True), "frozen": (BF16, False), "codes": (torch.int8, False)}


def test_params_are_numbered_in_model_order() -> None:
    tree = describe(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    assert [(entry.spec.index, entry.spec.shape) for entry in tree.params] == [
        (0, (3, 2)),
        (1, (3,)),
        (2, (1, 3)),
        (3, (1,)),
    ]


def test_complex_param_raises() -> None:
    model = nn.ParameterDict({"phase": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ModelError, match=r"parameter phase has dtype torch.complex64: expected a real dtype"):
        describe(model)


def test_lazy_param_raises() -> None:
    with pytest.raises(ModelError, match=r"parameter weight has no shape yet.*run one batch"):
        describe(nn.LazyLinear(2))


def test_tree_keeps_no_tensor_alive() -> None:
    model = nn.Linear(2, 2)
    tree = describe(model)
    values = [value for entry in tree.params for value in (entry.aliases, entry.spec.name, entry.spec.shape)]
    assert not any(isinstance(value, torch.Tensor) for value in values)
    assert hash(tree.nodes) == hash(describe(model).nodes)
