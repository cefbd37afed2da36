"""`lisa`: every block equally likely, importance not used (LISA, arXiv 2403.17919)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ds_grass.sampler import Draw, DrawRule, gumbel_top_k


@dataclass(frozen=True)
class LisaPolicy:
    """Uniform draw without replacement; no probing, no refresh."""

    name: ClassVar[str] = "lisa"
    probes: ClassVar[bool] = False
    refreshes: ClassVar[bool] = False

    def draw(
        self, importance: Sequence[float], rule: DrawRule, draw_index: int, generator: torch.Generator
    ) -> Draw:
        """Probabilities are 1/L whatever the importance."""
        num_blocks = len(importance)
        active = gumbel_top_k([-math.log(num_blocks)] * num_blocks, rule.num_active, generator)
        return Draw(active, (1 / num_blocks,) * num_blocks)
