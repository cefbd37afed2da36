"""Rules that say how many layers each stage recomputes, from one ratio: what a measured plan is compared with.

    none      nothing
    uniform   as many layers on every stage as on the first: Megatron-core's `recompute_num_layers`
    level     kept layers times in-flight micro-batches no more than on the first stage; for 1F1B the kept share is
              k_i = min(1, k_0 p / (p - i)), which is exactly level
    merak     k_i = (1 - r_0)(p - 1) / (p - 1 - i), the last stage nothing, floor(n (1 - k_i)) layers, nothing where
              that is negative (Merak, arXiv 2206.04959, as in its code: `Merak/core/pipeline/module.py`)

Merak's rule keeps k (in flight - 1) constant: the stage before those that recompute nothing holds up to 1.5 times what
the first one does. Its unit is half a layer; here whole layers are counted.

Contract: pure; the ratio is the share of the first stage's layers that are recomputed. In exact arithmetic: 0.7 of ten
layers are seven.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction as Ratio

POLICIES = ("none", "uniform", "level", "merak")


def layers_recomputed(
    policy: str, ratio: float, windows: Sequence[int], layers_by_stage: Sequence[int]
) -> tuple[int, ...]:
    """Layers of each stage that are recomputed; `windows`: its most in-flight micro-batches. `none` ignores `ratio`."""
    if policy not in POLICIES:
        raise ValueError(f"recompute policy is {policy!r}; use one of {', '.join(POLICIES)}")
    if len(windows) != len(layers_by_stage) or min(windows, default=0) < 1 or min(layers_by_stage) < 0:
        raise ValueError(
            f"in-flight counts {tuple(windows)} for stages of {tuple(layers_by_stage)} layers; allowed: one count from "
            "1 and one number of layers from 0 for each stage"
        )
    if policy == "none":
        return (0,) * len(layers_by_stage)
    if not 0 <= ratio <= 1:
        raise ValueError(
            f"recompute ratio is {ratio}; use 0 (no layer of the first stage is recomputed) to 1 (all are)"
        )
    exact = Ratio(ratio).limit_denominator(10**6)
    first = math.ceil(exact * layers_by_stage[0])
    if policy == "uniform":
        return tuple(min(first, layers) for layers in layers_by_stage)
    if policy == "level":
        room = (layers_by_stage[0] - first) * windows[0]
        return tuple(max(0, n - room // window) for n, window in zip(layers_by_stage, windows, strict=True))
    return _merak(exact, layers_by_stage)


def _merak(ratio: Ratio, layers_by_stage: Sequence[int]) -> tuple[int, ...]:
    last = len(layers_by_stage) - 1
    shares = [1 - (1 - ratio) * last / (last - stage) for stage in range(last)]
    counts = [math.floor(layers * share) for layers, share in zip(layers_by_stage, shares, strict=False)]
    return (*(max(0, count) for count in counts), 0)
