"""Contracts of recomputation plans: data that comes back from its file as it was, and files that say what is wrong."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from megatron_ext.recompute.plan import (
    FULL,
    KEY,
    MODULES,
    NONE,
    VERSION,
    ChunkPlan,
    RecomputePlan,
    Share,
    join_choice,
    load_plan,
    parse_choice,
)

SHARED = ChunkPlan((FULL, "core_attn+mlp", NONE), Share(1, FULL, 2, 4))
PLAN = RecomputePlan(
    "stage_aware",
    {(1, 0): ChunkPlan((NONE,)), (0, 0): SHARED, (0, 1): ChunkPlan((FULL, NONE))},
    job={"stages": 2, "micro_batches": 8},
    measured={(0, 0): {"kept_bytes": 12}, (0, 1): {}, (1, 0): {}},
    versions={"megatron-core": "0.16.1"},
)
LAYERS = {(0, 0): 3, (0, 1): 2, (1, 0): 1}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    return path


def change(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def stages(**changes):
    """The file's stages, with other entries in the first."""
    first, *others = PLAN.to_json()["stages"]
    return [{**first, **changes}, *others]


# -- choices ----------------------------------------------------------------------------------------------------------


def test_choice_is_none_full_or_modules_joined():
    assert parse_choice(NONE) == parse_choice(FULL) == ()
    assert parse_choice("mlp") == ("mlp",)
    assert parse_choice("core_attn+mlp") == ("core_attn", "mlp")


@pytest.mark.parametrize("modules", [(), *itertools.combinations(MODULES, 2), MODULES])
def test_set_of_modules_has_one_spelling_whatever_its_order(modules):
    joined = join_choice(modules)
    assert join_choice(modules[::-1]) == joined
    assert parse_choice(joined) == modules
    assert (joined == NONE) == (not modules)


@pytest.mark.parametrize(
    "choice", ["", "half", "mlp+", "mlp+mlp", "full+mlp", "none+mlp", "mlp, moe", 1, None]
)
def test_wrong_choice_is_refused_with_all_that_are_allowed(choice):
    with pytest.raises(ValueError, match="a layer's recomputation is") as caught:
        ChunkPlan((NONE, choice))
    assert repr(choice) in str(caught.value)
    assert str(caught.value).endswith(
        "allowed: none, full, or each once and joined by +: core_attn, layernorm, mlp, mla_up_proj, moe, moe_act, "
        "shared_experts"
    )


# -- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 3, 4, 7])
def test_share_holds_for_as_many_passes_of_any_window_in_a_row(window):
    for count in range(1, window):
        share = Share(0, FULL, count, window)
        holds = [share.holds(number) for number in range(5 * window)]
        assert {sum(holds[first : first + window]) for first in range(4 * window)} == {count}
        assert holds[:window] == [True] * count + [False] * (window - count)


def test_shared_layer_alone_changes_between_passes():
    chosen = [[SHARED.choice(layer, number) for layer in range(3)] for number in range(8)]
    for number, choices in enumerate(chosen):
        assert choices == [FULL, FULL if number % 4 < 2 else "core_attn+mlp", NONE]


@pytest.mark.parametrize(("micro_batches", "window"), [(0, 4), (4, 4), (5, 4), (1, 1), (-1, 4), (1, 0)])
def test_share_of_no_or_all_micro_batches_is_refused(micro_batches, window):
    with pytest.raises(ValueError, match="more than none and fewer than all"):
        Share(0, FULL, micro_batches, window)


@pytest.mark.parametrize("key", ["layer", "micro_batches", "window"])
@pytest.mark.parametrize("value", [1.5, "1", None, True])
def test_share_that_is_not_made_of_integers_is_refused(key, value):
    """A layer of 1.5 would be nobody's."""
    with pytest.raises(ValueError, match=f"a share's {key} is {value!r}; allowed: an integer"):
        replace(Share(1, FULL, 2, 4), **{key: value})


@pytest.mark.parametrize("layer", [-1, 3])
def test_share_of_a_layer_that_the_chunk_lacks_is_refused(layer):
    with pytest.raises(ValueError, match=f"a share is of layer {layer} but the chunk has 3 layers"):
        ChunkPlan((NONE,) * 3, Share(layer, FULL, 1, 2))


def test_digests_tell_chunks_apart():
    alike = ChunkPlan((FULL, "core_attn+mlp", NONE), Share(1, FULL, 2, 4))
    others = [
        replace(SHARED, share=None),
        replace(SHARED, share=Share(1, FULL, 1, 4)),
        replace(SHARED, layers=(FULL, "core_attn", NONE)),
    ]
    assert alike.digest() == SHARED.digest()
    assert len(SHARED.digest()) == 12
    assert len({plan.digest() for plan in (SHARED, *others)}) == 4


# -- files ------------------------------------------------------------------------------------------------------------


def test_plan_comes_back_as_it_was_saved(saved):
    assert load_plan(saved, LAYERS) == PLAN


