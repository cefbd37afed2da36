"""A causal language model trained with the Hugging Face Trainer; DeepSpeed comes in through `--deepspeed FILE`.

    deepspeed --num_accelerators 2 examples/train_trainer.py --deepspeed examples/ds_config.json \
        --dataset python-code --model demo-output/pretrained --output runs/code

Without `--model` it starts a small Llama from nothing, with a tokenizer trained on the data set. `--model` and
`--dataset` also take a path or a name on the Hugging Face hub. What is saved in `--output`: the weights and the
tokenizer (`save_pretrained` layout), the Trainer's checkpoints, and `metrics.json` with the held-out losses.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from corpus import END_OF_TEXT, documents, split, train_tokenizer
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


def main() -> None:
    options = parse_arguments()
    arguments = training_arguments(options)
    set_seed(options.seed)
    training, held_out = split(documents(options.dataset, options.text_column, options.split))
    with arguments.main_process_first(desc="tokenizer"):
        tokenizer = make_tokenizer(options, training, save=arguments.process_index == 0)
    model = make_model(options, tokenizer)
    if options.train_only:
        freeze_all_but(model, options.train_only)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Chunks(tokenizer, training, options.sequence_length),
        eval_dataset=Chunks(tokenizer, held_out, options.sequence_length, options.eval_samples),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        history = {"log_history": trainer.state.log_history, "steps": trainer.state.global_step}
        Path(options.output, "metrics.json").write_text(json.dumps(history, indent=1) + "\n")
    if torch.distributed.is_initialized():  # else gloo may abort the process as it exits
        torch.distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--deepspeed", metavar="FILE", help="ds_config.json; without it the Trainer runs by itself")
    add("--model", metavar="NAME_OR_PATH", help="checkpoint folder or hub name; none = a new small Llama")
    add("--dataset", default="python-docs", help="python-docs, python-code, a file, a folder or a hub name")
    add("--text-column", default="text", help="column of the text in a hub data set")
    add("--split", default="train", help="split of a hub data set")
    add("--output", default="runs/trainer", metavar="FOLDER")
    add("--train-only", metavar="REGEX", help="freeze every parameter whose name does not match")
    add("--max-steps", type=int, default=200)
    add("--learning-rate", type=float, default=2e-3)
    add("--scheduler", default="cosine", help="learning-rate schedule, a name the Trainer knows")
    add("--warmup-steps", type=int, default=10)
    add("--batch-size", type=int, default=4, help="sequences per process and micro-batch")
    add("--accumulation", type=int, default=1, help="micro-batches per optimizer step")
    add("--sequence-length", type=int, default=128, help="tokens")
    add("--eval-steps", type=int, default=50)
    add("--eval-samples", type=int, default=64, help="held-out sequences that are scored")
    add("--save-steps", type=int, default=0, help="a Trainer checkpoint every so many steps; 0 = none")
    add("--save-only-model", action="store_true", help="checkpoints hold weights only and cannot be resumed")
    add("--resume", nargs="?", const=True, default=None, help="go on from the last, or a named, checkpoint")
    add("--bf16", action="store_true")
    add("--gradient-checkpointing", action="store_true")
    add("--cpu", action="store_true", help="train on the CPU even where there is an accelerator")
    add("--seed", type=int, default=1234)
    add("--hidden-size", type=int, default=64, help="of a new model")
    add("--blocks", type=int, default=12, help="of a new model")
    add("--vocabulary-size", type=int, default=1024, help="of a new tokenizer")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=options.output,
        deepspeed=options.deepspeed,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_grad_norm=1.0,
        weight_decay=0.01,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        eval_on_start=options.resume is None,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_only_model=options.save_only_model,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        use_cpu=options.cpu or not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=options.seed,
        report_to="none",
        disable_tqdm=True,
    )


def make_tokenizer(options: argparse.Namespace, texts: list[str], save: bool) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; for a new model one trained by process 0 and read by the others."""
    folder = Path(options.output, "tokenizer")
    if options.model is None and save:
        trained = train_tokenizer(texts, options.vocabulary_size)
        PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=END_OF_TEXT).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(options.model or folder)


def make_model(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if options.model is not None:
        return AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16 if options.bf16 else torch.float32
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 11 // 4,
        num_hidden_layers=options.blocks,
        num_attention_heads=max(1, options.hidden_size // 16),
        max_position_embeddings=2048,
        initializer_range=0.5 * options.hidden_size**-0.5,  # the default of 0.02 learns slowly at this width
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def freeze_all_but(model: PreTrainedModel, pattern: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)


class Chunks(Dataset):
    """All documents, tokenized and joined, in pieces of `length` tokens; at most `limit` of them, evenly spread."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int, limit: int | None = None
    ) -> None:
        ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([token for ids in encoded for token in [*ids, ends]])
        count = len(tokens) // length
        if count == 0:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than one sequence of {length}")
        self.pieces = tokens[: count * length].view(count, length)
        if limit is not None and limit < count:
            self.pieces = self.pieces[torch.linspace(0, count - 1, limit).long()]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index].clone()}


if __name__ == "__main__":
    main()
