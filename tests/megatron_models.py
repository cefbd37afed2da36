"""Small Megatron-core GPTs whose weights do not depend on how many ranks share them, and their gradients in whole.

Contract: inside `parallel_state(...)`, `build` gives this rank's model chunks for a `plain_gpt.GPT`, `forward_backward`
runs micro-batches through Megatron's own schedule, and `gather_gradients` gives every rank the unsharded gradients
under the names of `plain_gpt`: so any split is compared with `plain_gpt.loss_and_gradients`, or with another split.
Megatron-core is imported inside functions only. Not covered: tied embeddings, experts (spread_models.py), TE.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests import plain_gpt
from tests.megatron_on_cpu import on_cpu
from tests.plain_gpt import GPT, Batch

ROUNDING = 1e-14
"""Of the largest gradient: one that is smaller everywhere is zero but for rounding in fp64."""
GROUP_TIMEOUT_MINUTES = 1


@contextlib.contextmanager
def parallel_state(
    tp: int = 1, pp: int = 1, vpp: int | None = None, *, seed: int = 1, **more: int
) -> Iterator[None]:
    """Megatron-core on the CPU with these groups over the ranks that are there; the rest is data parallel.

    `seed` is of the random states that dropout draws from; `more` are arguments of initialize_model_parallel. At the
    end the groups are closed, not only forgotten.
    """
    with on_cpu():
        from megatron.core import parallel_state as state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        before = set(_groups())
        state.initialize_model_parallel(
            tp, pp, vpp, distributed_timeout_minutes=GROUP_TIMEOUT_MINUTES, **more
        )
        try:
            model_parallel_cuda_manual_seed(seed)
            yield
            dist.barrier()  # nobody closes a group that another rank still uses
        finally:
            state.destroy_model_parallel()
            _forget_models()
            for group in set(_groups()) - before:
                dist.destroy_process_group(group)
            if "deepspeed" in sys.modules:  # it keeps an engine's mpu for the next one, which has none
                sys.modules["deepspeed"].utils.groups.mpu = None


def _forget_models() -> None:
    """Megatron-core caches a method of RotaryEmbedding, and with it the last 32 models and their groups.

    Each group has threads of gloo that wake a hundred times a second: after some cells these took half of all time.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()


def _groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map)


def build(
    model: GPT, *, seed: int = 0, dtype: torch.dtype = torch.float64, packed: bool = False, **config: Any
) -> list[nn.Module]:
    """Return this rank's chunks of `model`, one a virtual stage, holding `plain_gpt.full_weights(model, seed, dtype)`.

    `config` goes to TransformerConfig over what follows from `model`: recomputation, dropout, overlap. Sequence
    parallelism is on where the tensor-parallel group has two ranks or more. `packed` gives a core attention that takes
    packed documents, which Megatron-core's own has only with Transformer Engine.
    """
    arguments = transformer_config(model, dtype, **config)
    chunks = build_chunks(model, dtype, arguments, lambda _vp_stage: _layer_spec(model, packed))
    load(chunks, plain_gpt.full_weights(model, seed, dtype))
    return chunks


def build_chunks(
    model: GPT, dtype: torch.dtype, config: Any, spec_of: Callable[[int | None], Any]
) -> list[nn.Module]:
    """Return this rank's chunks with the weights that Megatron-core begins with; `config`: a TransformerConfig;
    `spec_of` the virtual stage, None where there is one only: the layers'."""
    from megatron.core import parallel_state as state
    from megatron.core.models.gpt.gpt_model import GPTModel

    stages = state.get_virtual_pipeline_model_parallel_world_size() or 1
    chunks = []
    for stage in range(stages):
        vp_stage = stage if stages > 1 else None
        chunk = GPTModel(
            config,
            spec_of(vp_stage),
            model.vocabulary,
            model.length,
            pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope" if model.positions == "rope" else "learned_absolute",
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(dtype))  # torch's norms and the learned positions ignore params_dtype
    return chunks


def transformer_config(model: GPT, dtype: torch.dtype, **config: Any) -> Any:
    """Return Megatron's TransformerConfig of `model` for the groups that are there."""
    from megatron.core import parallel_state as state
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp = state.get_tensor_model_parallel_world_size()
    vpp = state.get_virtual_pipeline_model_parallel_world_size()
    gated = model.activation == "swiglu"
    arguments = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_groups,
        "ffn_hidden_size": model.ffn,
        "activation_func": F.silu if gated else F.gelu,
        "gated_linear_unit": gated,
        "add_bias_linear": model.bias,
        "normalization": model.norm,
        "layernorm_epsilon": plain_gpt.EPSILON,
        "qk_layernorm": model.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": vpp,
        # Two stages send each other activations and gradients at once when chunks are interleaved; a batch of
        # exchanges pairs them wrongly (earlier releases refused two interleaved stages).
        "overlap_p2p_comm": vpp is not None,
        "batch_p2p_comm": vpp is None,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": True,
        # CUDA kernels, and compilation that takes longer than a test
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }
    return TransformerConfig(**arguments | config)


