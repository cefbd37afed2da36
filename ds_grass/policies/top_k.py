"""`top_k`: the blocks of largest importance, refreshed while training, nothing left to chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ds_grass.sampler import Draw, DrawRule, certain, largest


@dataclass(frozen=True)
class TopKPolicy:
    """The largest win, of equals the lower index; temperature and exploration have no effect."""

    name: ClassVar[str] = "top_k"
    probes: ClassVar[bool] = True
    refreshes: ClassVar[bool] = True

    def draw(
        self, importance: Sequence[float], rule: DrawRule, draw_index: int, generator: torch.Generator
    ) -> Draw:
        """Probabilities are reported as 1 for the chosen blocks and 0 for the others."""
        return certain(largest(importance, rule.num_active), len(importance))
