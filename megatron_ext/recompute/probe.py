"""What a layer keeps, holds for a moment, and takes to run again, measured under each choice it has.

One layer of each class runs forward and backward in the place of a micro-batch that is waiting: on random activations
of that micro-batch's size, with its mask and its rotary angles, but with aliases of its weights that are nobody's
parameters: no gradient, bucket or optimizer of the job is touched, and the random states are put back. All ranks that
hold one plan take part, and the largest of what they measure is what all of them plan with.

Contract: what autograd saves is followed by storage, each once, without what is there anyway (weights, masks, tables);
what is held for a moment is the allocator's count on a GPU, and followed operator by operator on a CPU
(:mod:`megatron_ext.sequence_parallel.memory_probe`). Frozen weights stay frozen, so a block that does not train is
measured as it is. Not covered: other sizes than the one that is waiting (:mod:`.sizes`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..sequence_parallel import memory_probe
from ..sequence_parallel.aliases import alias_of
from . import expert_state
from .layer_loop import has_experts, set_modules
from .plan import FULL, NONE

REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """One layer under one choice, for one micro-batch, on the rank where it is most."""

    choice: str
    forward_seconds: float
    backward_seconds: float
    """With what is run again in it."""
    kept_bytes: int
    """From forward to backward, the layer's input included."""
    transient_bytes: int
    """The most on top of that while it runs backward."""


def measure_layer(
    layer: nn.Module, choices: Sequence[str], hidden: Tensor, options: dict[str, Any]
) -> list[Measured]:
    """This rank's measurements of `layer` under each choice; :func:`most_of_group` makes them everybody's.

    `hidden`: [s / tp, b, h], whose size and dtype the random input gets. `options`: the other arguments of the layer.
    """
    found = []
    there = [tensor for tensor in memory_probe.tensors_of(options)]
    with (
        _states_put_back(hidden),
        _buffers_put_back(layer),
        expert_state.put_back() if has_experts(layer) else nullcontext(),
        torch.inference_mode(False),
        torch.enable_grad(),
        _aliases(layer) as weights,
    ):
        for choice in choices:
            x = torch.randn(hidden.shape, device=hidden.device).to(hidden.dtype).requires_grad_()
            run = _runner(layer, choice, options)
            kept, transient = memory_probe.measure(lambda x=x, run=run: run(x), x, [*weights, *there])
            forward, backward = _times(run, x)
            found.append(Measured(choice, forward, backward, kept, transient))
    return found


def most_of_group(rows: Sequence[Measured], group: Any, device: torch.device) -> list[Measured]:
    """Of each row's numbers the largest of all ranks of `group`."""
    if group.size() == 1:
        return list(rows)
    # kept and transient bytes, seconds forward and backward; fp64 holds bytes up to 8 PiB to the last one
    numbers = [
        [row.kept_bytes, row.transient_bytes, row.forward_seconds, row.backward_seconds] for row in rows
    ]
    most = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return [
        Measured(row.choice, forward, backward, int(kept), int(transient))
        for row, (kept, transient, forward, backward) in zip(rows, most.tolist(), strict=True)
    ]


def _runner(layer: nn.Module, choice: str, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The layer as :mod:`.layer_loop` runs it."""
    from megatron.core import tensor_parallel

    def once(x: Tensor) -> Tensor:
        set_modules(layer, NONE if choice == FULL else choice)
        return layer(hidden_states=x, **options)[0]

    return (lambda x: tensor_parallel.checkpoint(once, False, x)) if choice == FULL else once


def _times(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """The quickest seconds of forward and of backward: whatever else the machine does only adds."""
    forward, backward = [], []
    for _ in range(REPEATS):
        x = x.detach().requires_grad_()
        marks = [_now(x)]
        y = run(x)
        marks.append(_now(x))
        y.backward(torch.ones_like(y))
        marks.append(_now(x))
        forward.append(marks[1] - marks[0])
        backward.append(marks[2] - marks[1])
    return min(forward), min(backward)


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


@contextmanager
def _aliases(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the layer's parameters are others with the same storage. Recomputation in backward uses them too, which
    a functional call would not outlive."""
    replaced = []
    made: dict[int, nn.Parameter] = {}
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                replaced.append((module, name, parameter))
    try:
        for module, name, parameter in replaced:
            if id(parameter) not in made:
                made[id(parameter)] = alias_of(parameter, layer.config)
            module._parameters[name] = made[id(parameter)]
        yield list(made.values())
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


@contextmanager
def _states_put_back(hidden: Tensor) -> Iterator[None]:
    """PyTorch's random states, and Megatron-core's own."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    # Where graphs may be captured, the tracker's states are generators, which go on wherever they are referred to.
    generators = [(g, g.get_state()) for g in states.values() if isinstance(g, torch.Generator)]
    with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
        try:
            yield
        finally:
            tracker.set_states(states)
            for generator, state in generators:
                generator.set_state(state)


@contextmanager
def _buffers_put_back(layer: nn.Module) -> Iterator[None]:
    """A router counts the tokens of its experts in one, and moves its bias by that."""
    before = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
