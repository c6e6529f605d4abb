"""Models of every family train as in plain torch, wherever their parameters live."""

from __future__ import annotations

from functools import cache

import pytest
from model_zoo import ZOO
from training_harness import Run, config_for, distance, is_close, same_bits, train_gemini, train_plain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@cache
def plain(name: str) -> Run:
    return train_plain(ZOO[name])


@cache
def in_host(name: str) -> Run:
    return train_gemini(ZOO[name], config_for("host", min_unit_nbytes=1 << 20))  # the coarsest layout


@pytest.mark.parametrize("name", ZOO)
def test_every_model_trains_as_in_plain_torch(name):
    assert is_close(in_host(name).losses, plain(name).losses)
    assert distance(in_host(name).weights, plain(name).weights) < 1e-6


@pytest.mark.quick_cases(20)
@pytest.mark.parametrize("name", ZOO)
def test_every_placement_gives_a_model_the_same_bits(name, tmp_path):
    for place in ("nvme", "device", "resident"):  # the fourth, "mixed", below
        run = train_gemini(ZOO[name], config_for(place, tmp_path))
        assert run.losses == in_host(name).losses, place
        assert same_bits(run.weights, in_host(name).weights), place


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("name", ZOO)
def test_every_layout_gives_a_model_the_same_bits(name, tmp_path):
    run = train_gemini(ZOO[name], config_for("mixed", tmp_path))
    assert run.losses == in_host(name).losses
    assert same_bits(run.weights, in_host(name).weights)
