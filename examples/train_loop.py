"""A causal language model trained in an own loop over `deepspeed.initialize`, on the same text as train_trainer.py.

    deepspeed --num_accelerators 2 examples/train_loop.py --deepspeed_config examples/ds_config_loop.json

The config file decides everything that DeepSpeed does: batch sizes, optimizer, schedule, ZeRO stage, precision.
Checkpoints are DeepSpeed's own; `--resume` goes on from the last, with the data where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from corpus import documents, split, train_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(options.seed)
    training, held_out = token_rows(options)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary_size,
            hidden_size=options.hidden_size,
            intermediate_size=options.hidden_size * 11 // 4,
            num_hidden_layers=options.blocks,
            num_attention_heads=max(1, options.hidden_size // 16),
            initializer_range=0.5 * options.hidden_size**-0.5,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    engine, _, _, _ = deepspeed.initialize(
        args=options, model=model, model_parameters=model.parameters(), dist_init_required=True
    )
    first_step = resume(engine, options)
    report(options, first_step, held_out_loss(engine, held_out))
    for step in range(first_step, options.steps):
        train_step(engine, training, step, options.seed)
        if (step + 1) % options.eval_steps == 0 or step + 1 == options.steps:
            report(options, step + 1, held_out_loss(engine, held_out))
        if options.save_steps and (step + 1) % options.save_steps == 0:
            engine.save_checkpoint(options.output, client_state={"step": step + 1})
    engine.destroy()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dataset", default="python-docs", help="python-docs, python-code, a file or a folder"
    )
    parser.add_argument("--output", default="runs/loop", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--eval-steps", type=int, default=50)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--save-steps", type=int, default=0, help="0 = no checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--vocabulary-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def token_rows(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training and held-out tokens, each int64 (rows, sequence length)."""
    training, held_out = split(documents(options.dataset))
    tokenizer = train_tokenizer(training, options.vocabulary_size)
    rows = []
    for texts in (training, held_out):
        tokens = torch.tensor([token for text in tokenizer.encode_batch(texts) for token in text.ids])
        count = len(tokens) // options.sequence_length
        rows.append(tokens[: count * options.sequence_length].view(count, options.sequence_length))
    return rows[0], rows[1][: options.eval_samples]


def train_step(engine: deepspeed.DeepSpeedEngine, rows: Tensor, step: int, seed: int) -> None:
    """One optimizer step: the same rows for a given step and rank, whatever came before."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * step + 7919 * dist.get_rank())
    for _ in range(engine.gradient_accumulation_steps()):
        picked = torch.randint(0, len(rows), (engine.train_micro_batch_size_per_gpu(),), generator=generator)
        batch = rows[picked].to(engine.device)
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()


@torch.no_grad()
def held_out_loss(engine: deepspeed.DeepSpeedEngine, rows: Tensor) -> float:
    """Mean over all ranks' shares of the held-out rows."""
    engine.eval()
    mine = rows[dist.get_rank() :: dist.get_world_size()].to(engine.device)
    losses = [engine(input_ids=part, labels=part).loss.float() for part in mine.split(8)]
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    engine.train()
    return mean.item() / dist.get_world_size()


def resume(engine: deepspeed.DeepSpeedEngine, options: argparse.Namespace) -> int:
    """The step to go on from; 0 without --resume."""
    if not options.resume:
        return 0
    path, state = engine.load_checkpoint(options.output)
    if path is None:
        raise FileNotFoundError(f"{options.output} has no checkpoint to resume from")
    return state["step"]


def report(options: argparse.Namespace, step: int, loss: float) -> None:
    if dist.get_rank() == 0:
        folder = Path(options.output)
        os.makedirs(folder, exist_ok=True)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "held_out_loss": loss}) + "\n")
        print(f"step {step}: held-out loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
