"""Backward stops at the lowest active block, and never where a gradient is wanted below."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_grass.backward_cut import BackwardCut
from ds_grass.layers import find_layout


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return x + torch.tanh(self.linear(x))


class OutsideCheckpoint(nn.Module):
    """A block that checkpoints its own forward, so that module hooks stay outside (transformers 5)."""

    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = Block(), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Net(nn.Module):
    def __init__(self, make, around=None):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(make() for _ in range(4))
        self.head = nn.Linear(4, 8)
        self.around = around

    def forward(self, ids=None, embeds=None):
        h = self.embed(ids) if embeds is None else embeds
        for block in self.blocks:
            h = block(h) if self.around is None else checkpoint(block, h, use_reentrant=self.around)
        return self.head(h).square().mean()


IDS = torch.tensor([[1, 2, 3]])


def trained(model, active, *, outer=()):
    """The model with only these blocks trainable and the cut told so."""
    cut = BackwardCut(model, find_layout(model))
    for param in model.parameters():
        param.requires_grad_(False)
    for index in active:
        model.blocks[index].requires_grad_(True)
    for module in outer:
        module.requires_grad_(True)
    cut.on_switch(active)
    return cut


def runs(model):
    return [next(m for m in block.modules() if isinstance(m, Block)).runs for block in model.blocks]


def require_input_grads(model):
    model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_blocks_below_are_not_recomputed(reentrant):
    model = Net(lambda: OutsideCheckpoint(reentrant))
    require_input_grads(model)
    cut = trained(model, [2])
    model(IDS).backward()
    assert runs(model) == [1, 1, 2, 2]
    assert cut.counters["cut"] == 1
    assert all(p.grad is not None for p in model.blocks[2].parameters())
    assert model.blocks[1].inner.linear.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_equal_those_without_the_cut(reentrant):
    torch.manual_seed(0)
    plain = Net(lambda: OutsideCheckpoint(reentrant))
    model = Net(lambda: OutsideCheckpoint(reentrant))
    model.load_state_dict(plain.state_dict())
    require_input_grads(plain)
    require_input_grads(model)
    plain.blocks[0].requires_grad_(False)
    plain(IDS).backward()
    trained(model, [1, 3])
    model(IDS).backward()
    for index in (1, 3):
        for mine, theirs in zip(
            model.blocks[index].parameters(), plain.blocks[index].parameters(), strict=True
        ):
            assert torch.equal(mine.grad, theirs.grad)


def test_checkpoints_around_hooks_keep_working_with_frozen_embeddings():
    model = Net(Block, around=True)
    cut = trained(model, [2])
    for _ in range(2):
        model.zero_grad()
        model(IDS).backward()
        assert model.blocks[2].linear.weight.grad is not None
    assert cut.counters["embedding_opened"] == 2
    assert cut.counters["cut"] == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_head_that_trains_does_not_hide_the_blocks_from_reentrant_checkpoints(reentrant):
    model = Net(Block, around=reentrant)
    trained(model, [2], outer=[model.head])
    model(IDS).backward()
    assert model.head.weight.grad is not None
    assert model.blocks[2].linear.weight.grad is not None


def test_outer_that_trains_is_never_cut_off():
    model = Net(Block)
    cut = trained(model, [2], outer=[model.embed])
    model(IDS).backward()
    assert model.embed.weight.grad is not None
    assert cut.counters == {"cut": 0, "opened": 0, "embedding_opened": 0}


def test_a_leaf_of_the_user_keeps_its_gradient():
    model = Net(Block)
    trained(model, [3])
    embeds = torch.randn(1, 3, 4, requires_grad=True)
    model(embeds=embeds).backward()
    assert embeds.grad is not None


def test_a_trainable_parameter_upstream_keeps_its_gradient():
    model = Net(Block)
    require_input_grads(model)
    trained(model, [3])
    prompt = nn.Parameter(torch.randn(1, 1, 4))
    model(embeds=torch.cat([prompt, model.embed(IDS)], dim=1)).backward()
    assert prompt.grad is not None


def test_evaluation_is_left_alone():
    model = Net(Block)
    cut = trained(model, [1])
    model.eval()
    with torch.no_grad():
        model(IDS)
    assert cut.counters == {"cut": 0, "opened": 0, "embedding_opened": 0}


def test_remove_takes_all_hooks_off():
    model = Net(Block)
    trained(model, [1]).remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parameters_hidden_in_a_reentrant_checkpoint_upstream_keep_their_gradient():
    model, front = Net(Block), nn.Linear(4, 4)
    require_input_grads(model)
    trained(model, [3])
    model(embeds=checkpoint(front, model.embed(IDS), use_reentrant=True)).backward()
    assert front.weight.grad is not None
