"""Contracts of what experts leave in Megatron-core's modules: after a measurement it is what it was before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.recompute import expert_state

moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils", reason="needs Megatron-core")
Scaler = moe_utils.MoEAuxLossAutoScaler


@pytest.fixture
def tracker(monkeypatch):
    """Of a process in which nothing has run."""
    table: dict = {}
    monkeypatch.setattr(moe_utils, "_MOE_LAYER_WISE_LOGGING_TRACKER", table)
    monkeypatch.setattr(Scaler, "main_loss_backward_scale", None)
    return table


def run(name: str = "load_balancing_loss", group: object = None) -> None:
    """What a router does, forward and backward."""
    moe_utils.save_to_aux_losses_tracker(name, torch.tensor(3.0), 2, 4, reduce_group=group)
    activation = torch.ones(2, requires_grad=True)
    Scaler.apply(activation, torch.ones((), requires_grad=True)).sum().backward()


def test_entries_that_were_not_there_are_gone(tracker):
    with expert_state.put_back():
        run()
        assert tracker
    assert tracker == {}


def test_entries_that_were_there_keep_their_sums_in_the_same_tensor(tracker):
    run(group="before")
    values = tracker["load_balancing_loss"]["values"]
    with expert_state.put_back():
        run(group="other")
        run("z_loss")
    assert list(tracker) == ["load_balancing_loss"]
    assert tracker["load_balancing_loss"]["values"] is values
    assert values.tolist() == [0, 3, 0, 0]
    assert tracker["load_balancing_loss"]["reduce_group"] == "before"


def test_first_loss_scale_can_be_set_after_a_measurement(tracker):
    """Megatron-core's schedule sets one of shape (1,), and copies into the one that a backward has left."""
    with expert_state.put_back():
        run()
        assert Scaler.main_loss_backward_scale is not None
    Scaler.set_loss_scale(torch.ones(1))
    assert Scaler.main_loss_backward_scale.shape == (1,)


def test_all_is_put_back_after_an_error(tracker):
    def fail() -> None:
        with expert_state.put_back():
            run()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert (tracker, Scaler.main_loss_backward_scale) == ({}, None)


def test_table_of_earlier_releases_is_found_in_parallel_state(monkeypatch):
    from megatron.core import parallel_state

    table = {"z_loss": {"values": torch.zeros(2)}}
    monkeypatch.setattr(parallel_state, "get_moe_layer_wise_logging_tracker", lambda: table, raising=False)
    assert expert_state._logged_losses(SimpleNamespace()) is table
