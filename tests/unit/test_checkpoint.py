"""What belongs to a checkpoint is checked before anything changes, in one line."""

import pytest
import torch

from ds_grass.units import Unit
from ds_grass.zero import checkpoint


def unit(key, name, numel):
    param = torch.nn.Parameter(torch.zeros(numel))
    return Unit(key, 0, key, False, name, (f"{name}.w",), (param,), (numel,), torch.float32)


UNITS = (unit(0, "blocks.0", 4), unit(1, "blocks.1", 6))
SAVED = {"format": 1, "units": [{"name": "blocks.0", "numel": 4}, {"name": "blocks.1", "numel": 6}]}


def test_the_same_units_are_accepted():
    for count in (2, [2, 2]):
        saved = {"grass": SAVED, "partition_count": count}
        assert checkpoint.check(saved, UNITS, 2, "the checkpoint") is SAVED


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (None, "was not saved by a grass job"),
        (SAVED | {"format": 9}, "has grass format 9, ours is 1"),
        (SAVED | {"units": SAVED["units"][:1]}, "unit 1 is missing there"),
        (SAVED | {"units": [SAVED["units"][0], {"name": "blocks.1", "numel": 7}]}, "unit 1 is"),
        (SAVED | {"units": [*SAVED["units"], {"name": "blocks.2", "numel": 7}]}, "and missing here"),
    ],
)
def test_what_cannot_belong_to_this_job_is_refused_in_one_line(saved, text):
    with pytest.raises(ValueError, match=text) as refused:
        checkpoint.check({"grass": saved, "partition_count": 2}, UNITS, 2, "the checkpoint")
    assert "\n" not in str(refused.value)


def test_another_number_of_ranks_is_refused():
    with pytest.raises(ValueError, match="saved by 4 data-parallel ranks and is loaded by 2"):
        checkpoint.check({"grass": SAVED, "partition_count": [4, 4]}, UNITS, 2, "the checkpoint")


def test_a_universal_checkpoint_is_refused_by_the_key():
    checkpoint.refuse_universal(None)
    with pytest.raises(ValueError, match=r"checkpoint\.load_universal is true"):
        checkpoint.refuse_universal("folder")


def test_padded_adds_zeros_behind():
    assert checkpoint.padded(torch.ones(2), 4).tolist() == [1, 1, 0, 0]


def test_hyper_parameters_are_plain_values_only():
    group = {"params": [1], "lr": 0.1, "betas": (0.9, 0.99), "fused": None, "tensor": torch.ones(1)}
    assert checkpoint.hyper_parameters(group) == {"lr": 0.1, "betas": (0.9, 0.99), "fused": None}
