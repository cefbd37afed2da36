"""A GPT pre-trained with Megatron-core on documents of many lengths: its model, schedules and distributed optimizer.

    torchrun --nproc_per_node 8 examples/pretrain_gpt.py --tensor-parallel 8 --bf16 \
        --layers 32 --hidden-size 4096 --heads 32 --kv-heads 8 --ffn-size 14336 --sequence-length 32768

Every step draws documents of about one length and pads them to the longest, so lengths change from step to step. Tokens
are bytes: nothing is downloaded. With tensor parallelism goes sequence parallelism, for which Megatron-core's norms
need Transformer Engine or Apex. Checkpoints are left out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import documents
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

try:
    import transformer_engine  # noqa: F401
except ImportError:
    HAVE_TRANSFORMER_ENGINE = False
else:
    HAVE_TRANSFORMER_ENGINE = True

END_OF_TEXT = 256
VOCABULARY = 384  # the bytes, the end, and padding so that every tensor-parallel size divides it


def main() -> None:
    options = parse_arguments()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(options.tensor_parallel, options.pipeline_parallel)
    torch.manual_seed(options.seed)
    model_parallel_cuda_manual_seed(options.seed)
    model = build_model(options)
    optimizer = build_optimizer(model, options)
    sections = load_sections(options.dataset)
    for step in range(options.steps):
        begin = time.perf_counter()
        batches = draw_batches(sections, step, options)
        loss, num_tokens, norm = train_step(model, optimizer, batches)
        seconds = time.perf_counter() - begin
        if dist.get_rank() == dist.get_world_size() - 1:  # on the last stage, where the loss is
            print(
                f"step {step + 1}: loss {loss:.4f}, length {batches[0].tokens.shape[1]}, "
                f"{num_tokens / seconds:.0f} tokens/s, gradient norm {norm:.3f}",
                flush=True,
            )
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", nargs="+", default=["python-docs", "python-code"], help="names or paths as in corpus.py")
    add("--steps", type=int, default=100)
    add("--sequence-length", type=int, default=1024, help="longer documents are cropped")
    add("--pad-to", type=int, default=64, help="lengths are multiples of this")
    add("--micro-batch-size", type=int, default=1, help="documents")
    add("--micro-batches", type=int, default=4, help="of each replica in a step")
    add("--tensor-parallel", type=int, default=1)
    add("--pipeline-parallel", type=int, default=1)
    add("--layers", type=int, default=4)
    add("--hidden-size", type=int, default=128)
    add("--heads", type=int, default=8)
    add("--kv-heads", type=int, default=4)
    add("--ffn-size", type=int, default=352)
    add("--learning-rate", type=float, default=1e-3)
    add("--bf16", action="store_true")
    add("--recompute", action="store_true", help="every layer in its backward pass")
    add("--seed", type=int, default=1234)
    add("--deepspeed_config", metavar="FILE", help="a DeepSpeed config; not read by this script")
    options = parser.parse_args()
    if options.pad_to % options.tensor_parallel:
        parser.error(
            f"--pad-to {options.pad_to} is not a multiple of --tensor-parallel {options.tensor_parallel}"
        )
    return options


# Model and optimizer.


def build_model(options: argparse.Namespace) -> DistributedDataParallel:
    """This rank's part of a Llama-like model, in Megatron's data-parallel wrapper."""
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.heads,
        num_query_groups=options.kv_heads,
        ffn_hidden_size=options.ffn_size,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=options.tensor_parallel,
        sequence_parallel=options.tensor_parallel > 1,
        pipeline_model_parallel_size=options.pipeline_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=options.bf16,
        calculate_per_token_loss=True,
        recompute_granularity="full" if options.recompute else None,
        recompute_method="uniform" if options.recompute else None,
        recompute_num_layers=1 if options.recompute else None,
    )
    model = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec()
        if HAVE_TRANSFORMER_ENGINE
        else get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=options.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    ).cuda()
    wrapped = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            use_distributed_optimizer=True,
            overlap_param_gather=True,
        ),
        Float16Module(config, model) if options.bf16 else model,
    )
    config.no_sync_func = wrapped.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(model: DistributedDataParallel, options: argparse.Namespace) -> MegatronOptimizer:
    """AdamW, its state shared out over the replicas."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=options.bf16,
        params_dtype=torch.bfloat16 if options.bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
    optimizer = get_megatron_optimizer(config, [model])
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


# Training.


def train_step(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, batches: list[Batch]
) -> tuple[float, int, float]:
    """The mean loss of all replicas and their number of tokens, 0 but on the last stage, and the gradients' norm."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    rows, length = batches[0].tokens.shape
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=False,
    )
    _, norm, _ = optimizer.step()
    total = torch.stack([each["sums"] for each in sums]).sum(0) if sums else torch.zeros(2, device="cuda")
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    loss, num_tokens = total.tolist()
    return loss / max(1.0, num_tokens), int(num_tokens), norm


def forward_step(batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, partial]:
    batch = next(batches)
    positions = torch.arange(batch.tokens.shape[1], device="cuda").expand_as(batch.tokens)
    # no mask: attention is causal, and padding comes after all that is learned from
    losses = model(batch.tokens, positions, None, labels=batch.labels)
    return losses, partial(sum_loss, batch.mask)


def sum_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum over the tokens that are no padding, and their number, by which Megatron divides the gradients."""
    loss = (losses.float() * mask).sum()
    return loss, mask.sum().int(), {"sums": torch.stack([loss.detach(), mask.sum()])}


# Data.


@dataclass(frozen=True)
class Batch:
    """One micro-batch, all of shape (documents, length); `mask` is 0 for padding."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor


def load_sections(names: list[str]) -> list[Tensor]:
    """What two blank lines separate, such as functions and classes, as bytes; the shortest first."""
    texts = [part for name in names for text in documents(name) for part in text.split("\n\n\n")]
    return sorted((torch.tensor([*text.encode(), END_OF_TEXT]) for text in texts if text.strip()), key=len)


def draw_batches(sections: list[Tensor], step: int, options: argparse.Namespace) -> list[Batch]:
    """This replica's micro-batches: neighbours in length, drawn alike on all ranks and as long as the longest."""
    replicas = parallel_state.get_data_parallel_world_size()
    share = options.micro_batches * options.micro_batch_size
    generator = torch.Generator().manual_seed(options.seed + step)
    first = draw(len(sections) - replicas * share + 1, generator)
    neighbours = sections[first : first + replicas * share]
    cropped = [crop(section, options.sequence_length + 1, generator) for section in neighbours]
    length = -(-(len(cropped[-1]) - 1) // options.pad_to) * options.pad_to
    order = torch.randperm(len(cropped), generator=generator).tolist()
    mine = order[parallel_state.get_data_parallel_rank() * share :][:share]
    rows = options.micro_batch_size
    return [collate([cropped[index] for index in mine[i : i + rows]], length) for i in range(0, share, rows)]


def draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def crop(section: Tensor, longest: int, generator: torch.Generator) -> Tensor:
    """Any `longest` successive tokens."""
    return section[draw(max(1, len(section) - longest + 1), generator) :][:longest]


def collate(pieces: list[Tensor], length: int) -> Batch:
    """Inputs and what follows each of them, padded to `length`."""
    padded = [F.pad(piece, (0, length + 1 - len(piece)), value=END_OF_TEXT) for piece in pieces]
    tokens = torch.stack(padded).cuda()
    sizes = torch.tensor([len(piece) - 1 for piece in pieces], device="cuda")
    mask = (torch.arange(length, device="cuda") < sizes[:, None]).float()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask)


if __name__ == "__main__":
    main()
