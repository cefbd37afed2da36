"""GRASS the obvious way: one process, plain PyTorch, no code shared with the package. The rest is compared with this.

Contract: the whole model trains with one `torch.optim.AdamW` per block over full-precision master weights; the caller
gives the data of every rank and the active blocks of every step, and gets back what the engine must have computed.
`Sampling` has its own few lines for importance and probabilities (arXiv 2604.07808, sections 3.2 and 3.3).
Not covered: the draw itself (the schedule is an input), sharding, streams, anything about memory or speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """One parameter group of the user: its parameter names and AdamW hyper-parameters (`lr` is the base rate)."""

    names: Sequence[str]
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class Record:
    """What one step did: global gradient norm before clipping, squared norm and importance of every measured block."""

    norm: float
    importance: dict[int, float]
    applied: bool


@dataclass
class Reference:
    """Trains `model` in place. `blocks[i]` holds the parameter names of block i; every other trainable name is outer.

    `loss(model, batch)` gives a scalar. `clip` 0 means no clipping. `each_micro_step` averages over the ranks after
    every micro-batch instead of once a step, which is where ZeRO-2 and 3 round when the model is in bf16.
    """

    model: nn.Module
    blocks: Sequence[Sequence[str]]
    groups: Sequence[Group]
    loss: Callable[[nn.Module, Tensor], Tensor]
    clip: float = 0.0
    loss_scale: float = 1.0
    each_micro_step: bool = False
    lr_factor: Callable[[int], float] = lambda applied: 1.0
    applied: int = 0
    masters: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in self.params.items()}
        self.masters = {n: p.detach().to(wide[n], copy=True).requires_grad_() for n, p in self.params.items()}
        inside = {n for names in self.blocks for n in names}
        self.units = {i: [n for n in names if n in self.params] for i, names in enumerate(self.blocks)}
        self.units[-1] = [n for n in self.params if n not in inside]
        self.optimizers = {i: self._adamw(names) for i, names in self.units.items()}

    def _adamw(self, names: Iterable[str]) -> torch.optim.AdamW | None:
        wanted, groups = set(names), []
        for group in self.groups:
            params = [self.masters[n] for n in group.names if n in wanted]
            options = {
                "lr": group.lr,
                "betas": group.betas,
                "eps": group.eps,
                "weight_decay": group.weight_decay,
            }
            groups += [{"params": params, "base_lr": group.lr, **options}] if params else []
        return torch.optim.AdamW(groups, foreach=False) if groups else None

    def gradients(self, data: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return the averaged gradients for `data[rank][micro_batch]`, unscaled, in the precision of the masters."""
        ranks, micros = len(data), len(data[0])
        total: dict[str, Tensor] = {}
        if self.each_micro_step:
            for micro in range(micros):
                averaged: dict[str, Tensor] = {}
                for rank in range(ranks):
                    self._add(averaged, self._backward(data[rank][micro], micros), ranks)
                self._add(total, averaged)
        else:
            for rank in range(ranks):
                accumulated: dict[str, Tensor] = {}
                for micro in range(micros):
                    self._add(accumulated, self._backward(data[rank][micro], micros))
                self._add(total, accumulated, ranks)
        zero = torch.zeros(())
        return {
            n: total.get(n, zero).to(m.dtype).expand_as(m) / self.loss_scale for n, m in self.masters.items()
        }

    def _backward(self, batch: Tensor, micros: int) -> dict[str, Tensor]:
        self.model.zero_grad(set_to_none=True)
        (self.loss(self.model, batch) * (self.loss_scale / micros)).backward()
        return {n: p.grad for n, p in self.params.items() if p.grad is not None}

    @staticmethod
    def _add(total: dict[str, Tensor], part: dict[str, Tensor], divisor: int = 1) -> None:
        for name, grad in part.items():
            total[name] = total[name] + grad / divisor if name in total else grad / divisor

    def step(self, data: Sequence[Sequence[Tensor]], active: Iterable[int], *, update: bool = True) -> Record:
        """Run one optimizer step with `active` blocks and the outer parameters; `update=False` is a probe step."""
        grads, active = self.gradients(data), sorted(active)
        squares = {
            i: float(sum(grads[n].double().square().sum() for n in self.units[i])) for i in [*active, -1]
        }
        norm = math.sqrt(sum(squares.values()))
        numel = {i: sum(self.masters[n].numel() for n in self.units[i]) for i in active}
        importance = {i: math.sqrt(squares[i] / numel[i]) for i in active}
        applied = update and math.isfinite(norm)
        if applied:
            shrink = max(1.0, (norm + 1e-6) / self.clip) if self.clip else 1.0
            for unit in [*active, -1]:
                self._update(unit, grads, shrink)
            self.applied += 1
        return Record(norm, importance, applied)

    @torch.no_grad()
    def _update(self, unit: int, grads: dict[str, Tensor], shrink: float) -> None:
        if self.optimizers[unit] is None:
            return
        for name in self.units[unit]:
            self.masters[name].grad = grads[name] / shrink
        for group in self.optimizers[unit].param_groups:
            group["lr"] = group["base_lr"] * self.lr_factor(self.applied)
        self.optimizers[unit].step()
        for name in self.units[unit]:
            self.params[name].copy_(self.masters[name])


@dataclass
class Sampling:
    """Importance and probabilities as the paper states them, on lists of floats."""

    num_blocks: int
    temperature: float = 0.5
    ema: float = 0.5
    exploration: float = 0.0
    importance: list[float] | None = None

    def refresh(self, window: Sequence[dict[int, float]]) -> list[float]:
        """Blend the mean of each block measured in `window` into its importance; the first window replaces it."""
        old = self.importance or [0.0] * self.num_blocks
        share = 1.0 if self.importance is None else self.ema
        self.importance = list(old)
        for block in range(self.num_blocks):
            seen = [values[block] for values in window if block in values]
            if seen:
                self.importance[block] = share * sum(seen) / len(seen) + (1 - share) * old[block]
        return list(self.importance)

    def probabilities(self) -> list[float]:
        """Return `(1 - eps) * softmax(m / mean(m) / tau) + eps / L` for the present importance."""
        mean = sum(self.importance) / self.num_blocks
        weights = [math.exp(m / mean / self.temperature) for m in self.importance]
        eps = self.exploration
        return [(1 - eps) * w / sum(weights) + eps / self.num_blocks for w in weights]
