"""Simulated machines that planners are tried on: another source than the planner's own model.

Contract: `cost(strategy, length)` is deterministic. `PublishedTruth` is the authors' fitted times of their 8 x A100
node; `FineTruth` walks through a layer kernel by kernel and message by message: tiles in waves over multiprocessors,
GEMMs that lose efficiency when small, launch floors, latency and size-dependent bandwidth for each message, hops hidden
behind compute, and a random factor for each (strategy, length). Memory has no second source: it is the planner's
closed forms with an allocator's rounding and random losses, so what is simulated of it is how plans bear such errors.
Simulated figures, not measured ones.

Not covered: clocks, congestion, data loading, the optimizer's step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_ext.sequence_parallel import closed_forms, memory_forms
from megatron_ext.sequence_parallel.cluster import Cluster
from megatron_ext.sequence_parallel.cost_model import Cost
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.names import STRATEGIES

_MIB = 2**20


class Truth(Protocol):
    shape: LayerShape
    strategies: tuple[str, ...]

    def cost(self, strategy: str, length: int) -> Cost: ...


PUBLISHED_SECONDS = {
    12288: (1, {"megatron_ts": (1.08e-10, 6.22e-6, 0.010), "ulysses": (1.03e-10, 5.07e-6, 0.0935),
                "ring": (1.03e-10, 5.89e-6, 0.0937), "metp": (1.04e-10, 6.81e-6, 0.113)}),
    8192: (5, {"megatron_ts": (3.59e-10, 1.6e-5, 0.0174), "ulysses": (3.41e-10, 1.2e-5, 0.316),
               "ring": (3.53e-10, 1.4e-5, 0.343), "metp": (3.33e-10, 2.0e-5, 0.290)}),
    1024: (24, {"megatron_ts": (2.36e-10, 5.22e-6, 0.0284), "ulysses": (2.41e-10, 7.3e-7, 0.162),
                "ring": (2.30e-10, 3.37e-6, 0.223), "metp": (3.28e-10, -1.2e-5, 1.369)}),
}  # fmt: skip
"""By hidden size: layers, and s^2, s, 1 of the authors' fitted seconds, in their released planner. Ring is their CZ."""


@dataclass(frozen=True)
class PublishedTruth:
    """The authors' time polynomials; they published no memory."""

    shape: LayerShape
    seed: int = 0

    @property
    def strategies(self) -> tuple[str, ...]:
        return tuple(PUBLISHED_SECONDS[self.shape.hidden_size][1])

    def cost(self, strategy: str, length: int) -> Cost:
        layers, fits = PUBLISHED_SECONDS[self.shape.hidden_size]
        square, linear, constant = fits[strategy]
        seconds = (square * length**2 + linear * length + constant) / layers
        return Cost(seconds, *_allocated(self.shape, strategy, length, self.seed))


