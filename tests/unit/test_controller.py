"""Controller: which blocks train in which step, what ends a run. See test_controller_state.py for resume."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from ds_grass.config import GrassConfig
from ds_grass.controller import MAX_SKIPPED_IN_A_ROW, PROBE, TRAIN, Controller, Transition
from ds_grass.policies import POLICIES
from ds_grass.sampler import probabilities
from tests.controllers import make, noise, norms, snapshot

PERIODS = [(5, 5), (5, 10), (3, 12), (5, None), (None, None), (1, 1)]

# A walk through the whole machine. top_k is used because its draws can be worked out by hand: 3 blocks, 1
# active, probe 2, draw every 2, refresh every 4 with weight 1/2. Columns: norms given; then, after the step:
# active, importance, whether it drew, refreshed, changed the active set.
PROBED = (2.0, 4.0, 3.0)
WALK = [
    ((1.0, 6.0, 3.0), (0, 1, 2), None, False, False, False),
    (None, (0, 1, 2), None, False, False, False),
    ((3.0, 2.0, 3.0), (1,), PROBED, True, False, True),  # means 2 4 3: block 1 leads
    ((9.0, 1.0, 9.0), (1,), PROBED, False, False, False),  # what frozen blocks measure is not looked at
    ((9.0, 1.0, 9.0), (1,), PROBED, True, False, False),  # draw of step 2, nothing refreshed: block 1 again
    (None, (1,), PROBED, False, False, False),
    ((9.0, 2.0, 9.0), (1,), PROBED, False, False, False),
    ((9.0, 0.0, 9.0), (2,), (2.0, 2.5, 3.0), True, True, True),  # window mean 1: 4 -> 2.5, block 2 leads
    ((9.0, 9.0, 1.0), (2,), (2.0, 2.5, 3.0), False, False, False),
    ((9.0, 9.0, 1.0), (2,), (2.0, 2.5, 3.0), True, False, False),
    ((9.0, 9.0, 1.0), (2,), (2.0, 2.5, 3.0), False, False, False),
    ((9.0, 9.0, 1.0), (1,), (2.0, 2.5, 2.0), True, True, True),  # 3 -> 2
]


def test_walk_through_all_states_matches_the_table() -> None:
    keys = {"probe_steps": 2, "sampling_period": 2, "refresh_period": 4, "ema": 0.5}
    controller = make(3, policy="top_k", active_layers=1, **keys)
    assert (controller.phase, controller.active, controller.importance) == (PROBE, (0, 1, 2), None)
    for step, (given, active, importance, drew, refreshed, changed) in enumerate(WALK):
        phase_before = controller.phase
        transition = controller.advance(None if given is None else norms(*given))
        assert replace(transition, window_means=None) == Transition(phase_before, drew, refreshed, changed), (
            step
        )
        assert (controller.active, controller.importance) == (active, importance), step
    assert controller.phase == TRAIN
    assert controller.counters == {
        "applied_steps": 8,
        "probe_steps": 2,
        "skipped_steps": 2,
        "skipped_in_a_row": 0,
        "draws": 5,
        "refreshes": 2,
        "switches": 2,
    }
    assert controller.visits == [0, 3, 2]
    assert controller.trained_steps == [0, 4, 4]


def test_transition_tells_what_the_window_measured() -> None:
    controller = make(3, policy="top_k", active_layers=1, probe_steps=1, sampling_period=1, refresh_period=2)
    means = [controller.advance(norms(1.0, 2.0, 5.0)).window_means for _ in range(5)]
    assert means == [(1.0, 2.0, 5.0), None, (None, None, 5.0), None, (None, None, 5.0)]


def test_importance_divides_by_the_parameters_of_each_block() -> None:
    controller = make(numels=[4, 100, 1], probe_steps=1)
    controller.advance({0: 36.0, 1: 100.0, 2: 4.0})
    assert controller.importance == (3.0, 1.0, 2.0)


def test_another_measure_is_a_function_given_to_the_controller() -> None:
    controller = Controller(
        GrassConfig(probe_steps=1), [2, 4, 8], measure=lambda squared, numel: squared * numel
    )
    controller.advance({0: 1.0, 1: 1.0, 2: 1.0})
    assert controller.importance == (2.0, 4.0, 8.0)


def test_probe_of_a_step_at_a_time_measures_every_block_in_every_step() -> None:
    controller = make(7, active_layers=2, probe_steps=4)
    for _ in range(4):
        assert (controller.phase, controller.active) == (PROBE, tuple(range(7)))
        assert controller.needs_norms
        assert (controller.probabilities, controller.effective_blocks) == ((), None)
        controller.advance(norms(*range(7)))
    assert controller.phase == TRAIN
    assert controller.importance == tuple(range(7))
    assert controller.counters["draws"] == 1
    assert controller.counters["applied_steps"] == 0


def test_probe_with_accumulation_takes_groups_in_turn_and_goes_round() -> None:
    controller = make(5, accumulation=4, active_layers=2, probe_steps=6)
    groups = []
    for step in range(6):
        groups.append(controller.active)
        transition = controller.advance({block: (step + 1.0) ** 2 for block in controller.active})
        assert transition.active_changed == (controller.active != groups[-1])
    assert groups == [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4), (0, 1)]
    assert controller.importance == (10 / 3, 11 / 3, 3.0, 3.5, 4.0)
    assert controller.counters["switches"] == 0


@pytest.mark.parametrize(
    ("num_blocks", "active_layers"), [(1, 1), (2, 1), (2, 2), (5, 2), (5, 3), (12, 7), (40, 1), (40, 3)]
)
def test_probe_of_unspecified_length_reaches_every_block(num_blocks: int, active_layers: int) -> None:
    for accumulation in (1, 3):
        controller = make(num_blocks, accumulation=accumulation, active_layers=active_layers)
        reached: set[int] = set()
        for _ in range(controller.probe_steps):
            assert controller.phase == PROBE
            reached.update(controller.active)
            controller.advance(dict.fromkeys(controller.active, 1.0))
        assert controller.phase == TRAIN
        assert reached == set(range(num_blocks))
        assert controller.importance == (1.0,) * num_blocks


def test_probe_in_turns_takes_the_steps_that_all_blocks_need() -> None:
    controller = make(5, active_layers=2, probe_steps=1)
    assert controller.active == (0, 1, 2, 3, 4)
    controller.probe_in_turns()
    seen = []
    while controller.phase == PROBE:
        assert controller.probes_in_turns
        seen.append(controller.active)
        controller.advance(norms(1, 2, 3, 4, 5))
    assert seen == [(0, 1), (2, 3), (0, 4)]
    assert controller.importance == (1, 2, 3, 4, 5)
    active = controller.active
    controller.probe_in_turns()  # too late to matter
    assert (controller.phase, controller.active) == (TRAIN, active)


def test_skipped_probe_step_does_not_move_the_turn() -> None:
    controller = make(4, accumulation=2, active_layers=2, probe_steps=2)
    controller.advance(norms(1.0, 1.0))
    before = snapshot(controller)
    assert controller.advance(None) == Transition(PROBE)
    assert controller.active == (2, 3)
    after = snapshot(controller)
    assert {key for key in before if before[key] != after[key]} == {"counters"}


def test_skipped_steps_change_nothing_but_their_count() -> None:
    controller, steady = make(6, probe_steps=3, sampling_period=2), make(6, probe_steps=3, sampling_period=2)
    values = random.Random(4)
    for _ in range(60):
        given = noise(values, 6)
        controller.advance(given)
        if given is not None:
            steady.advance(given)
    skipped = controller.counters.pop("skipped_steps")
    assert skipped > 0
    assert steady.counters.pop("skipped_steps") == 0
    controller.counters["skipped_in_a_row"] = 0
    assert snapshot(controller) == snapshot(steady)


def test_twenty_skipped_steps_in_a_row_end_in_an_error() -> None:
    controller = make(probe_steps=0)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        controller.advance(None)
    controller.advance(norms(1.0, 1.0, 1.0))
    assert controller.counters["skipped_in_a_row"] == 0
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        controller.advance(None)
    with pytest.raises(RuntimeError, match="20 optimizer steps in a row had non-finite gradients") as error:
        controller.advance(None)
    assert "\n" not in str(error.value)
    assert controller.counters["skipped_steps"] == 2 * MAX_SKIPPED_IN_A_ROW - 1


@pytest.mark.parametrize("policy", ["lisa", "cyclic"])
def test_policies_without_probe_train_from_the_start_and_need_no_norms(policy: str) -> None:
    controller = make(5, policy=policy, sampling_period=3)
    for _ in range(12):
        assert (controller.phase, controller.needs_norms) == (TRAIN, False)
        controller.advance({})
    assert controller.importance == (1.0,) * 5
    assert controller.counters["draws"] == 5
    assert controller.counters["refreshes"] == 0
    assert sum(controller.trained_steps) == 2 * 12


def test_cyclic_trains_every_block_equally_long() -> None:
    controller = make(5, policy="cyclic", active_layers=3, sampling_period=4)
    for _ in range(4 * 5):
        controller.advance({})
    assert controller.trained_steps == [12] * 5


def test_start_without_probe_is_uniform() -> None:
    controller = make(4, probe_steps=0)
    assert (controller.phase, controller.importance) == (TRAIN, (1.0,) * 4)
    assert controller.probabilities == pytest.approx((0.25,) * 4)
    assert controller.effective_blocks == pytest.approx(4.0)
    assert controller.counters["draws"] == 1
    assert len(controller.active_layers) == 2


def test_start_without_probe_measures_blocks_as_they_are_drawn() -> None:
    controller = make(4, policy="top_k", active_layers=1, probe_steps=0, sampling_period=1, ema=0.5)
    visited = []
    for _ in range(4):
        visited.append(controller.active)
        controller.advance(norms(1e-5, 3e-5, 2e-5, 1e-6))
    assert visited == [(0,), (1,), (2,), (3,)]
    assert controller.importance == pytest.approx((1e-5, 3e-5, 2e-5, 1e-6))
    assert controller.active == (1,)


def test_probabilities_are_those_of_the_importance_at_the_draw() -> None:
    controller = make(4, probe_steps=1, sampling_period=5, temperature=0.3, exploration=0.1)
    controller.advance(norms(1.0, 2.0, 3.0, 4.0))
    assert controller.probabilities == tuple(probabilities([1.0, 2.0, 3.0, 4.0], 0.3, 0.1))
    for _ in range(5):
        controller.advance(norms(5.0, 5.0, 5.0, 5.0))
    assert controller.probabilities == tuple(probabilities(controller.importance, 0.3, 0.1))


def test_static_never_refreshes() -> None:
    controller = make(4, policy="static", probe_steps=2, sampling_period=2, refresh_period=2)
    for _ in range(20):
        controller.advance(norms(1.0, 2.0, 3.0, 4.0) if controller.phase == PROBE else {})
    assert controller.importance == (1.0, 2.0, 3.0, 4.0)
    assert (controller.counters["refreshes"], controller.counters["draws"]) == (0, 10)


@pytest.mark.parametrize(("sampling_period", "refresh_period"), PERIODS)
def test_draws_and_refreshes_come_at_multiples_of_their_periods(
    sampling_period: int | None, refresh_period: int | None
) -> None:
    controller = make(6, probe_steps=2, sampling_period=sampling_period, refresh_period=refresh_period)
    values, drew, refreshed = random.Random(0), [], []
    for _ in range(80):
        transition = controller.advance(noise(values, 6))
        if transition.phase_before == TRAIN and transition.drew:
            drew.append(controller.counters["applied_steps"])
        if transition.refreshed:
            refreshed.append(controller.counters["applied_steps"])
    applied = controller.counters["applied_steps"]
    assert applied > 40
    assert drew == (
        [] if sampling_period is None else list(range(sampling_period, applied + 1, sampling_period))
    )
    assert refreshed == (
        [] if refresh_period is None else list(range(refresh_period, applied + 1, refresh_period))
    )
    assert set(refreshed) <= set(drew)
    assert controller.counters["draws"] == len(drew) + 1
    assert controller.counters["refreshes"] == len(refreshed)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("sampling_period", "refresh_period"), PERIODS)
def test_invariants_hold_over_random_runs(
    policy: str, sampling_period: int | None, refresh_period: int | None
) -> None:
    probe_steps = 4 if policy in ("grass", "static", "top_k") else None
    controller = make(
        7,
        policy=policy,
        accumulation=2,
        active_layers=2,
        probe_steps=probe_steps,
        sampling_period=sampling_period,
        refresh_period=refresh_period,
    )
    values, active_in_window = random.Random(policy), set()
    for _ in range(60):
        active, importance, applied = (
            controller.active,
            controller.importance,
            controller.counters["applied_steps"],
        )
        given = noise(values, 7)
        transition = controller.advance(given)
        active_in_window.update(active if given is not None and transition.phase_before == TRAIN else ())
        assert transition.active_changed == (controller.active != active)
        assert not (transition.active_changed and given is None)
        assert transition.phase_before == PROBE or transition.drew or controller.active == active
        is_applied = given is not None and transition.phase_before == TRAIN
        assert controller.counters["applied_steps"] == applied + is_applied
        if importance is not None:
            moved = {block for block in range(7) if controller.importance[block] != importance[block]}
            assert moved <= (active_in_window if transition.refreshed else set()), (
                "a frozen block's value moved"
            )
        if transition.refreshed:
            active_in_window = set()
        assert len(controller.active) == len(set(controller.active)) == 2
    assert sum(controller.visits) == 2 * controller.counters["draws"]
    assert sum(controller.trained_steps) == 2 * controller.counters["applied_steps"]


@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_given_the_same_norms_hold_the_same_blocks(policy: str) -> None:
    ranks = [make(6, policy=policy, sampling_period=2) for _ in range(3)]
    values = random.Random(2)
    for _ in range(60):
        given = noise(values, 6)
        transitions = [rank.advance(given) for rank in ranks]
        assert transitions[0] == transitions[1] == transitions[2]
    assert snapshot(ranks[0]) == snapshot(ranks[1]) == snapshot(ranks[2])


def test_norm_of_an_active_block_that_is_missing_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="block 2"):
        make(3, probe_steps=1).advance(norms(1.0, 1.0))


@pytest.mark.parametrize("squared_norm", [float("nan"), float("inf")])
def test_non_finite_norm_that_was_not_skipped_is_a_bug(squared_norm: float) -> None:
    with pytest.raises(AssertionError, match="must be skipped"):
        make(1, active_layers=1, probe_steps=1).advance({0: squared_norm})


def test_config_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grass.active_layers is 4 but the model has 3 layers; use 1 to 3"):
        make(3, active_layers=4)
    with pytest.raises(ValueError, match=r"grass.probe_steps is 2"):
        make(9, accumulation=2, active_layers=2, probe_steps=2)


def test_log_fields_are_plain_values() -> None:
    controller = make(3, probe_steps=1)
    plain = (str, int, float, list, type(None))
    for _, fields in zip(range(3), iter(controller.log_fields, None), strict=False):
        assert all(isinstance(value, plain) for value in fields.values())
        controller.advance(norms(1.0, 2.0, 3.0))
    assert fields["phase"] == TRAIN
    assert fields["visits"] == controller.visits
    assert {"active", "importance", "probabilities", "effective_blocks", "applied_steps"} <= fields.keys()


def test_all_blocks_active_never_switch() -> None:
    controller = make(3, active_layers=3, probe_steps=0, sampling_period=1)
    for transition in itertools.islice(iter(lambda: controller.advance(norms(1.0, 2.0, 3.0)), None), 20):
        assert not transition.active_changed
    assert controller.counters["switches"] == 0
    assert controller.visits == [21] * 3
