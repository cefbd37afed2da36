"""Logs of runs that never ran: a real controller with made-up norms, written through the real log.

The lines are those of the real journal. Facts and costs have the shape of `zero/announce.py` and `GrassCore._costs`;
`tests/unit/test_report.py` holds their keys against the source.
"""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import torch

from ds_grass.config import GrassConfig
from ds_grass.controller import Controller
from ds_grass.telemetry.log import GrassLog
from ds_grass.zero.journal import Journal

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
    run = MadeRun(path, num_blocks=num_blocks, facts=facts, **keys)
    run.train(num_steps)
    run.journal.close()
    return run.journal.log.run_id


class MadeRun:
    """One process of a job."""

    def __init__(
        self, path: Path, *, num_blocks: int = 12, facts: dict[str, Any] | None = None, **keys: Any
    ) -> None:
        keys = {"active_layers": 2, "sampling_period": 25, "refresh_period": 50, "probe_steps": 4, **keys}
        config, self.values = GrassConfig(**keys), random.Random(num_blocks)
        self.controller = Controller(config, [7_000_000] * num_blocks)
        self.switches_before = 0
        self.journal = Journal(
            GrassLog(str(path), True, True),
            self.controller,
            tells=True,
            costs=lambda: costs(self.controller, self.switches_before),
            block_names=[f"model.layers.{block}" for block in range(num_blocks)],
            send=None,
        )
        self.journal.start({**start_facts(config, self.controller), **(facts or {})})

    def train(self, num_steps: int) -> None:
        """Until `num_steps` are applied."""
        while self.controller.counters["applied_steps"] < num_steps:
            applied = self.controller.counters["applied_steps"]
            self.journal.saw_loss(
                torch.tensor(2.0 + 4 * math.exp(-applied / 150) + self.values.gauss(0, 0.1))
            )
            self.journal.begin_step()
            transition = self.controller.advance(norms(self.controller, self.values))
            if transition.drew or transition.refreshed:
                self.journal.drew("draw" if transition.drew else "refresh")
            self.journal.end_step()
            if self.values.random() < 0.004:
                self.journal.skipped(["model.layers.0"])
                self.controller.advance(None)

    def save(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"controller": copy.deepcopy(self.controller.state_dict()), "log": self.journal.identity()}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint; bytes and seconds start again, as in any new process."""
        self.controller.load_state_dict(saved["controller"])
        self.switches_before = self.controller.counters["switches"]
        self.journal.resume(saved["log"])


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
        "planned_probe_steps": controller.probe_steps,
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
    }


def costs(controller: Controller, switches_before: int = 0) -> dict[str, Any]:
    """Made-up bytes and seconds of a process that began after `switches_before` switches."""
    visited, counters = sum(count > 0 for count in controller.visits), controller.counters
    switches = counters["switches"] - switches_before
    switched = switches * 1.6 * BLOCK_BYTES
    held = (controller.config.active_layers + 2) * BLOCK_BYTES
    return {
        "states": {
            "mode": "resident",
            "bytes_to_device": int(
                0.7 * switched + 30_000_000 * math.sin(counters["draws"]) ** 2 + 40_000_000 * switches
            ),
            "bytes_to_host": int(switched),
            "device_bytes": held,
            "device_bytes_peak": held + (BLOCK_BYTES if switches else 0),
            "host_bytes": (visited + 2) * BLOCK_BYTES,
            "wait_seconds": 0.021 * switches,
            "fetches": switches,
            "stashes": switches,
        },
        "reduced": {
            "reduced_units": 4 * counters["applied_steps"],
            "zero_filled_units": 0,
            "late_gradients": 0,
        },
        "measuring_seconds": round(0.0004 * counters["applied_steps"], 6),
        "switching_seconds": round(0.003 * switches, 6),
    }
