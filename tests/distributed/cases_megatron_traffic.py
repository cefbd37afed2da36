"""What strategies send and keep, counted, is what their closed forms say.

One transformer block of one layer, between random activations and a random gradient: nothing but the strategy's own
traffic. Not covered: time.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import Any

import torch
from torch import nn

from megatron_ext.sequence_parallel.names import STRATEGIES
from tests import audit, megatron_models
from tests.distributed.cases_megatron_strategies import able, planned
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT
from tests.traffic import Traffic

MODELS = {
    "gelu_biases": GPT(layers=1),
    "llama": GPT(layers=1, groups=4, activation="swiglu", bias=False, norm="RMSNorm"),
    "one_kv_head": GPT(layers=1, groups=1),
    "full_mask": GPT(layers=1, causal=False),
}
LENGTH, BATCH = 48, 2
SETTLED_SECONDS = 0.05


@case(ranks=(8,), slow=True, model=tuple(MODELS), dtype=("fp64", "bf16"))
@case(ranks=(2, 4), most_quick=4, model=tuple(MODELS), dtype=("fp64", "bf16"))
def collectives_equal_the_closed_forms(ctx: Context, model: str, dtype: str) -> dict:
    """Kinds, elements and bytes of every collective and message, forward and backward."""
    from megatron_ext.sequence_parallel import closed_forms

    gpt = MODELS[model]
    kind = {"fp64": torch.float64, "bf16": torch.bfloat16}[dtype]
    differences = {}
    with megatron_models.parallel_state(tp=ctx.world_size):
        chunk = megatron_models.build(gpt, dtype=kind)[0]
        shape = _shape(chunk, ctx.world_size)
        for name in able(gpt, ctx.world_size):
            with planned([chunk], (name,)):
                inputs = block_inputs(chunk, ctx)
                with Traffic() as forward:
                    output = chunk.decoder(**inputs)
                with Traffic() as backward:
                    output.backward(torch.ones_like(output))
            for phase, seen in (("forward", forward), ("backward", backward)):
                wanted: Counter = Counter()
                for part in closed_forms.PARTS:
                    tokens = BATCH * LENGTH // ctx.world_size
                    events = closed_forms.collectives(shape, name, part, phase, tokens)
                    wanted.update(tuple(event) for event in events)
                if seen.events != wanted:
                    differences[f"{name} {phase}"] = {
                        "sent, not predicted": dict(seen.events - wanted),
                        "predicted, not sent": dict(wanted - seen.events),
                    }
    assert not differences, differences
    return {}


def block_inputs(chunk: nn.Module, ctx: Context, length: int = LENGTH, batch: int = BATCH) -> dict[str, Any]:
    """Arguments of the block's forward: random activations of this rank's tokens, and rotary angles."""
    weight = next(chunk.decoder.parameters())
    generator = torch.Generator().manual_seed(ctx.rank)
    shape = (length // ctx.world_size, batch, chunk.config.hidden_size)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.dtype).requires_grad_()
    rotary = chunk.rotary_pos_emb(length) if hasattr(chunk, "rotary_pos_emb") else None
    return {"hidden_states": hidden, "attention_mask": None, "rotary_pos_emb": rotary}


def _shape(chunk: nn.Module, ranks: int) -> Any:
    from megatron_ext.sequence_parallel.shape_of import shape_of

    return shape_of(chunk.decoder.layers[0], ranks)


@case(ranks=(2, 4), slow=True, timeout_seconds=180, model=("gelu_biases", "llama"), dtype=("fp32", "bf16"))
def predicted_memory_is_near_the_measured_one(ctx: Context, model: str, dtype: str) -> dict:
    """Profiled on one layer, predicted for four; counted by the allocator. What is kept also at twice the length.

    Within 5 %; METP keeps least, and Megatron's own, which writes scores out, most.
    """
    from megatron_ext.sequence_parallel import calibration
    from megatron_ext.sequence_parallel.cluster import find_cluster
    from megatron_ext.sequence_parallel.cost_model import AnalyticalModel
    from megatron_ext.sequence_parallel.layer_shape import LayerShape
    from megatron_ext.sequence_parallel.profile_sizes import first_lengths

    layers, length = 4, 384
    sizes = {"layers": layers, "hidden": 256, "ffn": 768, "length": 2 * length}
    gpt = dataclasses.replace(MODELS[model], **sizes)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    found, kept = {}, {}
    audit.start()
    with megatron_models.parallel_state(tp=ctx.world_size), audit.collectives_that_let_go():
        chunk = megatron_models.build(gpt, dtype=kind)[0]
        chunk.decoder.final_layernorm = None  # belongs to no layer
        shape: LayerShape = _shape(chunk, ctx.world_size)
        names = able(gpt, ctx.world_size)
        with planned([chunk], (STRATEGIES[0],) * layers):
            switch = chunk.decoder._megatron_ext_switch
            switch.call = block_inputs(chunk, ctx, length, 1)
            lengths = first_lengths(length, ctx.world_size)
            rows = calibration.profile_layer(switch, 0, shape, 1, lengths, names)
        costs = AnalyticalModel(shape, find_cluster("8xH100-80G")).calibrated(rows)
        for name in names:
            with planned([chunk], (name,) * layers):
                _block_run(chunk, ctx, length)  # gradients of weights are there from now on
                # What gloo still holds can only make a peak larger.
                peak = min(_peak(chunk, ctx, length) for _ in range(5))
                left = _left(chunk, ctx, length)
                twice = _left(chunk, ctx, 2 * length)
            # The last layer's, kept by this test.
            output = length // ctx.world_size * gpt.hidden * shape.element_bytes
            cost, of_twice = costs.predict(name, 1, length), costs.predict(name, 1, 2 * length)
            keeps = layers * cost.kept_bytes + output
            kept[name] = left
            found[name] = {
                "kept": keeps / left,
                "kept at twice the length": (layers * of_twice.kept_bytes + 2 * output) / twice,
                "peak": (keeps + cost.transient_bytes) / peak,
            }
    assert all(abs(ratio - 1) <= 0.05 for ratios in found.values() for ratio in ratios.values()), found
    assert min(kept, key=kept.__getitem__) == ("metp" if "metp" in names else "context")
    assert max(kept, key=kept.__getitem__) == "megatron_ts"
    return found


def _left(chunk: nn.Module, ctx: Context, length: int) -> int:
    """What forward leaves; the first run grows buffers that Megatron-core keeps for good."""
    return [_block_run(chunk, ctx, length) for _ in range(2)][1]


def _peak(chunk: nn.Module, ctx: Context, length: int) -> int:
    """The most that forward and backward hold above what was there."""
    before = _settled_bytes()
    audit.reset_peak()
    _block_run(chunk, ctx, length)
    return audit.peak_bytes() - before


def _block_run(chunk: nn.Module, ctx: Context, length: int) -> int:
    """Forward and backward of the block; bytes that forward left."""
    before = _settled_bytes()
    output = chunk.decoder(**block_inputs(chunk, ctx, length, 1))
    left = _settled_bytes() - before
    output.backward(torch.ones_like(output))
    return left


def _settled_bytes() -> int:
    """Live bytes once a thread of gloo has let go of the last messages, which it holds for a moment."""
    found, since = audit.live_bytes(), time.monotonic()
    while time.monotonic() - since < SETTLED_SECONDS:
        time.sleep(0.002)
        if audit.live_bytes() != found:
            found, since = audit.live_bytes(), time.monotonic()
    return found
