"""Training steps of a LLaMA-2-7B-shaped model on a GPU: streaming beside resident states, with and without overlap.

Every job runs in a process of its own. "serial" is streaming with the host waiting for each copy before it goes on,
so that nothing is hidden. The memory job visits every block and tells the peak of the allocator beside what
`ds_grass plan` says must be held.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "configs" / "models" / "llama-2-7b"
WARM_UP, STEPS = 6, 20
CLIP = 1.0

SPEED = {"batch": 4, "sequence": 1024, "checkpointing": True, "period": 1000}
MEMORY = {"batch": 1, "sequence": 1024, "checkpointing": True, "period": 1}
PURE_BF16 = {"dtype": "bf16", "master_weights": False}
JOBS: dict[str, dict[str, Any]] = {
    "resident": {**SPEED, "states": {**PURE_BF16, "mode": "resident"}},
    "stream": {**SPEED, "states": {**PURE_BF16, "mode": "stream"}},
    "stream, slots for all": {**SPEED, "states": {**PURE_BF16, "mode": "stream", "buffers": 5}},
    "serial": {**SPEED, "states": {**PURE_BF16, "mode": "stream"}, "serial": True},
    "stream, fp32": {**SPEED, "states": {"mode": "stream"}},
    "resident, fp32": {**SPEED, "states": {"mode": "resident"}},
    "memory": {**MEMORY, "states": {**PURE_BF16, "mode": "stream"}},
}


def measure(name: str) -> dict[str, Any]:
    """Run one job in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(Path(__file__).resolve()), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"job": name, "failed": (done.stderr or done.stdout)[-2000:]}
    return {"job": name, **json.loads(lines[-1].removeprefix("RESULT "))}


def work(job: dict[str, Any]) -> dict[str, Any]:
    engine, config = build(job)
    tokens = torch.randint(0, config.vocab_size, (job["batch"], job["sequence"]), device="cuda")
    core, seconds, seen = engine.optimizer.core, [], set()
    enough = 40 * config.num_hidden_layers
    while len(seconds) < WARM_UP + STEPS or (job["period"] == 1 and len(seen) < config.num_hidden_layers):
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        seen.update(core.controller.active)
        if len(seconds) > enough:
            break
    median = statistics.median(seconds[WARM_UP:])
    return {
        "tokens_per_second": tokens.numel() / median,
        "step_seconds": median,
        "blocks_visited": len(seen),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "planned_bytes": planned_bytes(job, config),
        "counters": dict(core.store.counters),
    }


def build(job: dict[str, Any]) -> tuple[Any, Any]:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    import ds_grass  # noqa: F401  puts the hook in place where the entry point is not installed

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if job.get("serial"):
        wait_for_every_copy()
    config = AutoConfig.from_pretrained(MODEL)
    config.use_cache = False
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable()
    engine = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=ds_config(job)
    )[0]
    return engine, config


def ds_config(job: dict[str, Any]) -> dict[str, Any]:
    grass = {"policy": "lisa", "active_layers": 2, "sampling_period": job["period"], "states": job["states"]}
    return {
        "train_micro_batch_size_per_gpu": job["batch"],
        "gradient_clipping": CLIP,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "grass": {**grass, "log": {"enabled": False}},
    }


def wait_for_every_copy() -> None:
    from ds_grass.copy_engine import CudaCopyEngine

    for direction in ("_copy_in", "_copy_out"):
        enqueue = getattr(CudaCopyEngine, direction)

        def waiting(self: Any, copies: Any, after: Any, enqueue: Any = enqueue) -> Any:
            ticket = enqueue(self, copies, after)
            ticket.synchronize()
            return ticket

        setattr(CudaCopyEngine, direction, waiting)


def planned_bytes(job: dict[str, Any], config: Any) -> int:
    """The analytical floor: what must be held at the peak, tensor by tensor."""
    from ds_grass.config import parse_block
    from ds_grass.plan.budget import Limits, Planner
    from ds_grass.plan.job import PlannedJob

    block = parse_block({key: value for key, value in ds_config(job)["grass"].items() if key != "log"})
    planned = PlannedJob(
        block, stage=1, micro_batch=job["batch"], seq_length=job["sequence"], checkpointing=True
    )
    return Planner(config, Limits()).budget(planned).peak.total_bytes


if __name__ == "__main__":
    print("RESULT", json.dumps(work(JOBS[sys.argv[1]])), flush=True)
