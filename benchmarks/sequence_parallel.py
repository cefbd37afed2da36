"""Time and memory of each sequence-parallel strategy: one transformer layer, forward and backward, over lengths.

    torchrun --nproc_per_node 8 benchmarks/sequence_parallel.py --model llama-8b     # a node: everything
    python benchmarks/sequence_parallel.py --model llama-8b --group-size 8           # one device: the compute part

Started alone, it is rank 0 of a group whose collectives do nothing (PyTorch's "fake" backend): what is timed is what
one rank of that group computes, and every row says so. Beside each time stand the limits it is measured against:
the rank's FLOPs, and the bytes that leave it, from the closed forms. Rows are JSON; `--cpu` runs small on gloo.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rows import append, new_row
from torch import Tensor

from megatron_ext.sequence_parallel import closed_forms
from megatron_ext.sequence_parallel.attention import Pattern
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.names import STRATEGIES
from megatron_ext.sequence_parallel.stopwatch import Stopwatch
from megatron_ext.sequence_parallel.strategies import BODIES
from megatron_ext.sequence_parallel.strategies.layer import (
    AttentionLayer,
    AttentionWeights,
    FeedForwardLayer,
    FeedForwardWeights,
)

MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "ffn_hidden_size": 28672,
        "num_heads": 64,
        "num_kv_heads": 8,
        "head_dim": 128,
    },
    "tiny": {"hidden_size": 128, "ffn_hidden_size": 384, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16},
}
"""Gated, without biases."""
WARM_UP, TIMED = 3, 10


def main() -> None:
    parsed = arguments().parse_args()
    device, alone = start(parsed.group_size, parsed.cpu)
    group = dist.group.WORLD
    dtype = torch.float32 if parsed.cpu else torch.bfloat16
    shape = LayerShape(
        **MODELS[parsed.model],
        group_size=group.size(),
        gated=True,
        element_bytes=dtype.itemsize,
    )
    layer = random_layer(shape, group, device, dtype)
    rows = []
    for length in parsed.lengths:
        for name in STRATEGIES:
            reason = shape.obstacle(name, 1, length)
            row = {"strategy": name, "length": length, "obstacle": reason}
            if reason is None:
                row |= measured(name, shape, layer, length, device, dtype)
            rows.append(row)
            if group.rank() == 0:
                show(row)
    if parsed.json and group.rank() == 0:
        row = new_row("sequence_parallel.py", sys.argv[1:], ("torch", "ds-grass"))
        kind = "compute of one rank, collectives do nothing" if alone else "all"
        facts = {"model": parsed.model, "group_size": group.size(), "measured": kind}
        append(str(parsed.json), row | facts | {"rows": rows})
    dist.destroy_process_group()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="each strategy's time and memory over sequence lengths")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument(
        "--group-size", type=int, default=8, help="of the group to stand in for when started alone"
    )
    parser.add_argument("--cpu", action="store_true", help="on CPUs over gloo, fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    return parser


def start(group_size: int, cpu: bool) -> tuple[torch.device, bool]:
    """Join the launcher's group, or be rank 0 of one that does nothing."""
    alone = "RANK" not in os.environ
    if alone:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=group_size, store=FakeStore())
    else:
        dist.init_process_group("gloo" if cpu else "nccl")
    if cpu:
        return torch.device("cpu"), alone
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device, alone


def random_layer(shape: LayerShape, group: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """This rank's shards of a layer, and the layer as strategies are given it."""

    def shard(rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, device=device, dtype=torch.float32) * columns**-0.5
        return weight.to(dtype).requires_grad_()

    p, h = shape.group_size, shape.hidden_size
    attention = AttentionWeights(shard(shape.qkv_size // p, h), None, shard(h, shape.query_size // p))
    feed_forward = FeedForwardWeights(
        shard(shape.fc1_size // p, h), None, shard(h, shape.ffn_hidden_size // p)
    )
    heads = AttentionLayer(
        group, shape.num_heads, shape.num_kv_heads, shape.head_dim, lambda q, k, spans, norms: (q, k)
    )
    return (attention, heads), (feed_forward, FeedForwardLayer(group, True, gated))


def gated(x: Tensor) -> Tensor:
    gate, other = x.chunk(2, -1)
    return F.silu(gate) * other


def run(name: str, layer: Any, pattern: Pattern, x: Tensor) -> Tensor:
    attention, feed_forward = layer
    return BODIES[name].feed_forward(BODIES[name].attention(x, *attention, pattern), *feed_forward)


def measured(
    name: str, shape: LayerShape, layer: Any, length: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Median of ten steps, the slowest rank; the rate that comes of it, and the peak above weights and input."""
    x = (
        torch.randn(length // shape.group_size, 1, shape.hidden_size, device=device)
        .to(dtype)
        .requires_grad_()
    )
    step = partial(run, name, layer, Pattern(True, shape.head_dim**-0.5))
    taken, stopwatch = [], Stopwatch()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for number in range(WARM_UP + TIMED):
        timed = stopwatch.start(device, lambda seconds, _: taken.append(seconds))
        y = step(x)
        timed.forward_ended(x, y)
        y.backward(torch.ones_like(y))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stopwatch.poll()
        assert len(taken) == number + 1
    seconds = torch.tensor([median(taken[WARM_UP:])], device=device, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    tokens, pairs = length // shape.group_size, length**2
    flops = sum(
        closed_forms.gemm_flops(shape, name, part, phase, tokens)
        for part in closed_forms.PARTS
        for phase in closed_forms.PHASES
    ) + sum(closed_forms.attention_flops(shape, name, phase, pairs) for phase in closed_forms.PHASES)
    events = closed_forms.all_collectives(shape, name, tokens)
    sent = sum(closed_forms.wire_elements(e, shape.group_size) * e.bytes / max(1, e.elements) for e in events)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return {
        "seconds": seconds.item(),
        "flops": flops,
        "flops_per_second": flops / seconds.item(),
        "bytes_sent": sent,
        "messages": len(events),
        "peak_bytes": peak,
    }


def show(row: dict[str, Any]) -> None:
    if row["obstacle"]:
        print(f"{row['length']:>8} {row['strategy']:<12} cannot: {row['obstacle']}", flush=True)
        return
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:8.2f} GB"
    print(
        f"{row['length']:>8} {row['strategy']:<12} {row['seconds'] * 1e3:9.2f} ms "
        f"{row['flops_per_second'] / 1e12:8.2f} TFLOP/s {row['bytes_sent'] / 1e6:10.1f} MB sent {peak}",
        flush=True,
    )


if __name__ == "__main__":
    main()
