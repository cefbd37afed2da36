"""`grass`: blocks drawn from a softmax of their importance, which follows training (GRASS, arXiv
2604.07808)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ds_grass.sampler import Draw, DrawRule, gumbel_top_k, log_probabilities


@dataclass(frozen=True)
class GrassPolicy:
    """Importance sampling without replacement; importance is probed first and refreshed while training."""

    name: ClassVar[str] = "grass"
    probes: ClassVar[bool] = True
    refreshes: ClassVar[bool] = True

    def draw(
        self, importance: Sequence[float], rule: DrawRule, draw_index: int, generator: torch.Generator
    ) -> Draw:
        """Gumbel top-k over the tempered softmax, mixed with a uniform share."""
        log_p = log_probabilities(importance, rule.temperature, rule.exploration)
        active = gumbel_top_k(log_p, rule.num_active, generator)
        return Draw(active, tuple(math.exp(value) for value in log_p))
