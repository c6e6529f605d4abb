"""Shares: max-min fairness of one resource, dominant shares of two."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini.service.fairness import Amount, dominant_share, fair_share


@pytest.mark.parametrize(
    ("total", "demands", "share"),
    [(90, [], 90), (90, [90], 45), (90, [10], 80), (90, [10, 60], 40), (90, [50, 60], 30), (0, [5], 0)],
)
def test_who_wants_less_than_an_equal_part_leaves_the_rest_to_the_others(total, demands, share):
    assert fair_share(total, demands) == share


@given(st.integers(0, 10_000), st.lists(st.integers(0, 10_000), max_size=8))
def test_nobody_gets_more_than_whoever_wants_everything(total, demands):
    level = fair_share(total, demands)
    granted = [min(demand, level) for demand in demands]
    assert total - len(demands) - 1 < level + sum(granted) <= total or not any(demands)


def test_the_scarcer_tier_decides_what_a_share_is():
    assert dominant_share(Amount(10, 90), Amount(100, 100)) == 0.9
    assert dominant_share(Amount(10, 0), Amount(100, 0)) == 0.1


def test_nothing_fits_even_where_less_than_nothing_is_free():
    assert Amount(0, 5).fits_in(Amount(-3, 5))
    assert not Amount(1, 0).fits_in(Amount(0, 5))
