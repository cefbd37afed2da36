"""A short profile at start: one real layer under each strategy, forward and backward, timed and weighed.

The layer runs as it will run, norms and residuals too, but on aliases of its weights that are nobody's parameters: no
gradient, hook or bucket of the job is touched. Inputs are random, and the job's random states are put back. All ranks
of the group take part, and what the slowest and largest measured is everybody's measurement: from equal measurements
follow equal cost models and equal plans.

Which lengths: :mod:`.profile_sizes`. Closed forms fitted to them say the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import memory_probe
from .aliases import alias_of
from .layer_shape import LayerShape
from .micro_batch import MicroBatch, running
from .profile import Measurement
from .switch import BlockSwitch

REPEATS = 3
_RECOMPUTED = ("recompute_mlp", "recompute_input_layernorm", "recompute_pre_mlp_layernorm")


def profile_layer(
    switch: BlockSwitch,
    place: int,
    shape: LayerShape,
    batch: int,
    lengths: Sequence[int],
    strategies: Sequence[str],
) -> list[Measurement]:
    """Measurements of the block's layer at `place` at these lengths, under every strategy that can run; the same list
    on all ranks."""
    layer, group = switch.layers[place].layer, switch.group
    aliases = {name: alias_of(parameter, layer.config) for name, parameter in layer.named_parameters()}
    weight = next(iter(aliases.values()))
    rows = []
    devices = [weight.device] if weight.is_cuda else []
    # The first micro-batch may be one of an evaluation.
    with torch.random.fork_rng(devices), _whole(layer), torch.inference_mode(False), torch.enable_grad():
        for size in lengths:
            tables = _first_rows(switch.call.get("rotary_pos_emb"), size)
            for name in strategies:
                if shape.obstacle(name, batch, size) is not None:
                    continue
                micro_batch = MicroBatch(switch, (name,) * len(switch.layers), batch, size)
                x = torch.randn(size // group.size(), batch, shape.hidden_size, device=weight.device)

                def run(x: Tensor, micro_batch: MicroBatch = micro_batch, tables: Any = tables) -> Tensor:
                    options = {"hidden_states": x, "attention_mask": None, "rotary_pos_emb": tables}
                    with running(micro_batch):
                        return torch.func.functional_call(layer, aliases, (), options)[0]

                found = _measure(run, x.to(weight.dtype), [*aliases.values(), *_flat(tables)])
                worst = torch.tensor(found, dtype=torch.float64, device=weight.device)
                dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
                seconds, kept, transient = worst.tolist()
                rows.append(Measurement(name, batch, size, seconds, int(kept), int(transient)))
    return rows


def _measure(run: Callable[[Tensor], Tensor], x: Tensor, shared: Sequence[Tensor]) -> tuple[float, int, int]:
    """Median seconds, kept and transient bytes of forward and backward. The weighing one warms up."""
    x = x.requires_grad_()
    kept, transient = memory_probe.measure(lambda: run(x), x, shared)
    taken = []
    for _ in range(REPEATS):
        x = x.detach().requires_grad_()
        _synchronise(x)
        start = time.perf_counter()
        y = run(x)
        y.backward(torch.ones_like(y))
        _synchronise(x)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[REPEATS // 2], kept, transient


@contextmanager
def _whole(layer: nn.Module) -> Iterator[None]:
    """As in training, whatever the first micro-batch is of, but without Megatron's recomputation of modules: it would
    run their own weights in backward, not the aliases."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.train()
    before = {name: getattr(layer, name) for name in _RECOMPUTED if hasattr(layer, name)}
    for name in before:
        setattr(layer, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(layer, name, value)
        for module, training in modes:
            module.training = training


def _first_rows(tables: Any, length: int) -> Any:
    if isinstance(tables, tuple):
        return tuple(_first_rows(table, length) for table in tables)
    if tables is None:
        return None
    # With packed documents a table is as long as the longest of them; its values do not matter here.
    return (
        tables[torch.arange(length, device=tables.device) % len(tables)]
        if len(tables) < length
        else tables[:length]
    )


def _flat(tables: Any) -> list[Tensor]:
    return [table for table in (tables if isinstance(tables, tuple) else (tables,)) if table is not None]


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)  # the clock is the host's
