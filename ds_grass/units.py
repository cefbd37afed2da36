"""Units: what is reduced, stepped and moved as one.

A unit holds the trainable parameters of one block that stand in one of the user's parameter groups, so that
all of them share a learning rate and a fate: they are drawn, updated and sent home together. What lies outside
the drawn blocks forms units with `block` None: what the model defines after its last block (final norm, head) apart
from the rest, for backward is done with it before it reaches the blocks. The user's own groups are never split;
a unit refers to its group by index and reads the hyper-parameters at every step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from ds_grass.layers import Layout, num_elements

# Places outside the blocks; greater than any block's index.
OUTER, HEAD = sys.maxsize - 1, sys.maxsize


@dataclass(frozen=True, eq=False)
class Unit:
    """The parameters of one (user group, block or side of outer, dtype); `key` is its place in checkpoint files."""

    key: int
    group: int
    """Index of the user's parameter group."""
    block: int | None
    """Index in `Layout.blocks`; None for parameters outside the drawn blocks."""
    head: bool
    """Outside the drawn blocks, and defined after the last of them."""
    name: str
    names: tuple[str, ...]
    params: tuple[Parameter, ...]
    sizes: tuple[int, ...]
    """Unsharded elements of each parameter."""
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Unsharded elements of the unit."""
        return sum(self.sizes)


def make_units(
    layout: Layout, param_groups: Sequence[Mapping], names: Mapping[Parameter, str]
) -> tuple[Unit, ...]:
    """Split what the user's groups hold into units, ordered by group, then block, then outer, its head last.

    `names` holds the model's parameters in the order of their definition. Parameters that are frozen, empty, or held
    still by `grass.outer` belong to no unit. A parameter the model does not hold (an extra one that the user gave the
    optimizer) counts as outer.
    """
    held_still = {id(param) for _, param in layout.frozen_outer}
    place = _places(layout, names)
    units: list[Unit] = []
    for index, group in enumerate(param_groups):
        members: dict[tuple[int, str], list[Parameter]] = {}
        for param in group["params"]:
            if param.requires_grad and num_elements(param) > 0 and id(param) not in held_still:
                members.setdefault((place.get(id(param), OUTER), str(param.dtype)), []).append(param)
        for where, dtype in sorted(members):
            params = members[where, dtype]
            units.append(
                Unit(
                    key=len(units),
                    group=index,
                    block=where if where < OUTER else None,
                    head=where == HEAD,
                    name={OUTER: "outer", HEAD: "head"}.get(where) or layout.blocks[where].name,
                    names=tuple(names.get(p, f"group{index}.{i}") for i, p in enumerate(params)),
                    params=tuple(params),
                    sizes=tuple(num_elements(p) for p in params),
                    dtype=params[0].dtype,
                )
            )
    return tuple(units)


def _places(layout: Layout, names: Mapping[Parameter, str]) -> dict[int, int]:
    """`id` of a parameter -> index of its block, or HEAD; what is missing is OUTER."""
    block_of = {id(param): block.index for block in layout.blocks for _, param in block.params}
    order = [id(param) for param in names]
    last = max((position for position, param in enumerate(order) if param in block_of), default=len(order))
    return dict.fromkeys(order[last + 1 :], HEAD) | block_of


def reduction_order(units: Iterable[Unit]) -> list[Unit]:
    """The one order in which every rank reduces gradients: the head, the last block first, the rest of outer.

    Backward completes them in about this order. The order in which it really does differs between ranks
    (unused parameters, several streams); collectives must not.
    """
    return sorted(units, key=lambda unit: (unit.block is None and not unit.head, -_depth(unit), unit.key))


def largest_blocks(units: Iterable[Unit], count: int) -> list[int]:
    """The `count` blocks with the most elements: the largest set that can be drawn."""
    sizes: dict[int, int] = {}
    for unit in units:
        if unit.block is not None:
            sizes[unit.block] = sizes.get(unit.block, 0) + unit.numel
    return sorted(sizes, key=lambda block: -sizes[block])[:count]


def _depth(unit: Unit) -> int:
    return HEAD if unit.head else unit.block or 0
