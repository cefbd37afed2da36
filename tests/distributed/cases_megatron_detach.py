"""What the switch leaves behind when it is taken out: nothing, and the stock model to the bit.

Not covered: `megatron_ext.remove` after plans of the planner's own (cases_megatron_job.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import megatron_ext
from megatron_ext import hooks, job
from megatron_ext.sequence_parallel import switch
from megatron_ext.sequence_parallel.block_policy import blocks_of
from tests import megatron_models, plain_gpt
from tests.distributed.cases_megatron_disagreement import applied
from tests.distributed.cases_megatron_training import RECOMPUTE
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT
from tests.random_plans import random_plans


@case(ranks=(2,), most_quick=1, recompute=("full", "none", "selective"))
def detaching_leaves_the_stock_model(ctx: Context, recompute: str) -> None:
    """Outputs and gradients to the bit; no attribute, hook or wrapper; attaching twice is attaching once."""
    from megatron.core import tensor_parallel

    gpt = GPT(groups=4, activation="swiglu", qk_norm=True)
    original = tensor_parallel.checkpoint
    with megatron_models.parallel_state(tp=2):
        chunks = megatron_models.build(gpt, **RECOMPUTE[recompute])
        stock = _outputs_and_gradients(chunks)
        parts = list(chunks[0].modules())
        before = [_state(part) for part in parts]
        (block,) = blocks_of(chunks[0])
        for _ in range(2):
            once = switch.attach(block, lambda batch, length, documents: ("metp", "ring"))
            assert switch.attach(block, lambda batch, length, documents: ("ulysses", "context")) is once
            wrapper = tensor_parallel.checkpoint
            assert wrapper.__wrapped__ is original
            with random_plans(chunks, names=("metp",)) as ran:  # a third policy, and the detaching
                switched = _outputs_and_gradients(chunks)
            ran.check(("metp",), recomputed=recompute == "full")
            switch.detach(block)  # nothing to do
            assert tensor_parallel.checkpoint is original
            assert [_state(part) for part in parts] == before
            after = _outputs_and_gradients(chunks)
            assert all(torch.equal(stock[name], after[name]) for name in stock)
            assert not all(torch.equal(stock[name], switched[name]) for name in stock)


@case(ranks=(2,))
def applying_twice_is_applying_once(ctx: Context) -> dict:
    """By hand, and by the hook that is called when Megatron-core is imported; one remove undoes it all."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer import transformer_block

    original, built = tensor_parallel.checkpoint, transformer_block.TransformerBlock.__init__
    hooks.install_block(transformer_block)
    assert transformer_block.TransformerBlock.__init__ is built
    with megatron_models.parallel_state(tp=2):
        for _ in range(2):
            with applied({"strategy": "ring"}):
                chunks = megatron_models.build(GPT())
                job.current().adopt(chunks[0].decoder)
                assert job.current().blocks == [chunks[0].decoder]
                _outputs_and_gradients(chunks)
                counters = megatron_ext.counters()
                assert counters == {"ring": {32: {"forward": 2, "backward": 2, "recomputed": 0}}}, counters
            assert not any("forward" in vars(part) for part in chunks[0].modules())
            assert tensor_parallel.checkpoint is original
            megatron_ext.remove()
            assert megatron_ext.counters() == {}
    return counters


def _outputs_and_gradients(chunks: list[nn.Module]) -> dict[str, Tensor]:
    batch = plain_gpt.make_batch(GPT(), 0)
    for chunk in chunks:
        chunk.zero_grad()
    logits = chunks[0](batch.tokens, batch.positions, None)
    megatron_models.cross_entropy(logits, batch.labels).backward()
    return megatron_models.gather_gradients(chunks) | {"logits": logits.detach()}


def _state(module: nn.Module) -> tuple:
    """What could have been left on a module: attributes, hooks, marks on its parameters."""
    hooks = [key for key in vars(module) if key.endswith("_hooks")]
    marks = [sorted(vars(parameter)) for parameter in module.parameters(recurse=False)]
    return set(vars(module)), [list(vars(module)[key]) for key in hooks], marks, type(module).forward
