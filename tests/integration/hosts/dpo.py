"""Preference tuning with TRL, with a reference model: `dpo.py MODEL TEXT DS_CONFIG OUTPUT STEPS`."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

model, text, ds_config, output, steps = sys.argv[1:]
lines = [line for line in Path(text).read_text().splitlines() if len(line) > 20]
pairs = [
    {"prompt": line[:10], "chosen": line[10:], "rejected": other[10:]}
    for line, other in zip(lines, lines[1:], strict=False)
]
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    ref_model=AutoModelForCausalLM.from_pretrained(model),
    processing_class=AutoTokenizer.from_pretrained(model),
    args=DPOConfig(
        output_dir=output,
        deepspeed=ds_config,
        max_steps=int(steps),
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=32,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
    ),
    train_dataset=Dataset.from_list(pairs),
)
trainer.train()
trainer.save_model()
# As PyTorch asks of every script: without it gloo may abort the process at exit (pytorch/pytorch#190489).
torch.distributed.destroy_process_group()
