"""Contracts of what stages tell each other: no waiting but where it is asked for, and silent stages by name."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict

import pytest
from torch.distributed import HashStore

from megatron_ext.recompute.stage_plan import StagePlan
from megatron_ext.stage_facts import StageFacts


@pytest.fixture
def store():
    return HashStore()


def of(
    store, stage: int, *, stages: int = 3, name: str = "job", is_first: bool = True, **options
) -> StageFacts:
    return StageFacts(store, name, stages, stage, is_first, **options)


def test_facts_come_in_the_order_of_the_stages_once_all_have_told(store):
    facts = [of(store, stage) for stage in range(3)]
    for stage in (2, 0, 1):
        assert facts[1].all_there("layers") is None
        facts[stage].tell("layers", {"layers": stage})
    expected = [{"layers": stage} for stage in range(3)]
    for each in facts:
        assert each.all_there("layers") == each.wait("layers") == expected


def test_fact_that_is_told_again_replaces_the_one_before(store):
    first, second = (of(store, stage, stages=2) for stage in range(2))
    first.tell("plan", 1)
    second.tell("plan", 2)
    first.tell("plan", [3])
    assert second.all_there("plan") == [[3], 2]


def test_what_some_have_told_is_there_by_now(store):
    facts = [of(store, stage) for stage in range(3)]
    assert facts[0].by_now("profiles") == []
    for stage in (2, 0):
        facts[stage].tell("profiles", stage)
    assert facts[1].by_now("profiles") == [0, 2]


def test_facts_and_jobs_are_kept_apart(store):
    for what, name in (("layers", "job"), ("plan", "other")):
        of(store, 0, stages=1, name=name).tell(what, name)
    here = of(store, 0, stages=1)
    assert here.all_there("layers") == ["job"]
    assert here.all_there("plan") is None


def test_of_a_stages_ranks_only_the_first_tells(store):
    of(store, 0, stages=1, is_first=False).tell("layers", 1)
    assert of(store, 0, stages=1).all_there("layers") is None
    of(store, 0, stages=1).tell("layers", 2)
    assert of(store, 0, stages=1, is_first=False).all_there("layers") == [2]


def test_none_is_a_fact(store):
    of(store, 0, stages=1).tell("layers", None)
    assert of(store, 0, stages=1).wait("layers") == [None]


def test_silent_stages_are_named(store):
    facts = of(store, 1, stages=4, timeout_s=0.02)
    facts.tell("plans", 1)
    of(store, 2, stages=4).tell("plans", 2)
    of(store, 3, stages=4, is_first=False).tell("plans", 3)
    with pytest.raises(RuntimeError) as caught:
        facts.wait("plans")
    assert str(caught.value) == (
        "pipeline stages [0, 3] did not tell stage 1 about plans within 0.02 s; all ranks must run the same ds_config"
    )


def test_fact_that_comes_at_the_last_moment_is_no_complaint_about_nobody(store, monkeypatch):
    """Told between looking for it and looking for who is silent."""
    facts = of(store, 0, stages=1, timeout_s=-1.0)
    looked = facts._silent

    def late(what):
        facts.tell(what, "late")
        return looked(what)

    monkeypatch.setattr(facts, "_silent", late)
    assert facts.wait("plans") == ["late"]


def test_waiting_ends_when_the_last_stage_tells(store):
    first, second = (of(store, stage, stages=2, timeout_s=30.0) for stage in range(2))
    first.tell("plans", 1)
    found = []
    waiting = threading.Thread(target=lambda: found.append(first.wait("plans")))
    waiting.start()
    second.tell("plans", 2)
    waiting.join(30.0)
    assert found == [[1, 2]]


def test_plan_of_a_stage_travels_as_json(store):
    plan = StagePlan(
        1, "stage_aware", ({"layers": ["full", "none"], "share": None},), (4,), {"stages": 2}, 10**10
    )
    of(store, 0, stages=1).tell("plans", asdict(plan))
    (told,) = of(store, 0, stages=1).wait("plans")
    assert told == json.loads(json.dumps(asdict(plan)))
    assert (told["stage"], told["open"], told["measured_bytes"], told["frozen"]) == (1, [4], None, False)
