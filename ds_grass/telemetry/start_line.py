"""What a run says of itself before it begins: one line of resolved facts, and a warning when it is too short.

Contract: pure, facts in and text out. The same facts make the log's first event, so that both tell the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_grass.config import GrassConfig
from ds_grass.telemetry.human import human_bytes, human_count


def few_draws_warning(num_steps: int, config: GrassConfig, num_blocks: int, probe_steps: int) -> str | None:
    """Text when a run of `num_steps` optimizer steps holds fewer than 2 L / active_layers draws, else None.

    `probe_steps`: the resolved number, which is a part of `num_steps`. No warning where all blocks are
    active or `sampling_period` is null: then there is nothing to draw again.
    """
    train_steps = num_steps - probe_steps
    if train_steps <= 0:
        return (
            f"grass.probe_steps resolves to {probe_steps} but the run has {num_steps} steps: nothing would "
            "be trained; use fewer probe_steps, or more steps"
        )
    if config.sampling_period is None or config.active_layers >= num_blocks:
        return None
    num_draws = -(-train_steps // config.sampling_period)
    wanted_draws = -(-2 * num_blocks // config.active_layers)
    if num_draws >= wanted_draws:
        return None
    period = train_steps // wanted_draws
    advice = f"use a sampling_period of at most {period}, or" if period >= 1 else "use"
    return (
        f"grass.sampling_period is {config.sampling_period}: {train_steps} training steps hold {num_draws} "
        f"draws of {config.active_layers} of {num_blocks} blocks, fewer than the {wanted_draws} that let "
        f"each be drawn about twice; {advice} more active_layers"
    )


def start_line(
    *,
    policy: str,
    num_blocks: int,
    lists: Sequence[str],
    other_lists: Sequence[str] = (),
    active_layers: int,
    managed_params: int,
    active_params: int,
    outer: str | Sequence[str],
    outer_params: int,
    planned_probe_steps: int,
    sampling_period: int | None,
    refresh_period: int | None,
    states_mode: str | None,
    states_dtype: str,
    master_weights: bool,
    device_bytes: int,
    host_bytes: int,
    zero_stage: int,
    zero_stage_given: int,
    num_ranks: int,
    grass_version: str,
    deepspeed_version: str,
) -> str:
    """One line of resolved facts. The same keywords make the log's `start` event, so both tell the same.

    `managed_params`: all that may train in the run, `active_params`: what trains at once (the largest blocks
    and outer), `outer_params`: the part of both that always trains. `device_bytes`, `host_bytes`: gradients
    and states on this rank's device at once, and states on its host once every block was drawn. `states_mode`
    None: not decided yet. `zero_stage_given`: what ds_config asks for.
    """
    others = f" (not drawn: {', '.join(other_lists)})" if other_lists else ""
    outer_text = outer if isinstance(outer, str) else ", ".join(outer)
    draws = "once" if sampling_period is None else f"every {sampling_period} steps"
    refresh = "never" if refresh_period is None else f"every {refresh_period} steps"
    probe = f"{planned_probe_steps} steps without update" if planned_probe_steps else "none"
    promoted = f" (promoted from {zero_stage_given})" if zero_stage != zero_stage_given else ""
    facts = (
        f"policy {policy}",
        f"{active_layers} of {num_blocks} blocks of {', '.join(lists)} active{others}",
        f"parameters managed {_exact_count(managed_params)}, active at once {_exact_count(active_params)}",
        f"outer {outer_text}, {_exact_count(outer_params)}",
        f"probe {probe}, draw {draws}, refresh {refresh}",
        f"states {states_mode or 'stream until measured'} {states_dtype} "
        f"{'with' if master_weights else 'without'} master weights, "
        f"device {human_bytes(device_bytes)} ({device_bytes} bytes), "
        f"host up to {human_bytes(host_bytes)} ({host_bytes} bytes)",
        f"ZeRO stage {zero_stage}{promoted}, {num_ranks} rank{'s' if num_ranks != 1 else ''}",
        f"ds_grass {grass_version}, deepspeed {deepspeed_version}",
    )
    return "GRASS: " + "; ".join(facts)


def _exact_count(number: int) -> str:
    return f"{human_count(number)} ({number:,})" if number >= 1000 else str(number)
