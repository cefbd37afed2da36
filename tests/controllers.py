"""Small controllers and made-up norms, for the tests of the state machine."""

from __future__ import annotations

import random
from typing import Any

from ds_grass.config import GrassConfig
from ds_grass.controller import Controller


def make(
    num_blocks: int = 3, *, accumulation: int = 1, numels: list[int] | None = None, **keys: Any
) -> Controller:
    """A controller of blocks with one parameter each, so that importance is the root of the squared norm."""
    if "sampling_period" in keys:
        keys.setdefault("refresh_period", keys["sampling_period"])
    return Controller(GrassConfig(**keys), numels or [1] * num_blocks, accumulation_steps=accumulation)


def norms(*rms: float) -> dict[int, float]:
    """Squared norms of blocks 0, 1, ... whose importance in this step is `rms`."""
    return {block: value * value for block, value in enumerate(rms)}


def noise(values: random.Random, num_blocks: int) -> dict[int, float] | None:
    """Squared norms of a step, or None for one in eight that is skipped."""
    return None if values.random() < 0.125 else norms(*(values.random() for _ in range(num_blocks)))


def snapshot(controller: Controller) -> dict[str, Any]:
    state = controller.state_dict()
    return {**state, "sampler": {**state["sampler"], "generator": state["sampler"]["generator"].tolist()}}
