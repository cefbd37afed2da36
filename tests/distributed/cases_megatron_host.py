"""Stock Megatron-core on the CPU equals a plain GPT: what holds here is the ground that strategies stand on.

Not covered: anything of `megatron_ext` but its mpu adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests import megatron_models, plain_gpt
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.megatron_on_cpu import cuda_types
from tests.plain_gpt import GPT, Batch

MODELS = {
    "rope": GPT(),
    "learned": GPT(positions="learned", groups=4),
    "llama": GPT(activation="swiglu", bias=False, norm="RMSNorm", groups=2),
    "gated_biases": GPT(activation="swiglu", groups=1),
    "qk_norm": GPT(qk_norm=True, groups=4),
    "full_mask": GPT(causal=False),
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
ADAMW = {"lr": 1e-3, "weight_decay": 0.1}
CLIP = 1.0


@case(ranks=(1, 2, 4, 8), strength=1, most_quick=1, model=tuple(MODELS))
def stock_megatron_equals_the_plain_gpt(ctx: Context, model: str) -> dict:
    """Losses and every gradient over two micro-batches, tensor and sequence parallel over all ranks, fp64."""
    gpt = MODELS[model]
    batches = [plain_gpt.make_batch(gpt, number) for number in range(2)]
    with megatron_models.parallel_state(tp=ctx.world_size):
        return assert_equals_the_plain_gpt(gpt, batches, megatron_models.build(gpt))


@case(ranks=(1, 2), strength=1, most_quick=1, positions=("rope", "learned"))
def packed_documents_equal_documents_run_alone(ctx: Context, positions: str) -> dict:
    """Document borders fall inside and between the ranks' shares."""
    gpt = GPT(positions=positions, groups=4)
    batches = [
        plain_gpt.make_packed_batch(gpt, 0, (7, 16, 1, 24)),
        plain_gpt.make_packed_batch(gpt, 1, (48,)),
    ]
    with megatron_models.parallel_state(tp=ctx.world_size):
        return assert_equals_the_plain_gpt(gpt, batches, megatron_models.build(gpt, packed=True))


@case(ranks=(4,), strength=1, tp=(2,), vpp=(None, 2), varied=(False,))
@case(ranks=(2,), strength=1, most_quick=1, tp=(1,), vpp=(None, 2), varied=(False, True))
def pipeline_stages_equal_the_plain_gpt(ctx: Context, tp: int, vpp: int | None, varied: bool) -> dict:
    """Two stages, one or two chunks on each, four micro-batches, of differing lengths where `varied`."""
    gpt = GPT(layers=4)
    lengths = (32, 16, 48, 8) if varied else (32,) * 4
    batches = [plain_gpt.make_batch(gpt, number, length=length) for number, length in enumerate(lengths)]
    config: dict = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"} if varied else {}
    with megatron_models.parallel_state(tp=tp, pp=2, vpp=vpp):
        return assert_equals_the_plain_gpt(gpt, batches, megatron_models.build(gpt, **config))


@case(ranks=(2,), most_quick=1, recompute=("full", "selective"))
def recomputation_draws_the_same_dropout(ctx: Context, recompute: str) -> dict:
    """The random states are restored: gradients under dropout are those without recomputation, to the last bit."""
    gpt, gradients = GPT(layers=3), []
    for config in ({}, {"full": FULL, "selective": SELECTIVE}[recompute]):
        with megatron_models.parallel_state(tp=2):
            chunks = megatron_models.build(gpt, hidden_dropout=0.2, attention_dropout=0.2, **config)
            losses = megatron_models.forward_backward(chunks, [plain_gpt.make_batch(gpt, 0)])
            gradients.append(megatron_models.gather_gradients(chunks))
    without = plain_gpt.loss_and_gradients(gpt, plain_gpt.full_weights(gpt), [plain_gpt.make_batch(gpt, 0)])
    assert abs(losses[0] - without[0][0]) > 1e-3, "nothing was dropped"
    worst, name = megatron_models.largest_difference(*gradients)
    assert worst == 0, f"{name}: {worst:.1e}"


