"""Contracts of the running micro-batch: its plan reaches its own layers, at once and when they are run again."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from megatron_ext.sequence_parallel import micro_batch as running_batch
from megatron_ext.sequence_parallel.layout import contiguous, zigzag
from megatron_ext.sequence_parallel.micro_batch import MicroBatch, capturing, current, running


def planned(*names: str, length: int = 8, documents=None) -> MicroBatch:
    return MicroBatch(None, names or ("ring",), 1, length, documents)


class Checkpoint:
    """Megatron's ``tensor_parallel.checkpoint`` in outline: runs the function now, and again when asked to."""

    def __init__(self):
        self.again = []

    def __call__(self, function, distribute_saved_activations, *args):
        assert distribute_saved_activations is False
        self.again.append(lambda: function(*args))
        return function(*args)


@pytest.fixture
def checkpoint():
    return Checkpoint()


def test_nothing_runs_outside_of_a_block():
    assert current() is None


def test_micro_batch_is_current_inside_and_the_one_before_after():
    outer, inner = planned("metp"), planned("ring")
    with running(outer):
        with running(inner):
            assert current() is inner
        assert current() is outer
    assert current() is None


def test_exception_restores_the_one_before():
    outer = planned()
    with running(outer):
        with pytest.raises(OSError, match="midway"), running(planned()):
            raise OSError("midway")
        assert current() is outer
    assert current() is None


def test_micro_batch_is_seen_by_the_thread_that_runs_backward():
    seen, own = [], planned()
    with running(own):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [own]


def test_function_run_again_finds_its_own_micro_batch_among_newer_ones(checkpoint):
    seen, batches = [], [planned("metp"), planned("ring"), planned("ulysses")]

    def layer(x):
        seen.append((current(), current().recomputing))
        return x

    for batch in batches:
        with running(batch):
            assert capturing(checkpoint)(layer, False, 1) == 1
    assert seen == [(batch, False) for batch in batches]
    seen.clear()
    newer = planned("context")
    with running(newer):
        for again in checkpoint.again:
            again()
        assert current() is newer
    assert seen == [(batch, True) for batch in batches]
    assert not any(batch.recomputing for batch in batches)


def test_first_run_is_not_recomputation_and_each_later_one_is(checkpoint):
    seen = []
    with running(planned()):
        capturing(checkpoint)(lambda: seen.append(current().recomputing), False)
    checkpoint.again[0]()
    checkpoint.again[0]()
    assert seen == [False, True, True]


def test_checkpoint_within_a_checkpoint_is_recomputation_also_in_its_first_run(checkpoint):
    """The outer function's second run makes a new inner one, whose first run is no forward."""
    seen = []

    def outer():
        capturing(checkpoint)(lambda: seen.append(current().recomputing), False)

    own = planned()
    with running(own):
        capturing(checkpoint)(outer, False)
    checkpoint.again[0]()
    assert seen == [False, True]
    assert not own.recomputing


def test_exception_in_a_function_run_again_restores_all(checkpoint):
    own, failing = planned(), []

    def layer():
        if failing:
            raise OSError("out of memory")

    with running(own):
        capturing(checkpoint)(layer, False)
    failing.append(True)
    with pytest.raises(OSError, match="out of memory"):
        checkpoint.again[0]()
    assert current() is None
    assert not own.recomputing


def test_checkpoint_outside_of_a_block_is_the_original_with_the_same_function(checkpoint):
    def function(x):
        return x

    given = []
    capturing(lambda function, distribute, *args: given.append((function, distribute, args)))(
        function, True, 1
    )
    assert given == [(function, True, (1,))]
    assert capturing(checkpoint).__wrapped__ is checkpoint


def test_autograd_checkpoint_recomputes_with_its_own_plan():
    """The same through PyTorch's backward, two micro-batches in flight and the later one's backward first."""
    seen = []

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, x):
            ctx.function = function
            ctx.save_for_backward(x)
            with torch.no_grad():
                return function(x)

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.function(x)
            return None, torch.autograd.grad(y, x, grad)[0]

    def layer(x):
        seen.append((current().names, current().recomputing))
        return 2 * x

    checkpoint = capturing(lambda function, distribute, x: Recompute.apply(function, x))
    losses = []
    for name in ("metp", "ring"):
        with running(planned(name)):
            losses.append(checkpoint(layer, False, torch.ones(1, requires_grad=True)))
    seen.clear()
    for loss in reversed(losses):
        loss.backward()
    assert seen == [(("ring",), True), (("metp",), True)]


# Facts that layers share


def causal(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    ("mask", "answer"),
    [
        (causal(8), True),
        (causal(8).expand(3, 1, 8, 8), True),
        (torch.zeros(1, 1, 8, 8, dtype=torch.bool), False),
        (causal(8).logical_not(), False),
    ],
)
def test_causal_mask_is_recognised(mask, answer):
    assert planned().is_causal(mask) is answer


def test_mask_is_looked_at_once_for_all_layers_and_again_when_it_changed(monkeypatch):
    batch, mask, looks = planned(), causal(8), []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: looks.append(args) or ones(*args, **kwargs))
    assert all(batch.is_causal(given) for given in (mask, mask, mask.view(1, 1, 8, 8), mask.detach()))
    assert len(looks) == 1
    mask[..., 0, 1] = False
    assert not batch.is_causal(mask)
    assert len(looks) == 2
    assert not batch.is_causal(mask[..., :4, :4])
    assert batch.is_causal(causal(8))


def test_rows_of_a_table_are_cut_out_once_for_all_layers():
    batch, table = planned(), torch.randn(8, 1, 1, 4)
    rows = batch.rows_of(table, zigzag(0, 2, 8))
    assert batch.rows_of(table, zigzag(0, 2, 8)) is rows
    assert torch.equal(rows, table[[0, 1, 6, 7]])
    assert torch.equal(batch.rows_of(table, contiguous(1, 2, 8)), table[4:])
    assert torch.equal(batch.rows_of(table + 1, zigzag(0, 2, 8)), table[[0, 1, 6, 7]] + 1)


def test_table_freed_by_its_owner_is_not_mistaken_for_a_new_one_in_its_place():
    batch = planned()
    for value in range(20):
        table = torch.full((8, 1, 1, 4), float(value))
        assert torch.equal(batch.rows_of(table, contiguous(0, 2, 8)), table[:4])


def test_table_too_short_for_the_longest_document_is_an_error():
    with pytest.raises(
        ValueError, match="rotary_pos_emb has 4 positions but .* has 5 tokens; make the table"
    ):
        planned(documents=(0, 5, 8)).rows_of(torch.zeros(4, 1, 1, 4), contiguous(1, 2, 8))


def test_micro_batch_that_is_over_is_freed_without_a_garbage_collection(checkpoint):
    """It holds masks and tables; a job may have switched automatic collection off."""
    gc.disable()
    try:
        batch = planned()
        gone = weakref.ref(batch)
        with running(batch):
            batch.is_causal(causal(8))
            batch.rows_of(torch.zeros(8, 1, 1, 4), contiguous(0, 1, 8))
            capturing(checkpoint)(lambda: None, False)
        checkpoint.again[0]()
        checkpoint.again.clear()
        del batch
        assert gone() is None
    finally:
        gc.enable()
    assert running_batch.current() is None
