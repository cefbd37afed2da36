"""Supervised fine-tuning with TRL, as its documentation has it: `sft.py MODEL TEXT DS_CONFIG OUTPUT STEPS`."""

import sys

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

model, text, ds_config, output, steps = sys.argv[1:]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
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
    train_dataset=load_dataset("text", data_files=text, split="train"),
)
trainer.train()
trainer.save_model()
# As PyTorch asks of every script: without it gloo may abort the process at exit (pytorch/pytorch#190489).
torch.distributed.destroy_process_group()
