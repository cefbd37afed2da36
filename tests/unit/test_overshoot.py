"""Contract of what steps over the limit teach: the next plan needs less than the one that went over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_ext.recompute.overshoot import Overshoot


def test_what_a_plan_left_free_was_unforeseen_too():
    overshoot = Overshoot(SimpleNamespace())
    overshoot.plan_leaves(15)
    overshoot.count(4)
    assert overshoot.unforeseen_bytes == 19
    overshoot.plan_leaves(0)
    overshoot.count(1)
    assert overshoot.unforeseen_bytes == 20


@pytest.mark.parametrize("left", [0, 15, -3])
def test_steps_within_the_limit_and_plans_above_it_teach_nothing(left):
    overshoot = Overshoot(SimpleNamespace())
    overshoot.plan_leaves(left)
    overshoot.count(0)
    assert overshoot.unforeseen_bytes == 0
    overshoot.count(2)
    assert overshoot.unforeseen_bytes == max(0, left) + 2


@pytest.mark.parametrize(
    ("peak", "as_planned", "over"), [(120, True, 20), (120, False, 0), (90, True, 0), (50, True, 0)]
)
def test_step_is_judged_by_a_peak_that_is_its_own_and_its_plans(peak, as_planned, over):
    held = SimpleNamespace(now=60, limit=lambda: 100)
    held.peak = lambda: held.now
    overshoot = Overshoot(held)
    with overshoot.noticed(lambda: as_planned):
        held.now = peak
    assert overshoot.last == over
    overshoot.plan_leaves(5)
    assert overshoot.last == 0
