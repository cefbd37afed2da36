"""Units: what is reduced, stepped and moved as one.

A unit holds the trainable parameters of one block that stand in one of the user's parameter groups, so that
all of them share a learning rate and a fate: they are drawn, updated and sent home together. What lies outside
the drawn blocks forms units with `block` None. The user's own groups are never split; a unit refers to its group
by index and reads the hyper-parameters at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from ds_grass.layers import Layout, num_elements


@dataclass(frozen=True, eq=False)
class Unit:
    """The parameters of one (user group, block, dtype); `key` is its place in checkpoint files."""

    key: int
    group: int
    """Index of the user's parameter group."""
    block: int | None
    """Index in `Layout.blocks`; None for parameters outside the drawn blocks."""
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
    """Split what the user's groups hold into units, ordered by group, then block, outer last.

    Parameters that are frozen, empty, or held still by `grass.outer` belong to no unit. A parameter the model does
    not hold (an extra one that the user gave the optimizer) counts as outer.
    """
    block_of = {id(param): block.index for block in layout.blocks for _, param in block.params}
    held_still = {id(param) for _, param in layout.frozen_outer}
    units: list[Unit] = []
    for index, group in enumerate(param_groups):
        members: dict[tuple[bool, int, str], list[Parameter]] = {}
        for param in group["params"]:
            if not param.requires_grad or num_elements(param) == 0 or id(param) in held_still:
                continue
            block = block_of.get(id(param))
            members.setdefault((block is None, -1 if block is None else block, str(param.dtype)), []).append(
                param
            )
        for outer, block, _ in sorted(members):
            params = members[(outer, block, _)]
            units.append(
                Unit(
                    key=len(units),
                    group=index,
                    block=None if outer else block,
                    name="outer" if outer else layout.blocks[block].name,
                    names=tuple(names.get(p, f"group{index}.{i}") for i, p in enumerate(params)),
                    params=tuple(params),
                    sizes=tuple(num_elements(p) for p in params),
                    dtype=params[0].dtype,
                )
            )
    return tuple(units)


def reduction_order(units: Iterable[Unit]) -> list[Unit]:
    """The one order in which every rank reduces gradients: the last block first, outer at the end.

    Backward completes blocks in about this order. The order in which it really does differs between ranks
    (unused parameters, several streams); collectives must not.
    """
    return sorted(units, key=lambda unit: (unit.block is None, -(unit.block or 0), unit.key))
