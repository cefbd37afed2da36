"""It ran: units reduced and bytes moved, as the log tells them, are those that the schedule demands."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from tests.distributed import jobs
from tests.distributed.harness import Context
from tests.distributed.registry import case

PERIOD = 3
UNITS = 4  # head, two blocks, embedding
ROUNDING_BYTES = 2048  # shards are padded and parts of a state aligned


def _draws() -> list[dict]:
    lines = [json.loads(line) for line in Path("grass.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "draw"]


@case(
    ranks=(1, 2), stage=(0, 1, 2, 3), dtype=("fp32", "bf16"), accumulation=(1, 2), mode=("resident", "stream")
)
def units_and_bytes_are_counted_as_scheduled(
    ctx: Context, stage: int, dtype: str, accumulation: int, mode: str
) -> dict:
    """Blocks in turn: each period reduces the active units and moves the states of what comes and goes, no more."""
    block = {"policy": "cyclic", "probe_steps": None, "refresh_period": None, "states": {"mode": mode}}
    job = jobs.Job(
        stage=stage, dtype=dtype, accumulation=accumulation, grass={**block, "sampling_period": PERIOD}
    )
    with jobs.engine_of(job) as engine:
        for number in range(4 * PERIOD):
            jobs.train_step(engine, job, ctx, number)
        counters = dict(jobs.controller(engine).counters)
        visits = list(jobs.controller(engine).visits)
    assert counters["applied_steps"] == 4 * PERIOD
    assert visits == [3, 3, 2, 2], visits  # two blocks at a time; the fifth draw is that of the coming step
    dist.barrier()
    if ctx.rank != 0:
        return {}
    model = job.build()
    names = jobs.block_names(model, job)
    numel = {n: p.numel() for n, p in model.named_parameters()}
    element_bytes = 8 if dtype == "fp32" else 12
    pair_bytes = element_bytes * sum(numel[n] for n in names[0] + names[1]) // ctx.world_size
    outer_bytes = element_bytes * sum(numel.values()) // ctx.world_size - 2 * pair_bytes
    lines = _draws()[-4:]
    for before, after in zip(lines, lines[1:], strict=False):
        assert after["applied_steps"] - before["applied_steps"] == PERIOD
        reduced = after["reduced"]["reduced_units"] - before["reduced"]["reduced_units"]
        assert reduced == PERIOD * UNITS * (accumulation if stage >= 2 else 1)
    seen_before, seen_after = lines[-2]["states"], lines[-1]["states"]
    moved = {key: seen_after[key] - seen_before[key] for key in ("bytes_to_device", "bytes_to_host")}
    expected = pair_bytes if mode == "resident" else PERIOD * (pair_bytes + outer_bytes)
    for key, value in moved.items():
        assert abs(value - expected) <= PERIOD * ROUNDING_BYTES, (key, value, expected)
    final = element_bytes * sum(numel.values()) // ctx.world_size
    assert abs(seen_after["host_bytes"] - final) <= 8 * ROUNDING_BYTES
    return {"moved": moved, "expected": expected}