@case(ranks=(2, 4), strength=1, most_quick=1, overlap=(False, True))
def distributed_optimizer_equals_adamw(ctx: Context, overlap: bool) -> dict:
    """Four steps in fp32 with clipping; tensor parallel over two ranks, data parallel over the rest."""
    gpt = MODELS["llama"]
    replicas = ctx.world_size // 2
    settings = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    losses = []
    with megatron_models.parallel_state(tp=2), cuda_types():
        chunks = megatron_models.in_ddp(megatron_models.build(gpt, dtype=torch.float32), **settings)
        options = {**ADAMW, "adam_eps": 1e-4, "clip_grad": CLIP, "overlap_param_gather": overlap}
        optimizer = megatron_models.optimizer_of(chunks, **options)
        for step in range(4):
            chunks[0].zero_grad_buffer()
            optimizer.zero_grad()
            batches = _step_batches(gpt, step, replicas)
            losses.append(megatron_models.forward_backward(chunks, batches[ctx.rank // 2]))
            optimizer.step()
        for chunk in chunks if overlap else ():  # the last step's parameters come with the next forward
            chunk.start_param_sync(force_sync=True)
        weights = megatron_models.gather_weights(chunks)
    return assert_trained_alike(gpt, losses, weights, ctx.rank // 2, replicas)


@case(ranks=(2, 4), most_quick=1)
def deepspeed_engine_with_our_mpu_equals_adamw(ctx: Context) -> dict:
    """ZeRO-1, tensor parallel over two ranks. Without sequence parallelism, whose norms DeepSpeed would let drift."""
    import deepspeed

    from megatron_ext import mpu

    gpt = MODELS["llama"]
    replicas = ctx.world_size // 2
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
    }
    losses = []
    with megatron_models.parallel_state(tp=2):
        model = megatron_models.build(gpt, dtype=torch.float32, sequence_parallel=False)[0]
        adamw = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-4, **ADAMW)
        engine = deepspeed.initialize(model=model, optimizer=adamw, config=config, mpu=mpu)[0]
        for step in range(4):
            losses.append([])
            for batch in _step_batches(gpt, step, replicas)[ctx.rank // 2]:
                output = engine(batch.tokens, batch.positions, None)
                loss = megatron_models.cross_entropy(output, batch.labels)
                losses[-1].append(loss.item())
                engine.backward(loss)
                engine.step()
        weights = megatron_models.gather_weights([engine])
        engine.destroy()
    return assert_trained_alike(gpt, losses, weights, ctx.rank // 2, replicas)


@case(ranks=(1,))
def nothing_of_the_stand_in_stays_behind(ctx: Context) -> None:
    """After a case, DeepSpeed's cases in the same process meet the torch they know."""
    from torch.overrides import _get_current_function_mode

    stubbed = ("current_device", "set_device", "synchronize", "manual_seed", "get_rng_state")
    before = {name: getattr(torch.cuda, name) for name in stubbed}
    groups = set(torch.distributed.distributed_c10d._world.pg_map)
    with megatron_models.parallel_state(), cuda_types():
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        assert all(getattr(torch.cuda, name) is not before[name] for name in stubbed)
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        inside = WrappedTorchNorm.__new__
    assert all(getattr(torch.cuda, name) is before[name] for name in stubbed)
    assert _get_current_function_mode() is None
    assert WrappedTorchNorm.__new__ is not inside
    assert set(torch.distributed.distributed_c10d._world.pg_map) == groups


def assert_equals_the_plain_gpt(
    gpt: GPT, batches: Sequence[Batch], chunks: Sequence[torch.nn.Module], most: float = 1e-12
) -> dict:
    """Run the chunks in Megatron's schedule and compare; return the largest errors."""
    losses = megatron_models.forward_backward(chunks, batches)
    gradients = megatron_models.gather_gradients(chunks)
    expected, theirs = plain_gpt.loss_and_gradients(gpt, plain_gpt.full_weights(gpt), batches)
    apart = max(abs(ours - loss) for ours, loss in zip(losses, expected, strict=True))
    assert apart <= most * max(expected), f"losses {losses}, expected {expected}"
    worst, name = megatron_models.largest_difference(gradients, theirs)
    assert worst <= most, f"gradient of {name}: {worst:.1e}"
    return {"losses": apart, "gradients": worst}


def _step_batches(gpt: GPT, step: int, replicas: int) -> list[list[Batch]]:
    """Two micro-batches for each replica."""
    seeds = [[100 * step + 10 * replica + micro for micro in range(2)] for replica in range(replicas)]
    return [[plain_gpt.make_batch(gpt, seed) for seed in of_replica] for of_replica in seeds]


def assert_trained_alike(
    gpt: GPT,
    losses: list[list[float]],
    weights: dict[str, Tensor],
    replica: int,
    replicas: int,
) -> dict:
    """torch's AdamW on the plain GPT in fp64 has the same losses and ends at the same weights."""
    plain = plain_gpt.full_weights(gpt)
    adamw = torch.optim.AdamW(plain.values(), betas=(0.9, 0.999), eps=1e-4, **ADAMW)
    apart = 0.0
    for step, ours in enumerate(losses):
        batches = _step_batches(gpt, step, replicas)
        expected, gradients = plain_gpt.loss_and_gradients(gpt, plain, sum(batches, []))
        for loss, theirs in zip(ours, expected[2 * replica :], strict=False):
            apart = max(apart, abs(loss / theirs - 1))
        for name, weight in plain.items():
            weight.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(plain.values(), CLIP)
        adamw.step()
    assert apart <= 1e-5, f"losses are {apart:.1e} apart"
    worst, name = megatron_models.largest_difference(weights, plain)
    assert worst <= 1e-5, f"{name}: {worst:.1e}"
    return {"losses": apart, "weights": worst}