def _layer_spec(model: GPT, packed: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.enums import AttnMaskType

    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization=model.norm)
    attention = spec.submodules.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.causal if model.causal else AttnMaskType.no_mask
    if packed:
        attention.submodules.core_attention = packed_attention()
    return spec


@functools.cache
def packed_attention() -> type:
    """Megatron-core's own attention over each document of a packed row by itself."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class PackedDotProductAttention(DotProductAttention):
        def forward(self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs):
            """query (tokens, heads, head_dim), key and value with the groups' heads; without documents as ever."""
            if packed_seq_params is None:
                return super().forward(query, key, value, attention_mask, *args, **kwargs)
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            parts = zip(*(part.unsqueeze(1).split(lengths) for part in (query, key, value)), strict=True)
            forward = super().forward
            return torch.cat([forward(*part, attention_mask, *args, **kwargs) for part in parts]).squeeze(1)

    return PackedDotProductAttention


# How a parameter is shared over the tensor-parallel group.


@dataclass(frozen=True)
class Sharing:
    """`dim` None: every rank has it all. `gated`: a shard is [gate_r; up_r], two shards on top of each other."""

    dim: int | None
    gated: bool

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """Return what `rank` of `size` ranks stores."""
        if self.dim is None:
            return full
        halves = full.chunk(2, self.dim) if self.gated else (full,)
        return torch.cat([half.chunk(size, self.dim)[rank] for half in halves], self.dim)

    def whole(self, shards: Sequence[Tensor]) -> Tensor:
        """Put the shards of all ranks together."""
        assert self.dim is not None
        if not self.gated:
            return torch.cat(list(shards), self.dim)
        halves = zip(*(shard.chunk(2, self.dim) for shard in shards), strict=True)
        return torch.cat([torch.cat(half, self.dim) for half in halves], self.dim)


def named_parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield this rank's parameters under the names of the whole model: layers are counted through all stages."""
    for chunk in chunks:
        module = unwrapped(chunk)
        numbers = [layer.layer_number - 1 for layer in module.decoder.layers]
        for name, parameter in module.named_parameters():
            found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
            yield f"decoder.layers.{numbers[int(found[1])]}.{found[2]}" if found else name, parameter


def unwrapped(chunk: nn.Module) -> nn.Module:
    """Return the GPTModel inside Megatron's or DeepSpeed's wrappers."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk


def sharing(module: nn.Module, name: str, parameter: nn.Parameter) -> Sharing:
    """Return how Megatron-core shares this parameter of `module`."""
    parallel = getattr(parameter, "tensor_model_parallel", False)
    gated = module.config.gated_linear_unit and ".linear_fc1." in name
    return Sharing(parameter.partition_dim if parallel else None, gated)


@torch.no_grad()
def load(chunks: Sequence[nn.Module], full: Mapping[str, Tensor]) -> None:
    """Give every parameter its shard of the full weights."""
    from megatron.core import parallel_state as state

    rank, size = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
    module = unwrapped(chunks[0])
    for name, parameter in named_parameters(chunks):
        parameter.copy_(sharing(module, name, parameter).shard(full[name], rank, size))


def gather_weights(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return every unsharded parameter of all stages by name, on every rank."""
    return _gather(chunks, lambda parameter: parameter.detach(), add=False)


