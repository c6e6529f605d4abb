"""Models of every family train as in plain torch, wherever their parameters live."""

from __future__ import annotations

from functools import cache

import pytest
from model_zoo import ZOO
from training_harness import PLACEMENTS, Run, config_for, distance, is_close, same_bits, train_gemini, train_plain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@cache
def plain(name: str) -> Run:
    return train_plain(ZOO[name])


@pytest.mark.parametrize("name", ZOO)
def test_every_placement_trains_as_plain_torch_and_gives_the_same_bits(name, tmp_path):
    runs = {place: train_gemini(ZOO[name], config_for(place, tmp_path)) for place in PLACEMENTS}
    for place, run in runs.items():
        assert is_close(run.losses, plain(name).losses), place
        assert distance(run.weights, plain(name).weights) < 1e-6, place
        assert run.losses == runs["host"].losses, place
        assert same_bits(run.weights, runs["host"].weights), place