def test_file_is_readable_and_in_the_order_of_the_stages(saved):
    content = json.loads(saved.read_text())
    assert content["stages"] == [
        {"pipeline_rank": 0, "virtual_stage": 0, "layers": ["full", "core_attn+mlp", "none"], "measured":
         {"kept_bytes": 12}, "share": {"layer": 1, "choice": "full", "micro_batches": 2, "window": 4}},
        {"pipeline_rank": 0, "virtual_stage": 1, "layers": ["full", "none"], "measured": {}, "share": None},
        {"pipeline_rank": 1, "virtual_stage": 0, "layers": ["none"], "measured": {}, "share": None},
    ]  # fmt: skip
    assert content["policy"] == "stage_aware"


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(saved):
    replace(PLAN, policy="uniform").save(saved)
    assert load_plan(saved, LAYERS).policy == "uniform"
    assert list(saved.parent.iterdir()) == [saved]


def test_plan_that_cannot_be_written_leaves_the_old_file(saved):
    with pytest.raises(TypeError):
        replace(PLAN, job={"stages": object()}).save(saved)
    assert load_plan(saved, LAYERS) == PLAN
    assert list(saved.parent.iterdir()) == [saved]


def test_jobs_that_save_at_once_do_not_write_into_each_other(saved, monkeypatch):
    """One is interrupted by another between writing and replacing."""
    kind, plain = type(saved), type(saved).write_text
    second = replace(PLAN, policy="second")

    def slow(path, text):
        plain(path, text)
        monkeypatch.setattr(kind, "write_text", plain)
        second.save(saved)
        assert load_plan(saved, LAYERS) == second

    monkeypatch.setattr(kind, "write_text", slow)
    PLAN.save(saved)
    assert load_plan(saved, LAYERS) == PLAN


def test_file_of_another_pipeline_says_both(saved):
    with pytest.raises(ValueError, match="made for") as caught:
        load_plan(saved, {(0, 0): 3, (1, 0): 3})
    assert str(caught.value) == (
        f"{KEY} is {str(saved)!r}, made for 3 layers on stage 0.0, 2 layers on stage 0.1, 1 layers on stage 1.0, but "
        "this job has 3 layers on stage 0.0, 3 layers on stage 1.0; start with the same pipeline, or without the file"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "other"}, r"which is no plan \(format 'megatron_ext.recompute.plan'\); name a plan"),
        ({"version": VERSION + 1}, f"of version {VERSION + 1}; allowed: {VERSION}; save a new plan"),
        ({"version": None}, f"of version None; allowed: {VERSION}; save a new plan"),
        ({"stages": [{}]}, "'pipeline_rank' is missing; save a new plan"),
        ({"stages": {"0": []}}, "which is wrong: .*; save a new plan"),
        ({"stages": 3}, "which is wrong: .*; save a new plan"),
        ({"stages": None}, "which is wrong: .*; save a new plan"),
        ({"stages": stages() + stages()}, "pipeline rank 0, virtual stage 0 stands there twice"),
        ({"stages": stages(pipeline_rank="0")}, "pipeline_rank is '0'; allowed: an integer"),
        ({"stages": stages(virtual_stage=0.5)}, "virtual_stage is 0.5; allowed: an integer"),
        ({"stages": stages(layers=None)}, "which is wrong: .*; save a new plan"),
        ({"stages": stages(layers=["none", 1, "none"])}, "a layer's recomputation is 1; allowed"),
        ({"stages": stages(layers="full")}, "a layer's recomputation is 'f'; allowed"),
        ({"stages": stages(layers=["none", "all", "none"])}, "a layer's recomputation is 'all'; allowed"),
        ({"stages": stages(share={"layer": 1})}, "which is wrong: .*; save a new plan"),
        ({"stages": stages(share=[1])}, "which is wrong: .*; save a new plan"),
        ({"stages": stages(share={"layer": 1, "choice": "full", "micro_batches": 4, "window": 4})}, "4 of 4"),
        ({"stages": stages(share={"layer": 9, "choice": "full", "micro_batches": 1, "window": 4})}, "of layer 9"),
        ({"stages": stages(measured=[1])}, "which is wrong: .*; save a new plan"),
        ({"stages": stages(layers=["none"], share=None)}, "made for 1 layers on stage 0.0.* but this job has 3 layers"),
    ],
)  # fmt: skip
def test_wrong_file_names_key_path_and_cause(saved, keys, message):
    change(saved, **keys)
    with pytest.raises(ValueError, match=f"(?s)^the.key is '{saved}'.*{message}"):
        load_plan(saved, LAYERS, "the.key")


def test_file_without_an_entry_names_it(saved):
    for key in ("stages", "policy"):
        content = PLAN.to_json()
        del content[key]
        saved.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"which is wrong: '{key}' is missing; save a new plan"):
            load_plan(saved, LAYERS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\); name a plan"),
        (b"text", r"which is not JSON \(.*\); name a plan"),
        (b"\xff\xfe", r"which is not JSON \(.*\); name a plan"),
        (b"[]", "which is no plan"),
        (b"{}", "which is no plan"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, content, message):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{KEY} is '{path}'.*{message}"):
        load_plan(path, LAYERS)


def test_folder_is_refused_as_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); name a plan"):
        load_plan(tmp_path, LAYERS)


def test_layer_that_shares_its_choice_is_not_always_recomputed():
    assert ChunkPlan((FULL, NONE, "mlp")).always_in_full() == [True, False, False]
    assert ChunkPlan((FULL, FULL), Share(1, NONE, 1, 2)).always_in_full() == [True, False]
    assert ChunkPlan((NONE, NONE), Share(0, FULL, 1, 2)).always_in_full() == [False, False]
