"""`cyclic`: the blocks in turn, importance not used (block coordinate descent, as BAdam's ascending
order)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ds_grass.sampler import Draw, DrawRule, certain, turn


@dataclass(frozen=True)
class CyclicPolicy:
    """Walks round the blocks, `active_layers` further at each draw; no probing, no refresh."""

    name: ClassVar[str] = "cyclic"
    probes: ClassVar[bool] = False
    refreshes: ClassVar[bool] = False

    def draw(
        self, importance: Sequence[float], rule: DrawRule, draw_index: int, generator: torch.Generator
    ) -> Draw:
        """Probabilities are reported as 1 for the chosen blocks and 0 for the others."""
        return certain(turn(draw_index, rule.num_active, len(importance)), len(importance))
