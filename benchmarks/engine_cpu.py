"""The AdamW kernel on the CPU beside its peers and beside the machine's memory bandwidth, on the same memory.

Every contestant updates the same tensors and they take turns, call by call. `bare` is fp32 AdamW alone. `full` is what
a step of mixed precision needs: a bf16 gradient in, unscaled and clipped by a scalar, fp32 master and moments updated,
bf16 weights out. The peers get the fewest passes that their interfaces allow: a cast of the gradient before, a cast of
the weights after; torch's fused AdamW unscales by itself, DeepSpeedCPUAdam needs another pass for it.

Bandwidth is told in conventional bytes: what is read plus what is written, without the reads that a cache makes before
a write. The triad's arrays together are as large as the shard's tensors.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_grass import ops

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
CLIP = 0.5
PAGE_FLOATS = 4096
ELEMENT_BYTES = {"bare": 28, "full": 28}
"""Read and written an element: 16 + 12, and 14 + 14."""
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 21, 1000
MIN_SECONDS = 1.5
"""Of our own calls, for one row."""


def measure(sizes: Sequence[int], progress: Callable[[str], None]) -> list[dict[str, Any]]:
    torch.set_num_threads(os.cpu_count() or 1)
    load_triad()
    found = []
    for work in ELEMENT_BYTES:
        for numel in sizes:
            progress(f"AdamW on the CPU, {work}, {numel / 1e6:.0f} M elements")
            found.append(row(work, numel))
    return found


def load_triad() -> None:
    from torch.utils.cpp_extension import load

    source = Path(__file__).with_name("triad.cpp")
    flags = ["-O3", "-march=native", "-fopenmp"]
    load("grass_bench_triad", [str(source)], extra_cflags=flags, is_python_module=False)


def row(work: str, numel: int) -> dict[str, Any]:
    shard = Shard(numel)
    contestants = {"ds_grass": shard.ours(work), **shard.peers(work), **triads(shard.nbytes(work))}
    times = take_turns(contestants)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    triad_floats = triad_size(shard.nbytes(work))
    triad = {name: 12 * triad_floats / seconds.pop(name) for name in ("plain", "streaming")}
    own = seconds.pop("ds_grass")
    bandwidth = ELEMENT_BYTES[work] * numel / own
    return {
        "work": work,
        "elements": numel,
        "threads": torch.get_num_threads(),
        "seconds": own,
        "peer_seconds": seconds,
        "speedup_over_fastest_peer": min(speedup(times["ds_grass"], times[name]) for name in seconds),
        "bytes_per_second": bandwidth,
        "triad_bytes_per_second": triad,
        "triad_fraction": bandwidth / max(triad.values()),
        "triad_fraction_with_write_allocate": bandwidth / triad["plain"],
    }


class Shard:
    """The tensors of one shard, written once so that every page is there."""

    def __init__(self, numel: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.master = torch.randn(numel, generator=generator)
        self.weights = self.master.bfloat16()
        self.grad = torch.randn(numel, generator=generator)
        self.low_grad = self.grad.bfloat16()
        self.exp_avg = 0.1 * self.grad
        self.exp_avg_sq = self.grad.square()
        self.inv_scale = torch.full((), CLIP)

    def nbytes(self, work: str) -> int:
        tensors = [self.master, self.exp_avg, self.exp_avg_sq]
        tensors += [self.grad] if work == "bare" else [self.weights, self.low_grad]
        return sum(tensor.nbytes for tensor in tensors)

    def ours(self, work: str) -> Callable[[], None]:
        one = torch.ones(())
        if work == "bare":
            return lambda: ops.adamw_(
                self.master, None, self.exp_avg, self.exp_avg_sq, self.grad, one, step=100, **HYPER
            )
        return lambda: ops.adamw_(
            self.weights, self.master, self.exp_avg, self.exp_avg_sq, self.low_grad, self.inv_scale, step=100, **HYPER
        )  # fmt: skip

    def peers(self, work: str) -> dict[str, Callable[[], None]]:
        fused, cpu_adam = self._fused(), self._cpu_adam()
        if work == "bare":
            return {"torch_fused": fused.step, "deepspeed_cpu_adam": cpu_adam.step}
        # what torch's fused step takes from a gradient scaler: it divides by grad_scale in its one pass
        fused.grad_scale, fused.found_inf = 1.0 / self.inv_scale, torch.zeros(())

        def step_fused() -> None:
            self.grad.copy_(self.low_grad)
            fused.step()
            self.weights.copy_(self.master)

        def step_cpu_adam() -> None:
            self.grad.copy_(self.low_grad).mul_(self.inv_scale)
            cpu_adam.step()
            self.weights.copy_(self.master)

        return {"torch_fused": step_fused, "deepspeed_cpu_adam": step_cpu_adam}

    def _fused(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([self._parameter()], **torch_hyper(), fused=True)
        self._give_state(optimizer, torch.tensor(100.0))
        return optimizer

    def _cpu_adam(self) -> torch.optim.Optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam([self._parameter()], **torch_hyper(), adamw_mode=True)
        self._give_state(optimizer, 100)
        return optimizer

    def _parameter(self) -> nn.Parameter:
        parameter = nn.Parameter(self.master, requires_grad=True)
        parameter.grad = self.grad
        return parameter

    def _give_state(self, optimizer: torch.optim.Optimizer, step: Tensor | int) -> None:
        (parameter,) = optimizer.param_groups[0]["params"]
        optimizer.state[parameter] = {"step": step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


def torch_hyper() -> dict[str, Any]:
    betas = (HYPER["beta1"], HYPER["beta2"])
    return {"lr": HYPER["lr"], "betas": betas, "eps": HYPER["eps"], "weight_decay": HYPER["weight_decay"]}


def triad_size(nbytes: int) -> int:
    """Floats in each of the triad's three arrays."""
    return max(1, nbytes // 12 // PAGE_FLOATS) * PAGE_FLOATS


def triads(nbytes: int) -> dict[str, Callable[[], None]]:
    a, b, c = (aligned(triad_size(nbytes)) for _ in range(3))
    return {
        name: lambda streaming=streaming: torch.ops.grass_bench.triad(a, b, c, 3.0, streaming)
        for name, streaming in (("plain", False), ("streaming", True))
    }


def aligned(numel: int) -> Tensor:
    memory = torch.ones(numel + 16)
    start = -memory.data_ptr() // 4 % 16
    return memory[start : start + numel]


def take_turns(contestants: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of every call of each, after two rounds to warm up. Every round begins with another contestant."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names, rounds = list(contestants), 0
    while rounds < MIN_ROUNDS + WARM_UP or (sum(times["ds_grass"]) < MIN_SECONDS and rounds < MAX_ROUNDS):
        for place in range(len(names)):
            name = names[(place + rounds) % len(names)]
            started = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - started)
        rounds += 1
    return {name: taken[WARM_UP:] for name, taken in times.items()}


def speedup(own: Sequence[float], peer: Sequence[float]) -> float:
    """Median over the rounds: a machine that slows down slows both calls of a round."""
    return statistics.median(theirs / ours for ours, theirs in zip(own, peer, strict=True))