@dataclass(frozen=True)
class FineTruth:
    """One layer, kernel by kernel and message by message."""

    shape: LayerShape
    cluster: Cluster
    seed: int = 0
    noise: float = 0.02
    """Standard deviation of the factor's logarithm."""
    multiprocessors: int = 108
    hidden_share: float = 0.7
    """Of the shorter of hop and compute that overlaps where a strategy sends in hops."""
    half_speed_bytes: int = 512 * 1024
    """A message of this size reaches half of the link's bandwidth."""

    strategies = STRATEGIES

    def cost(self, strategy: str, length: int) -> Cost:
        tokens = length // self.shape.group_size
        seconds = sum(self._phase(strategy, tokens, length, phase) for phase in closed_forms.PHASES)
        factor = _generator(self.seed, strategy, length).normal(0.0, self.noise)
        return Cost(seconds * math.exp(factor), *_allocated(self.shape, strategy, length, self.seed))

    def _phase(self, strategy: str, tokens: int, length: int, phase: str) -> float:
        """The two parts: hops hide behind the part's own compute, collectives do not."""
        total = 0.0
        for part in closed_forms.PARTS:
            events = closed_forms.collectives(self.shape, strategy, part, phase, tokens)
            hops = sum(self._message(e.bytes) for e in events if e.kind in ("send", "broadcast", "reduce"))
            exposed = sum(
                self._collective(e) for e in events if e.kind not in ("send", "broadcast", "reduce")
            )
            compute = self._linears(strategy, part, tokens) * (1 if phase == "forward" else 2)
            if part == "attention":
                compute += self._attention(strategy, length, phase)
            if strategy == "metp" and phase == "backward":
                compute += self._linears(strategy, part, tokens) / 2
            total += exposed + compute + hops - self.hidden_share * min(hops, compute)
        return total + self._element_wise(strategy, tokens, phase)

    def _message(self, nbytes: float) -> float:
        return self.cluster.link_latency + (nbytes + self.half_speed_bytes) / self.cluster.link_bandwidth

    def _collective(self, event: closed_forms.Event) -> float:
        """Rings of p - 1 messages; exchanges send to all at once, which costs a latency each and shares the link."""
        p = self.shape.group_size
        if event.kind == "all_gather":
            return (p - 1) * self._message(event.bytes)
        if event.kind == "reduce_scatter":
            return (p - 1) * self._message(event.bytes / p) * 1.05  # adds as it goes
        return self._message(event.bytes * (p - 1) / p) + (p - 1) * self.cluster.link_latency / 2

    def _linears(self, strategy: str, part: str, tokens: int) -> float:
        """Forward of a part's two linears, by their shapes on this rank."""
        shape, p = self.shape, self.shape.group_size
        width, inner = (
            (shape.qkv_size, shape.query_size)
            if part == "attention"
            else (shape.fc1_size, shape.ffn_hidden_size)
        )
        if strategy == "megatron_ts":
            return self._gemm(tokens * p, width // p, shape.hidden_size) + self._gemm(
                tokens * p, shape.hidden_size, inner // p
            )
        if strategy == "metp":
            return p * (
                self._gemm(tokens, width // p, shape.hidden_size)
                + self._gemm(tokens, shape.hidden_size, inner // p)
            )
        return self._gemm(tokens, width, shape.hidden_size) + self._gemm(tokens, shape.hidden_size, inner)

    def _gemm(self, m: int, n: int, k: int) -> float:
        """Tiles of 128 x 256 in whole waves; a short inner dimension leaves less to hide loads behind."""
        tiles = math.ceil(m / 128) * math.ceil(n / 256)
        computed = math.ceil(tiles / self.multiprocessors) * self.multiprocessors * 128 * 256 * k * 2
        efficiency = 1.1 * k / (k + 512)
        return max(computed / (self.cluster.gemm_flops * efficiency), self.cluster.launch_seconds)

    def _attention(self, strategy: str, length: int, phase: str) -> float:
        """In as many kernels as the strategy has tiles; one over few keys is slower for each pair."""
        p = self.shape.group_size
        kernels = {"ring": p, "metp": p * p}.get(strategy, 1)
        keys = length / p if strategy in ("ring", "metp") else length
        efficiency = 1.1 * keys / (keys + 512)
        flops = closed_forms.attention_flops(self.shape, strategy, phase, length**2)
        each = flops / kernels / (self.cluster.attention_flops * efficiency)
        merges = 0.0 if kernels == 1 else 4 * self.cluster.launch_seconds
        return kernels * (max(each, self.cluster.launch_seconds) + merges)

    def _element_wise(self, strategy: str, tokens: int, phase: str) -> float:
        nbytes = closed_forms.touched_elements(self.shape, strategy, tokens) * self.shape.element_bytes
        share = 1 / 3 if phase == "forward" else 2 / 3
        return max(1.2 * share * nbytes / self.cluster.memory_bandwidth, 14 * self.cluster.launch_seconds)


def _allocated(shape: LayerShape, strategy: str, length: int, seed: int) -> tuple[int, int]:
    """Kept and transient bytes: closed forms, up to 4 % lost to fragments by strategy and 2 % more by length, blocks of
    2 MiB. Workspaces of kernels are allocated once and belong to the states."""
    tokens = length // shape.group_size
    lost = (
        1
        + _generator(seed, strategy, 0).uniform(0.0, 0.04)
        + _generator(seed + 1, strategy, length).uniform(0.0, 0.02)
    )
    kept = memory_forms.kept_bytes(shape, strategy, tokens, length**2)
    transient = memory_forms.transient_bytes(shape, strategy, tokens, length**2)
    return _rounded(kept * lost), _rounded(transient * lost)


def _rounded(nbytes: float) -> int:
    return math.ceil(nbytes / (2 * _MIB)) * 2 * _MIB


def _generator(seed: int, strategy: str, length: int) -> np.random.Generator:
    return np.random.default_rng((seed, STRATEGIES.index(strategy), length))
