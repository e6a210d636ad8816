"""Schedules by step against the papers' formulas."""

import math
from itertools import pairwise

import pytest

from zoo.gumbel_vae.schedules import SCHEDULES, check_temperatures, constant, cosine, exponential


@pytest.mark.parametrize("schedule", [exponential, cosine])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.5), (0.5, 2.0), (0.7, 0.7)])
def test_it_starts_and_ends_exactly_and_stays_there(schedule, start, end):
    assert schedule(0, start, end, 1000) == start
    assert [schedule(step, start, end, 1000) for step in (1000, 1001, 10**9)] == [end] * 3
    assert schedule(0, start, end, 1) == start
    assert schedule(1, start, end, 1) == end


def test_exponential_is_jangs_decay_with_a_floor():
    rate, floor = 3e-5, 0.5
    steps = round(math.log(1 / floor) / rate)
    for step in (0, 1, 1000, 20_000, 23_000, 24_000, 10**6):
        assert exponential(step, 1.0, floor, steps) == pytest.approx(max(floor, math.exp(-rate * step)), rel=1e-4)


def test_exponential_multiplies_by_the_same_factor_at_every_step():
    values = [exponential(step, 2.0, 0.25, 6) for step in range(7)]
    assert [after / before for before, after in pairwise(values)] == pytest.approx([0.5**0.5] * 6)


def test_cosine_is_dalles_and_may_start_at_0():
    assert cosine(75_000, 1.0, 1 / 16, 150_000) == pytest.approx((1 + 1 / 16) / 2)
    assert [cosine(step, 0.0, 6.6, 4) for step in range(5)] == pytest.approx(
        [6.6 * share for share in (0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1)]
    )


def test_constant_stays_where_it_starts():
    assert [constant(step, 0.8, 0.1, 10) for step in (0, 5, 10, 11)] == [0.8] * 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_possible_temperatures_pass(name):
    check_temperatures(name, 1.0, 0.01, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 1.0, 0.5, 10), "unknown schedule 'linear': expected one of constant, exponential, cosine"),
        (("cosine", 0.0, 0.5, 10), "the temperature's start is 0.0: expected a finite number above 0"),
        (("exponential", 1.0, -0.5, 10), "the temperature's end is -0.5: expected a finite number above 0"),
        (("exponential", math.inf, 0.5, 10), "the temperature's start is inf"),
        (("exponential", 1.0, math.nan, 10), "the temperature's end is nan"),
        (("exponential", 1.0, 0.5, 0), "the temperature reaches its end after 0 steps: expected at least 1"),
    ],
)
def test_impossible_temperatures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        check_temperatures(*arguments)
    assert "\n" not in str(error.value)
