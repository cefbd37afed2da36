"""From importance to the set of blocks that train: probabilities, draw without replacement, generator.

Contract: pure functions of values, plus `Sampler`, which owns the random generator so that neither the
script's seeds nor its dropout can change a draw. Draws are the same on every rank and platform for the same
seed, policy and importance: the uniform numbers come from torch's CPU Mersenne Twister in fp64, everything
else is Python's math.

Not here: when to draw (controller.py), and the rule of each policy (policies/).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# torch.rand gives multiples of 2**-53, among them 0, which has no logarithm; half a step stands in for it.
_SMALLEST_UNIFORM = 2.0**-54


@dataclass(frozen=True)
class DrawRule:
    """What every draw of a run has in common."""

    num_active: int
    """Blocks to choose, all different."""
    temperature: float = 1.0
    """Divides importance over its mean; small: the largest win, large: uniform."""
    exploration: float = 0.0
    """Share of a uniform draw, 0 to 1."""


@dataclass(frozen=True)
class Draw:
    """Outcome of one draw over L blocks."""

    active: tuple[int, ...]
    """Chosen blocks, ascending."""
    probabilities: tuple[float, ...]
    """L values: how likely each is the first block drawn; of a draw without chance, 1 chosen, 0 not."""

    @property
    def effective_blocks(self) -> float:
        """Effective number of blocks, see `effective_blocks`."""
        return effective_blocks(self.probabilities)


class Policy(Protocol):
    """A rule for choosing blocks: one small frozen class per file in policies/, registered there by name."""

    name: str
    probes: bool
    """Whether a run begins with measuring every block."""
    refreshes: bool
    """Whether importance follows what is measured in training."""

    def draw(
        self, importance: Sequence[float], rule: DrawRule, draw_index: int, generator: torch.Generator
    ) -> Draw:
        """Choose `rule.num_active` of `len(importance)` blocks; `draw_index` counts a run's draws from 0."""
        ...


def log_probabilities(importance: Sequence[float], temperature: float, exploration: float) -> list[float]:
    """Logarithm of `p = (1 - exploration) * softmax((m / mean(m)) / temperature) + exploration / L`.

    Dividing by the mean lets one temperature serve models whose gradients differ by orders of magnitude.
    Logarithms, since a low temperature takes small probabilities to 0 in fp64 and their order would be lost.
    All zero = uniform.
    """
    assert all(0 <= m < math.inf for m in importance), f"importance must be finite and >= 0: {importance}"
    num_blocks, largest = len(importance), max(importance)
    if largest == 0:
        return [-math.log(num_blocks)] * num_blocks
    scaled = [m / largest for m in importance]  # the sum of huge values would overflow
    mean = math.fsum(scaled) / num_blocks
    logits = [(value - 1.0) / mean / temperature for value in scaled]  # at most 0: exp can't overflow
    log_total = math.log(math.fsum(math.exp(logit) for logit in logits))
    return [_log_mix(logit - log_total, -math.log(num_blocks), exploration) for logit in logits]


def _log_mix(log_p: float, log_q: float, share: float) -> float:
    """`log((1 - share) * p + share * q)` without leaving logarithms."""
    if share == 0 or share == 1:
        return log_q if share else log_p
    high, low = sorted((math.log1p(-share) + log_p, math.log(share) + log_q), reverse=True)
    return high + math.log1p(math.exp(low - high))


def probabilities(importance: Sequence[float], temperature: float, exploration: float) -> list[float]:
    """The exponential of `log_probabilities`; L values that add up to 1."""
    return [math.exp(value) for value in log_probabilities(importance, temperature, exploration)]


def gumbel_top_k(log_p: Sequence[float], num_active: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw `num_active` different blocks: the largest of `log p + Gumbel noise`, ascending by block.

    The same distribution as drawing one after the other from p, renormalised over those that are left. Uses
    exactly `len(log_p)` numbers of `generator`, whatever the outcome.
    """
    assert 1 <= num_active <= len(log_p), f"{num_active} of {len(log_p)} blocks"
    uniform = torch.rand(len(log_p), generator=generator, dtype=torch.float64).tolist()
    keys = [
        value - math.log(-math.log(u or _SMALLEST_UNIFORM)) for value, u in zip(log_p, uniform, strict=True)
    ]
    return largest(keys, num_active)


def largest(values: Sequence[float], num_active: int) -> tuple[int, ...]:
    """Blocks of the `num_active` largest values, ascending by block; of equal values the lower index wins."""
    order = sorted(range(len(values)), key=lambda block: (-values[block], block))
    return tuple(sorted(order[:num_active]))


def turn(index: int, num_active: int, num_blocks: int) -> tuple[int, ...]:
    """Blocks of turn `index`: `num_active` neighbours, walking on through all blocks and round, ascending.

    The walk does not start afresh at block 0, so that after L turns every block has come up equally often
    even where `num_active` does not divide L.
    """
    first = index * num_active
    return tuple(sorted((first + offset) % num_blocks for offset in range(num_active)))


def certain(active: tuple[int, ...], num_blocks: int) -> Draw:
    """The draw of a policy that leaves nothing to chance: 1 for the chosen blocks and 0 for the others."""
    chosen = set(active)
    return Draw(active, tuple(1.0 if block in chosen else 0.0 for block in range(num_blocks)))


def effective_blocks(values: Sequence[float]) -> float:
    """exp of the entropy of the normalised values, L of them: 1 = always the same block, L = uniform."""
    total = math.fsum(values)
    shares = [value / total for value in values if value > 0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


class Sampler:
    """A policy, its generator and its number of draws: what the next draw depends on beside importance."""

    def __init__(
        self, policy: Policy, num_active: int, temperature: float, exploration: float, seed: int
    ) -> None:
        self.policy = policy
        self.rule = DrawRule(num_active, temperature, exploration)
        self.num_draws = 0
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(self, importance: Sequence[float]) -> Draw:
        """The next draw over `len(importance)` blocks."""
        draw = self.policy.draw(importance, self.rule, self.num_draws, self._generator)
        self.num_draws += 1
        return draw

    def state_dict(self) -> dict[str, Any]:
        """`generator`: uint8 tensor on the CPU; `num_draws`: int. Both are copies."""
        return {"generator": self._generator.get_state(), "num_draws": self.num_draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved; the seed of this run no longer matters."""
        # A checkpoint may have been mapped to another device, or its bytes written out as a list.
        self._generator.set_state(torch.as_tensor(state["generator"], dtype=torch.uint8, device="cpu"))
        self.num_draws = int(state["num_draws"])
