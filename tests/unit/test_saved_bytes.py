"""Contracts of the count of saved bytes: each storage once, as long and as large as it is there."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_ext.saved_bytes import SavedBytes, place_of

N, FLOAT = 1000, 4
BYTES = N * FLOAT


def vector() -> torch.Tensor:
    return torch.full((N,), 0.5)


def parameter() -> torch.Tensor:
    return vector().requires_grad_()


def test_what_autograd_keeps_is_counted_until_backward_has_used_it():
    weight = parameter()
    with SavedBytes([place_of(weight)]) as saved:
        y = (weight * vector()).exp()
        assert saved.now == 2 * BYTES  # the other factor, and exp's own result
        y.sum().backward()
        del y
        assert saved.now == 0
    assert saved.peak == 2 * BYTES


def test_parameters_are_not_counted_nor_are_their_views():
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    with SavedBytes([place_of(weight)]) as saved:
        y = x @ weight.t()
        assert saved.now == x.untyped_storage().nbytes()
    assert y.requires_grad


def test_storage_counts_once_however_often_and_in_whatever_parts_it_is_saved():
    x = parameter()
    with SavedBytes() as saved:
        kept = [x.square(), x[:10].square(), x.view(10, -1).square()]
        assert saved.now == BYTES
        del kept[0]
        assert saved.now == BYTES
        kept.clear()
        x = None
        assert saved.now == 0


def test_only_what_is_saved_inside_is_counted():
    x = parameter()
    before = x.exp()
    with SavedBytes() as saved:
        assert saved.now == 0
    after = x.exp()
    assert (saved.now, saved.peak) == (0, 0)
    (before + after).sum().backward()


def test_peak_is_of_all_graphs_together_and_stays():
    x = parameter()
    with SavedBytes([place_of(x)]) as saved:
        graphs = [x.exp() for _ in range(4)]
        assert saved.now == 4 * BYTES
        while graphs:
            graphs.pop().sum().backward()
        assert saved.now == 0
        graphs = [x.exp() for _ in range(2)]
        assert saved.now == 2 * BYTES
    assert saved.peak == 4 * BYTES


def test_memory_that_is_given_out_again_is_counted_anew():
    """A freed storage's address is the next one's: neither missed nor counted twice."""
    x = parameter()
    with SavedBytes([place_of(x)]) as saved:
        for _ in range(20):
            y = x.exp()
            assert saved.now == BYTES
            y.sum().backward()
            del y
            assert saved.now == 0
    assert saved.peak == BYTES


def test_storage_that_is_emptied_while_it_is_held_counts_nothing_until_it_is_filled():
    """As Megatron-core empties what it computes again in backward."""
    x = parameter()
    with SavedBytes([place_of(x)]) as saved:
        y = x.exp()
        storage = y.untyped_storage()
        storage.resize_(0)
        assert saved.now == 0
        storage.resize_(BYTES)
        assert saved.now == BYTES
        z = y.detach().requires_grad_().square()
        assert saved.now == BYTES
        assert z.requires_grad
    assert saved.peak == BYTES


def test_recomputation_in_backward_is_counted_as_it_saves():
    x = parameter()
    with SavedBytes([place_of(x)]) as saved:
        y = checkpoint(lambda x: x.exp().sin().exp(), x, use_reentrant=True)
        assert saved.now == 0
        y.sum().backward()
        del y
        assert saved.now == 0
    assert saved.peak == 2 * BYTES  # the first exp's result, which sin keeps too, and the second's


def test_gradients_are_what_they_are_without_counting():
    grads = []
    for counted in (False, True):
        x = parameter()
        if counted:
            with SavedBytes([place_of(x)]):
                x.exp().mul(x).sum().backward()
        else:
            x.exp().mul(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_graph_that_is_dropped_without_a_backward_is_freed_without_a_garbage_collection():
    """exp keeps its own result: handed back as it is, it would hold the graph that holds it."""
    x = parameter()
    gc.disable()
    try:
        with SavedBytes([place_of(x)]) as saved:
            y = x.exp()
            y = None
            assert saved.now == 0
    finally:
        gc.enable()
    assert y is None


def test_empty_tensors_are_no_trouble():
    x = torch.empty(0, requires_grad=True)
    with SavedBytes([place_of(torch.empty(0))]) as saved:
        y = x.exp()
        assert saved.now == 0
    assert y.numel() == 0


def test_hooks_are_gone_after_an_exception():
    x = parameter()
    saved = SavedBytes([place_of(x)])
    with pytest.raises(KeyError), saved:
        raise KeyError
    x.exp()
    assert saved.peak == 0


def test_output_may_be_emptied_once_it_has_been_sent():
    """As Megatron-core's deallocate_output_tensor does, and its custom_backward goes on from."""
    x = parameter()
    with SavedBytes([place_of(x)]) as saved:
        y = x.exp()
        y.data = torch.empty(1)
        assert saved.now == BYTES
        torch.autograd.Variable._execution_engine.run_backward(
            (y,), (torch.ones(N),), False, False, (), True, True
        )
    assert torch.equal(x.grad, vector().exp())


def test_places_are_of_what_nobody_has_freed():
    x = parameter()
    with SavedBytes([place_of(x)]) as saved:
        kept, freed = x.exp(), x.exp()
        assert saved.places_alive() == {place_of(kept), place_of(freed)}
        place = place_of(kept)
        del freed
        assert saved.places_alive() == {place}
