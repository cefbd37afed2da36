"""Splitting the user's groups into units."""

import torch
from torch import nn

from ds_grass.layers import find_layout
from ds_grass.units import make_units, reduction_order


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
        self.head = nn.Linear(4, 6)


def split(model, groups, **keys):
    layout = find_layout(model, **keys)
    names = {param: name for name, param in model.named_parameters()}
    return make_units(layout, groups, names)


def decay_groups(model):
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1]},
    ]


def test_units_cover_every_parameter_once_and_keep_groups_apart():
    model = Net()
    units = split(model, decay_groups(model))
    assert [(u.group, u.name) for u in units] == [
        (0, "blocks.0"), (0, "blocks.1"), (0, "blocks.2"), (0, "outer"), (0, "head"),
        (1, "blocks.0"), (1, "blocks.1"), (1, "blocks.2"), (1, "head"),
    ]  # fmt: skip
    assert [u.block for u in units] == [0, 1, 2, None, None, 0, 1, 2, None]
    assert [u.key for u in units] == list(range(9))
    held = [id(p) for u in units for p in u.params]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert sum(u.numel for u in units) == sum(p.numel() for p in model.parameters())
    assert units[0].names == ("blocks.0.0.weight",)


def test_reduction_order_is_head_then_last_block_first_then_the_rest():
    model = Net()
    units = split(model, decay_groups(model))
    assert [(u.name, u.group) for u in reduction_order(units)] == [
        ("head", 0), ("head", 1), ("blocks.2", 0), ("blocks.2", 1), ("blocks.1", 0), ("blocks.1", 1),
        ("blocks.0", 0), ("blocks.0", 1), ("outer", 0),
    ]  # fmt: skip


def test_a_tied_head_stands_with_the_embedding():
    model = Net()
    model.head.weight = model.embed.weight
    units = {u.name: u.names for u in split(model, [{"params": list(model.parameters())}])}
    assert units["outer"] == ("embed.weight",)
    assert units["head"] == ("head.bias",)


def test_frozen_parameters_and_outer_held_still_are_in_no_unit():
    model = Net()
    model.blocks[1][0].bias.requires_grad_(False)
    units = split(model, [{"params": list(model.parameters())}], outer="never")
    held = {name for u in units for name in u.names}
    assert "blocks.1.0.bias" not in held
    assert not any(name.startswith(("embed", "head")) for name in held)
    assert all(u.block is not None for u in units)


def test_dtypes_are_kept_apart():
    model = Net()
    model.blocks[0][1].to(torch.bfloat16)
    units = split(model, [{"params": list(model.parameters())}])
    assert [u.dtype for u in units if u.block == 0] == [torch.bfloat16, torch.float32]


def test_a_parameter_the_model_does_not_hold_counts_as_outer():
    model = Net()
    extra = nn.Parameter(torch.zeros(3))
    units = split(model, [{"params": [*model.parameters(), extra]}])
    outer = next(u for u in units if u.block is None)
    assert any(p is extra for p in outer.params)
    assert outer.names[-1].startswith("group0.")
