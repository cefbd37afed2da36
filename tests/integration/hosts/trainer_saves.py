"""A Trainer that keeps its best checkpoint: `trainer_saves.py MODEL TEXT DS_CONFIG OUTPUT STEPS [only-model]`."""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

model, text, ds_config, output, steps, *only_model = sys.argv[1:]
keeps_states = not only_model
tokenizer = AutoTokenizer.from_pretrained(model)


def tokens(lines):
    encoded = tokenizer(lines["text"], truncation=True, max_length=32, padding="max_length")
    return {**encoded, "labels": encoded["input_ids"]}


dataset = load_dataset("text", data_files=text, split="train").map(
    tokens, batched=True, remove_columns=["text"]
)
scores = iter([0.1, 0.9, 0.5, 0.4, 0.3])  # the second evaluation is the best, so the last checkpoint is not
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    args=TrainingArguments(
        output_dir=output,
        deepspeed=ds_config,
        max_steps=int(steps),
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=keeps_states,
        metric_for_best_model="score" if keeps_states else None,
        greater_is_better=True if keeps_states else None,
        save_only_model=not keeps_states,
        use_cpu=True,
    ),
    train_dataset=dataset,
    eval_dataset=dataset.select(range(4)),
    compute_metrics=lambda _: {"score": next(scores)},
)
trainer.train()
trainer.save_model()
# As PyTorch asks of every script: without it gloo may abort the process at exit (pytorch/pytorch#190489).
torch.distributed.destroy_process_group()
