"""What belongs to a checkpoint is checked before anything changes, in one line."""

from dataclasses import replace

import pytest
import torch

from ds_grass.units import Unit
from ds_grass.zero import checkpoint


def unit(key, name, numel):
    param = torch.nn.Parameter(torch.zeros(numel))
    return Unit(key, 0, key, False, name, (f"{name}.w",), (param,), (numel,), torch.float32)


UNITS = (unit(0, "blocks.0", 4), unit(1, "blocks.1", 6))
GROUPS = [{"params": [], "lr": 0.1}]
SAVED = {
    "format": checkpoint.FORMAT,
    "units": [
        {"name": "blocks.0", "numel": 4, "params": [["blocks.0.w", [4]]]},
        {"name": "blocks.1", "numel": 6, "params": [["blocks.1.w", [6]]]},
    ],
    "groups": [{"lr": 0.2}],
    "drawn": [1],
    "steps": [0, 5],
}


def test_the_same_units_are_accepted():
    assert checkpoint.check({"grass": SAVED}, UNITS, GROUPS, "the checkpoint") is SAVED


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (None, "was not saved by a grass job"),
        (
            SAVED | {"format": 9, "version": "7.1"},
            "has grass format 9 and this ds_grass reads 2; load it with ds_grass 7.1",
        ),
        (
            SAVED | {"units": [{**SAVED["units"][0], "params": [["blocks.0.v", [4]]]}, SAVED["units"][1]]},
            r"in blocks.0 it has \['blocks.0.v', \[4\]\] where this one has \['blocks.0.w', \[4\]\]",
        ),
        (SAVED | {"groups": []}, "has 0 parameter groups and this job 1"),
        (SAVED | {"units": SAVED["units"][:1]}, "unit 1 is missing there"),
        (SAVED | {"units": [SAVED["units"][0], {"name": "blocks.1", "numel": 7}]}, "unit 1 is"),
        (SAVED | {"units": [*SAVED["units"], {"name": "blocks.2", "numel": 7}]}, "and missing here"),
    ],
)
def test_what_cannot_belong_to_this_job_is_refused_in_one_line(saved, text):
    with pytest.raises(ValueError, match=text) as refused:
        checkpoint.check({"grass": saved}, UNITS, GROUPS, "the checkpoint")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("count", [4, [4, 4]])
def test_another_number_of_ranks_is_refused(count):
    checkpoint.check_ranks({"partition_count": count}, 4, "the checkpoint")
    with pytest.raises(ValueError, match="saved by 4 data-parallel ranks and is loaded by 2"):
        checkpoint.check_ranks({"partition_count": count}, 2, "the checkpoint")


def test_steps_are_those_of_units_that_were_drawn():
    assert checkpoint.steps_of(SAVED) == {1: 5}


def test_groups_are_the_users_and_name_their_units():
    groups = [{"params": ["a"], "lr": 0.1}, {"params": ["b"], "lr": 0.2}]
    units = (UNITS[0], Unit(1, 1, 1, False, "b", ("b.w",), UNITS[1].params, (6,), torch.float32))
    assert checkpoint.param_groups(units, groups) == [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]


def test_one_step_stands_for_all_where_deepspeed_knows_one():
    state = checkpoint.SavedState(torch.ones(1), torch.ones(1), torch.ones(1), 0)
    states = checkpoint.optimizer_state([state, replace(state, step=7)])
    assert [float(entry["step"]) for entry in states.values()] == [7.0, 7.0]


def test_padded_adds_zeros_behind():
    assert checkpoint.padded(torch.ones(2), 4).tolist() == [1, 1, 0, 0]


def test_hyper_parameters_are_plain_values_only():
    group = {
        "params": [1],
        "lr": torch.tensor(0.5),
        "betas": (0.9, 0.99),
        "fused": None,
        "tensor": torch.ones(2),
    }
    assert checkpoint.hyper_parameters(group) == {"lr": 0.5, "betas": (0.9, 0.99), "fused": None}


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    rate = torch.tensor(0.5)
    group = {"lr": rate, "weight_decay": 0.1}
    checkpoint.update_group(group, {"lr": 0.25, "weight_decay": 0.2})
    assert group == {"lr": rate, "weight_decay": 0.2}
    assert rate.item() == 0.25
