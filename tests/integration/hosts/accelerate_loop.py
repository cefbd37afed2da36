"""An own loop for `accelerate launch`, optimizer and schedule by hand: `accelerate_loop.py MODEL TEXT OUTPUT STEPS`."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

folder, text, output, steps = sys.argv[1:]
accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = torch.tensor(tokenizer(Path(text).read_text())["input_ids"])
rows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
model = AutoModelForCausalLM.from_pretrained(folder)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
schedule = get_linear_schedule_with_warmup(optimizer, 1, int(steps))
model, optimizer, loader, schedule = accelerator.prepare(
    model, optimizer, DataLoader(rows, batch_size=2, shuffle=False), schedule
)
batches = iter(loader)
rates = []
for _ in range(int(steps)):
    with accelerator.accumulate(model):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    rates.append(schedule.get_last_lr()[0])
state = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(output, state_dict=state)
    print("RATES", *rates, flush=True)
accelerator.end_training()
