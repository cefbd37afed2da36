"""Logs of runs that never ran: a real controller with made-up norms, written through the real log.

The lines have the shape of `zero/announce.py` and `GrassCore.log_state`; `tests/unit/test_report.py` holds their
keys against the source.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from ds_grass.config import GrassConfig
from ds_grass.controller import Controller
from ds_grass.telemetry import GrassLog

BLOCK_BYTES = 12 * 7_000_000


def write_made_log(
    path: Path,
    *,
    num_blocks: int = 12,
    num_steps: int = 600,
    facts: dict[str, Any] | None = None,
    **keys: Any,
) -> str:
    """Append one run to the file and return its run_id. `facts` replace those of the start line."""
    keys = {"active_layers": 2, "sampling_period": 25, "refresh_period": 50, "probe_steps": 4, **keys}
    config, values, log = GrassConfig(**keys), random.Random(num_blocks), GrassLog(str(path), True, True)
    controller = Controller(config, [7_000_000] * num_blocks)
    log.write("start", **start_facts(config, controller), **(facts or {}))
    if controller.phase == "train":
        log_state(log, controller, "draw")
    while controller.counters["applied_steps"] < num_steps:
        transition = controller.advance(norms(controller, values))
        if transition.drew or transition.refreshed:
            log_state(log, controller, "draw" if transition.drew else "refresh")
        if values.random() < 0.004:
            log.write("skipped", step=controller.counters["applied_steps"], blocks=["model.layers.0"])
            controller.advance(None)
    log.close()
    return log.run_id


def norms(controller: Controller, values: random.Random) -> dict[int, float]:
    """Squared norms: large at both ends of the model, falling while a block trains, with noise."""
    found = {}
    for block in controller.active:
        place = block / max(len(controller.numels) - 1, 1)
        ends = 1 + 2.5 * math.exp(-8 * place) + 1.5 * math.exp(-12 * (1 - place))
        decay = 0.25 + 0.75 * math.exp(-controller.trained_steps[block] / 60)
        found[block] = (2e-3 * ends * decay * values.uniform(0.8, 1.25)) ** 2 * controller.numels[block]
    return found


def start_facts(config: GrassConfig, controller: Controller) -> dict[str, Any]:
    num_blocks = controller.num_blocks
    return {
        "policy": config.policy,
        "num_blocks": num_blocks,
        "lists": ["model.layers"],
        "other_lists": [],
        "active_layers": config.active_layers,
        "managed_params": 7_000_000 * (num_blocks + 2),
        "active_params": 7_000_000 * (config.active_layers + 2),
        "outer": config.outer,
        "outer_params": 14_000_000,
        "probe_steps": controller.probe_steps,
        "sampling_period": config.sampling_period,
        "refresh_period": config.refresh_period,
        "states_mode": "resident",
        "states_dtype": "fp32",
        "master_weights": True,
        "device_bytes": (config.active_layers + 2) * (BLOCK_BYTES + 28_000_000),
        "host_bytes": (num_blocks + 2) * BLOCK_BYTES,
        "zero_stage": 2,
        "zero_stage_given": 2,
        "num_ranks": 4,
        "grass_version": "0.1.0",
        "deepspeed_version": "0.19.8",
        "blocks": [f"model.layers.{block}" for block in range(num_blocks)],
    }


def log_state(log: GrassLog, controller: Controller, event: str) -> None:
    visited, counters = sum(count > 0 for count in controller.visits), controller.counters
    switched = counters["switches"] * 1.6 * BLOCK_BYTES
    held = (controller.config.active_layers + 2) * BLOCK_BYTES
    log.write(
        event,
        **controller.log_fields(),
        names=[f"model.layers.{block}" for block in controller.active],
        states={
            "mode": "resident",
            "bytes_to_device": int(
                0.7 * switched
                + 30_000_000 * math.sin(counters["draws"]) ** 2
                + 40_000_000 * counters["draws"]
            ),
            "bytes_to_host": int(switched),
            "device_bytes": held,
            "device_bytes_peak": held + (BLOCK_BYTES if counters["switches"] else 0),
            "host_bytes": (visited + 2) * BLOCK_BYTES,
            "wait_seconds": 0.021 * counters["switches"],
            "fetches": counters["switches"],
            "stashes": counters["switches"],
        },
        reduced={"reduced_units": 4 * counters["applied_steps"], "zero_filled_units": 0, "late_gradients": 0},
        measuring_seconds=round(0.0004 * counters["applied_steps"], 6),
        switching_seconds=round(0.003 * counters["switches"], 6),
    )
