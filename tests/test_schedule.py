"""The learning rate's schedule, and the end of a run that goes on until it is flat."""

from __future__ import annotations

import math

import pytest

from dafl_fast.engine.schedule import PATIENCE, Schedule
from dafl_fast.errors import UserError
from dafl_fast.recipes import make_config


def schedule(state=None, **given):
    return Schedule(make_config("mnist", **given), state)


def test_schedules_of_a_fixed_length():
    cosine = schedule()
    assert cosine.factor(0.0) == pytest.approx(0.01)
    assert cosine.factor(0.01) == pytest.approx(0.51 * 0.5 * (1 + math.cos(0.01 * math.pi)))
    assert cosine.factor(0.5) == pytest.approx(0.5)
    assert cosine.factor(1.0) == cosine.factor(1.5) == 0
    steps = schedule(student_schedule="multistep")
    assert [steps.factor(x) for x in (0.39, 0.4, 0.79, 0.8, 1)] == [1, 0.1, 0.1, 0.01, 0.01]
    assert schedule(student_schedule="constant").factor(0.0) == 1
    assert [cosine.done(x) for x in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]
    for estimate in [0.5] * 20:
        cosine.note(estimate, 0.3)
    assert cosine.done(0.3) == 0.3  # only until_flat looks at estimates


def test_a_run_that_gets_flat_decays_and_ends():
    flat = schedule(until_flat=True)
    for number, estimate in enumerate([0.5, 0.6, 0.7, *[0.7] * (PATIENCE - 1)]):
        flat.note(estimate, 0.02 * (number + 1))
        assert flat.factor(0.3) == 1 and flat.done(0.3) == 0.3
    flat.note(0.702, 0.3)  # no rise to speak of
    assert flat.factor(0.3) == 1
    assert flat.factor(0.35) == pytest.approx(0.5)
    assert flat.factor(0.4) == pytest.approx(0)
    assert flat.done(0.3) == pytest.approx(0.75) and flat.done(0.4) == pytest.approx(1)
    flat.note(0.99, 0.35)  # it has been decided
    assert flat.done(0.4) == pytest.approx(1)


def test_a_run_that_keeps_rising_has_its_longest_length():
    rising = schedule(until_flat=True)
    for number in range(70):
        rising.note(number / 100, number / 100)
    assert rising.factor(0.74) == 1 and rising.done(0.74) == 0.74
    assert rising.factor(0.875) == pytest.approx(0.5)
    assert rising.done(1.0) == 1 and rising.factor(1.0) == pytest.approx(0)


def test_a_resumed_run_goes_on_as_it_would_have():
    one = schedule(until_flat=True)
    for number in range(6):
        one.note(0.5, number / 100)
        two = schedule(one.state(), until_flat=True)
        assert two.state() == one.state() and two.factor(0.06) == one.factor(0.06)
    assert one.done(0.04) != 0.04  # it was flat


def test_a_run_that_is_made_longer_looks_anew():
    short = schedule(until_flat=True, max_seconds=10.0)
    for number in range(10):
        short.note(0.5, 0.05 * number)
    assert short.done(0.3) > 0.3
    longer = schedule(short.state(), until_flat=True, max_seconds=100.0)
    assert longer.done(0.3) == 0.3 and longer.factor(0.3) == 1
    for number in range(10):
        longer.note(0.6, 0.3 + 0.01 * number)
    assert longer.done(0.4) > 0.4


def test_until_flat_needs_something_to_look_at():
    for given in ({"bank_held_out": 0}, {"eval_every": 0.0}):
        with pytest.raises(UserError, match="--until-flat needs evaluations"):
            make_config("mnist", until_flat=True, **given)


@pytest.mark.parametrize(
    "state", [{"estimates": None, "decay_from": None}, {"estimates": ["x"], "decay_from": None},
              {"estimates": [], "decay_from": []}, {}, 7],
)  # fmt: skip
def test_a_damaged_state_is_told(state):
    with pytest.raises(UserError, match="the checkpoint's schedule is damaged"):
        schedule(state)