def gather_gradients(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return every unsharded gradient of all stages by name, on every rank.

    Shares of replicated parameters are added up where Megatron's `finalize_model_grads` does so; chunks in Megatron's
    DDP must be through it already.
    """
    if hasattr(chunks[0], "ddp_config"):
        return _gather(chunks, lambda parameter: parameter.main_grad, add=False)
    return _gather(chunks, lambda parameter: parameter.grad, add=True)


def _gather(
    chunks: Sequence[nn.Module], read: Callable[[nn.Parameter], Tensor], *, add: bool
) -> dict[str, Tensor]:
    from megatron.core import parallel_state as state

    config = unwrapped(chunks[0]).config
    tensors, facts = {}, {}
    for name, parameter in named_parameters(chunks):
        tensors[name] = read(parameter).detach()
        facts[name] = (
            sharing(unwrapped(chunks[0]), name, parameter),
            add and is_summed(config, name, parameter),
        )
    group = state.get_model_parallel_group()
    theirs: list[Any] = [None] * group.size()
    dist.all_gather_object(theirs, (facts, _packed(tensors)), group=group)
    parts = [(facts, _unpacked(*packed)) for facts, packed in theirs]
    names = dict.fromkeys(name for facts, _ in parts for name in facts)
    return {
        name: _joined(name, [(*facts[name], tensors[name]) for facts, tensors in parts if name in facts])
        for name in names
    }


def _packed(tensors: dict[str, Tensor]) -> tuple[dict[str, tuple], dict[torch.dtype, Tensor]]:
    """Shapes and types by name, and one long tensor of each type: pickling many small ones is slower than a step."""
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    flat = {
        dtype: torch.cat([tensor.flatten() for tensor in tensors.values() if tensor.dtype == dtype])
        for dtype in {tensor.dtype for tensor in tensors.values()}
    }
    return shapes, flat


def _unpacked(shapes: dict[str, tuple], flat: dict[torch.dtype, Tensor]) -> dict[str, Tensor]:
    found, taken = {}, dict.fromkeys(flat, 0)
    for name, (shape, dtype) in shapes.items():
        first = taken[dtype]
        taken[dtype] += shape.numel()
        found[name] = flat[dtype][first : taken[dtype]].view(shape)
    return found


def _joined(name: str, parts: Sequence[tuple[Sharing, bool, Tensor]]) -> Tensor:
    """Join the parts of the tensor-parallel ranks, in their order."""
    (how, adds_up, first), tensors = parts[0], [tensor for _, _, tensor in parts]
    if how.dim is not None:
        return how.whole(tensors)
    if adds_up:
        return torch.stack(tensors).sum(0)
    apart = max(float((tensor - first).abs().max()) for tensor in tensors)
    assert apart <= 1e-6 * max(1.0, float(first.abs().max())), f"{name}: ranks are {apart:.1e} apart"
    return first


def is_summed(config: Any, name: str, parameter: nn.Parameter) -> bool:
    """Whether `finalize_model_grads` adds this gradient up over the tensor-parallel group."""
    if config.tensor_model_parallel_size == 1:
        return False
    marked = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
    return marked or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))


# Running.


def forward_backward(
    chunks: Sequence[nn.Module], batches: Sequence[Batch], *, forward_only: bool = False
) -> list[float]:
    """Run one forward and backward of all micro-batches in Megatron's schedule; return their losses on every rank.

    Gradients are of the mean loss and add up in the parameters. The cross entropy is taken in the model's precision
    (bf16: fp32), for Megatron's own is in fp32 whatever the model.
    """
    from megatron.core import parallel_state as state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    done = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )
    losses = [[float(each["loss"]) for each in done]]
    last = state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(losses, src=last, group=state.get_pipeline_model_parallel_group())
    return losses[0]


def forward_step(data_iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable]:
    """Megatron's forward step on a `plain_gpt.Batch`."""
    batch = next(data_iterator)
    output = model(batch.tokens, batch.positions, None, packed_seq_params=packed_seq_params(batch))
    return output, functools.partial(_loss, batch)


def _loss(batch: Batch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = cross_entropy(output, batch.labels)
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over all tokens from this rank's share of the vocabulary, (rows, length, vocabulary / tp)."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    whole = gather_from_tensor_model_parallel_region(logits)
    wide = torch.promote_types(whole.dtype, torch.float32)
    return F.cross_entropy(whole.to(wide).flatten(0, 1), labels.flatten())


def packed_seq_params(batch: Batch) -> Any:
    """Return Megatron's PackedSeqParams, None for a batch without documents."""
    if batch.documents is None:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *batch.documents]).cumsum(0).int()
    longest = max(batch.documents)
    return PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)


# Training.


def in_ddp(chunks: Sequence[nn.Module], **ddp_config: Any) -> list[nn.Module]:
    """Return the chunks in Megatron's DDP, for its distributed optimizer; the schedule finishes their gradients."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    settings = DistributedDataParallelConfig(**{"use_distributed_optimizer": True} | ddp_config)
    wrapped = [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return wrapped


def optimizer_of(chunks: Sequence[nn.Module], **optimizer_config: Any) -> Any:
    """Return Megatron's AdamW for chunks in DDP. Its construction and its steps need `cuda_types()`."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    sharded = chunks[0].ddp_config.use_distributed_optimizer
    config = OptimizerConfig(**{"optimizer": "adam", "use_distributed_optimizer": sharded} | optimizer_config)
    optimizer = get_megatron_optimizer(config, list(chunks))
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error of any tensor, and that tensor's name.

    Relative: the largest difference of two entries over the largest entry of `theirs`. Where that is nothing but
    rounding, as the gradient of a bias that shifts all keys alike, over the largest entry of all tensors.
    """
    assert ours.keys() == theirs.keys(), f"only in one: {sorted(ours.keys() ^ theirs.keys())}"
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    errors = []
    for name, tensor in theirs.items():
        is_rounding = float(tensor.abs().max()) <= ROUNDING * largest
        over = largest if is_rounding else None
        errors.append((relative_error(ours[name], tensor, over), name))
    return max(errors)


def relative_error(ours: Tensor, theirs: Tensor, over: float | None = None) -> float:
    """Return the largest difference over the largest entry of `theirs`, or `over`; infinite where not finite."""
    largest = float(theirs.double().abs().max()) if over is None else over
    error = float((ours.double() - theirs.double()).abs().max()) / largest
    return error if math.isfinite(error) else math.inf
