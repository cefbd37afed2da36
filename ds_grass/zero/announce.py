"""What a job says when it starts: one line of resolved facts, the same as the first event of the log."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

import torch
from deepspeed import comm as dist

import ds_grass
from ds_grass.telemetry.start_line import few_draws_warning, start_line
from ds_grass.zero.core import GrassCore

logger = logging.getLogger("ds_grass")


def announce(core: GrassCore) -> None:
    """Log the start line on rank 0, warn when the run is too short for its draws, and begin the log."""
    facts = _facts(core)
    core.job.log.run_id = _of_the_first_rank(core.job.log.run_id, core.reducer.device)
    core.journal.start(facts)
    if dist.get_rank() != 0:
        return
    _make_visible()
    logger.info("%s", start_line(**facts))
    if core.job.num_steps is not None:
        warning = few_draws_warning(core.job.num_steps, core.job.config, core.controller.num_blocks,
                                    core.controller.probe_steps)  # fmt: skip
        if warning:
            logger.warning("grass: %s", warning)


def _of_the_first_rank(run_id: str, device: torch.device) -> str:
    """The first rank's: what every rank's checkpoint file calls the run. 32 hexadecimal digits."""
    value = torch.tensor(list(bytes.fromhex(run_id)), dtype=torch.uint8, device=device)
    dist.broadcast(value, src=0)
    return bytes(value.tolist()).hex()


def _facts(core: GrassCore) -> dict:
    config, layout, controller = core.job.config, core.job.layout, core.controller
    outer = sum(unit.numel for unit in core.units.values() if unit.block is None)
    largest = core.largest_active()
    return {
        "policy": config.policy,
        "num_blocks": controller.num_blocks,
        "lists": layout.lists,
        "other_lists": layout.other_lists,
        "active_layers": config.active_layers,
        "managed_params": sum(unit.numel for unit in core.units.values()),
        "active_params": sum(core.units[key].numel for key in largest),
        "outer": config.outer,
        "outer_params": outer,
        "planned_probe_steps": controller.probe_steps,
        "sampling_period": config.sampling_period,
        "refresh_period": config.refresh_period,
        "states_mode": config.states.mode,
        "states_dtype": config.states.dtype,
        "master_weights": any(core.store.has_master(key) for key in core.units),
        "device_bytes": core.device_bytes(largest),
        "host_bytes": core.store.final_host_bytes,
        "zero_stage": core.job.stage or 1,
        "zero_stage_given": core.job.stage,
        "num_ranks": dist.get_world_size(),
        "grass_version": ds_grass.__version__,
        "deepspeed_version": _installed("deepspeed"),
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _make_visible() -> None:
    """One line at start is the contract, also in a script that configured no logging."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
