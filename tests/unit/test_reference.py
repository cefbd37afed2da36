"""The specification itself: what `tests/reference.py` computes is checked against numbers worked out another way."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests import models
from tests.reference import Group, Reference, Sampling

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _reference(model: torch.nn.Module, **options: object) -> Reference:
    names = [n for n, _ in model.named_parameters()]
    blocks = [[n for n in names if n.startswith(f"blocks.{i}.")] for i in range(len(model.blocks))]
    return Reference(model, blocks, [Group(names, **ADAMW)], models.loss, **options)


def _whole_batch_adamw(model: torch.nn.Module, steps: list, clip: float) -> None:
    """Train `model` with ordinary AdamW on the concatenation of every rank's and micro-batch's rows."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for data in steps:
        optimizer.zero_grad()
        models.loss(model, torch.cat([batch for rank in data for batch in rank])).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


@pytest.mark.parametrize("each_micro_step", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_reference_equals_ordinary_adamw_when_all_blocks_are_active(
    each_micro_step: bool, clip: float
) -> None:
    ours, theirs = models.stack().double(), models.stack().double()
    reference = _reference(ours, each_micro_step=each_micro_step, clip=clip)
    steps = [models.step_data(i, ranks=2, accumulation=3) for i in range(4)]
    for data in steps:
        reference.step(data, range(4))
    _whole_batch_adamw(theirs, steps, clip)
    for name, param in theirs.named_parameters():
        torch.testing.assert_close(reference.masters[name], param, rtol=0, atol=1e-7 if clip else 1e-12)


def test_step_leaves_frozen_blocks_alone_and_changes_the_others() -> None:
    model = models.stack()
    before = copy.deepcopy(model.state_dict())
    _reference(model).step(models.step_data(0, ranks=1, accumulation=1), [1, 3])
    changed = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if not n.startswith(("blocks.0.", "blocks.2."))}


def test_late_block_starts_adam_from_its_own_first_step() -> None:
    model = models.stack().double()
    reference = _reference(model)
    for number in range(3):
        reference.step(models.step_data(number, ranks=1, accumulation=1), [0])
    weight = reference.masters["blocks.2.down.weight"].detach().clone()
    data = models.step_data(3, ranks=1, accumulation=1)
    grad = reference.gradients(data)["blocks.2.down.weight"]
    reference.step(data, [2])
    decayed = weight * (1 - ADAMW["lr"] * ADAMW["weight_decay"])
    expected = decayed - ADAMW["lr"] * grad / (
        grad.abs() + ADAMW["eps"]
    )  # bias correction makes step 1 a sign
    torch.testing.assert_close(
        reference.masters["blocks.2.down.weight"].detach(), expected, rtol=1e-10, atol=1e-12
    )


def test_probe_step_measures_and_changes_nothing() -> None:
    model = models.stack().double()
    before = copy.deepcopy(model.state_dict())
    reference = _reference(model)
    data = models.step_data(0, ranks=2, accumulation=2)
    record = reference.step(data, range(4), update=False)
    grads = [g for n, g in reference.gradients(data).items() if n.startswith("blocks.1.")]
    squares, count = sum(float((g**2).sum()) for g in grads), sum(g.numel() for g in grads)
    assert record.importance[1] == pytest.approx(math.sqrt(squares / count), rel=1e-12)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert not record.applied
    assert reference.applied == 0


def test_step_is_skipped_when_the_norm_is_not_finite() -> None:
    model = models.stack()
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    record = _reference(model).step(models.step_data(0, ranks=1, accumulation=1), [0])
    assert not record.applied


def test_low_precision_weights_follow_their_masters() -> None:
    model = models.stack().bfloat16()
    reference = _reference(model)
    for number in range(3):
        reference.step(models.step_data(number, ranks=2, accumulation=2), [number])
    for name, param in model.named_parameters():
        assert reference.masters[name].dtype == torch.float32
        assert torch.equal(param, reference.masters[name].bfloat16())


def test_learning_rate_factor_counts_applied_steps_only() -> None:
    model = models.stack()
    reference = _reference(model, lr_factor=lambda applied: 0.5**applied)
    data = models.step_data(0, ranks=1, accumulation=1)
    for update in (False, True, True):
        reference.step(data, [0], update=update)
    assert [group["lr"] for group in reference.optimizers[-1].param_groups] == [ADAMW["lr"] * 0.5]


def test_sampling_follows_the_paper() -> None:
    sampling = Sampling(num_blocks=2, temperature=0.5, ema=0.25, exploration=0.1)
    assert sampling.refresh([{0: 1.0, 1: 2.0}, {0: 3.0}]) == [2.0, 2.0]
    assert sampling.probabilities() == pytest.approx([0.5, 0.5])
    assert sampling.refresh([{1: 6.0}]) == [2.0, 3.0]
    odds = math.exp((3.0 - 2.0) / 2.5 / 0.5)
    assert sampling.probabilities() == pytest.approx(
        [0.9 / (1 + odds) + 0.05, 0.9 * odds / (1 + odds) + 0.05]
    )
