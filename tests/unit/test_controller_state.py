"""Controller state: a run continued from a checkpoint decides as if it had never stopped, or is refused."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch

from ds_grass.controller import TRAIN
from ds_grass.policies import POLICIES
from ds_grass.sampler import probabilities
from tests.controllers import make, noise, norms, snapshot


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """As torch.save and its safe loader, which refuses anything but tensors and plain types, hand it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_run_continued_from_any_step_makes_the_same_decisions(policy: str, accumulation: int) -> None:
    keys = {"policy": policy, "accumulation": accumulation, "sampling_period": 3, "refresh_period": 6}
    keys["probe_steps"] = 5 if policy in ("grass", "static", "top_k") else 0
    for stop in (0, 1, 4, 6, 8, 13, 22):
        values = random.Random(stop)
        run, resumed = make(6, **keys), make(6, **keys, seed=9)
        for _ in range(stop):
            run.advance(noise(values, 6))
        resumed.load_state_dict(through_a_checkpoint(run.state_dict()))
        assert snapshot(resumed) == snapshot(run)
        for _ in range(40):
            given = noise(values, 6)
            assert resumed.advance(given) == run.advance(given)
            assert snapshot(resumed) == snapshot(run)
            assert resumed.log_fields() == run.log_fields()


@pytest.mark.parametrize("stop", range(6))
def test_probing_found_to_need_turns_goes_on_with_them(stop: int) -> None:
    values = random.Random(stop)
    run, resumed = make(6, active_layers=2, probe_steps=2), make(6, active_layers=2, probe_steps=2)
    for step in range(stop):
        if step == 1:
            run.probe_in_turns()
        run.advance(noise(values, 6))
    resumed.load_state_dict(through_a_checkpoint(run.state_dict()))
    for _ in range(20):
        given = noise(values, 6)
        assert resumed.advance(given) == run.advance(given)
        assert snapshot(resumed) == snapshot(run)


def test_unmeasured_blocks_survive_a_checkpoint() -> None:
    run, resumed = (make(5, probe_steps=0, sampling_period=1) for _ in range(2))
    run.advance(norms(1.0, 2.0, 3.0, 4.0, 5.0))
    assert None in run.state_dict()["importance"]
    resumed.load_state_dict(through_a_checkpoint(run.state_dict()))
    for _ in range(10):
        assert resumed.advance(norms(*[0.1] * 5)) == run.advance(norms(*[0.1] * 5))
    assert snapshot(resumed) == snapshot(run)


def test_state_is_a_copy() -> None:
    controller = make(3, probe_steps=1, sampling_period=1)
    state = controller.state_dict()
    before = repr({**state, "sampler": None})
    for _ in range(5):
        controller.advance(norms(1.0, 2.0, 3.0))
    assert repr({**state, "sampler": None}) == before
    fresh = make(3, probe_steps=1, sampling_period=1)
    fresh.load_state_dict(state)
    fresh.advance(norms(1.0, 2.0, 3.0))
    assert repr({**state, "sampler": None}) == before


def test_state_continues_with_the_keys_of_the_new_config() -> None:
    old = make(4, probe_steps=1, sampling_period=10, temperature=0.5)
    old.advance(norms(1.0, 2.0, 3.0, 4.0))
    new = make(4, probe_steps=1, sampling_period=2, temperature=5.0, ema=1.0)
    new.load_state_dict(old.state_dict())
    assert new.active == old.active
    new.advance(norms(1.0, 1.0, 1.0, 1.0))
    assert new.advance(norms(1.0, 1.0, 1.0, 1.0)).drew
    assert new.probabilities == tuple(probabilities(new.importance, 5.0, 0.0))
    assert all(new.importance[block] == 1.0 for block in old.active)


def test_state_saved_in_a_probe_that_is_now_shorter_begins_training() -> None:
    old = make(6, accumulation=2, active_layers=2, probe_steps=9)
    old.advance(norms(1.0, 2.0))
    new = make(6, accumulation=2, active_layers=2, probe_steps=0)
    new.load_state_dict(old.state_dict())
    assert (new.phase, new.counters["draws"], len(new.active)) == (TRAIN, 1, 2)
    assert new.importance[:2] == (1.0, 2.0)


def test_state_saved_in_a_probe_continues_with_another_accumulation() -> None:
    old = make(6, accumulation=1, probe_steps=5)
    old.advance(norms(*range(6)))
    new = make(6, accumulation=2, probe_steps=5)
    new.load_state_dict(old.state_dict())
    assert new.active == (2, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"num_blocks": 4},
            r"the number of blocks \(grass.layers\) is 4 but the checkpoint was saved with 3",
        ),
        ({"policy": "static"}, "grass.policy is 'static' but the checkpoint was saved with 'grass'"),
        ({"active_layers": 1}, "grass.active_layers is 1 but the checkpoint was saved with 2"),
    ],
)
def test_state_of_another_run_is_refused_and_changes_nothing(keys: dict[str, Any], message: str) -> None:
    old = make(3, probe_steps=1)
    old.advance(norms(1.0, 2.0, 3.0))
    new = make(**{"num_blocks": 3, "probe_steps": 1, **keys})
    before = snapshot(new)
    with pytest.raises(ValueError, match=message) as error:
        new.load_state_dict(old.state_dict())
    assert "\n" not in str(error.value)
    assert snapshot(new) == before


def test_state_that_is_incomplete_or_of_another_format_is_refused() -> None:
    controller = make(3)
    state = controller.state_dict()
    with pytest.raises(ValueError, match=r"lacks \['visits', 'window'\]"):
        controller.load_state_dict({k: v for k, v in state.items() if k not in ("window", "visits")})
    with pytest.raises(
        ValueError, match="the format of GRASS's state is 1 but the checkpoint was saved with 2"
    ):
        controller.load_state_dict({**state, "format": 2})
