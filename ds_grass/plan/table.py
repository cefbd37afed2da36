"""A plan as text: rich tables for people, one dictionary for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ds_grass.plan import Plan
from ds_grass.plan.advice import Alternative, as_json, grass_block, shortfall
from ds_grass.plan.budget import Budget
from ds_grass.plan.job import PlannedJob
from ds_grass.plan.ledger import ACTIVATIONS, GATHERED, GRADIENTS, IN_FLIGHT, KINDS, STATES, WEIGHTS, Moment
from ds_grass.plan.sizes import gigabytes
from ds_grass.telemetry.human import human_count


def show(plan: Plan, console: Console) -> None:
    """Print the plan: what it is of, the device, the host, what else there is, and what to write."""
    console.print(f"[bold]{escape(_title(plan))}[/]")
    console.print(escape(_job_line(plan)))
    for note in plan.notes:
        console.print(f"[yellow]note[/]  {escape(note)}")
    console.print()
    console.print(_device_table(plan))
    console.print()
    console.print(_host_table(plan))
    console.print()
    console.print(_alternatives_table(plan))
    console.print()
    for line in _conclusion(plan):
        console.print(line)


def document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: bytes everywhere."""
    advice = plan.advice
    chosen = advice.budget if advice else None
    return {
        "model": {"parameters": plan.shape.numel, "blocks": len(plan.shape.block_numels),
                  "block_parameters": max(plan.shape.block_numels), "lists": list(plan.shape.lists)},
        "job": _job_facts(plan.base.job),
        "limits": {"device_bytes": plan.limits.device, "host_bytes_node": plan.limits.host},
        "plan": _budget_facts(plan, plan.base),
        "floor": _budget_facts(plan, plan.floor),
        "alternatives": [{"change": a.change, **_budget_facts(plan, a.budget)} for a in plan.alternatives],
        "largest_active_layers": chosen.job.grass.active_layers if chosen else None,
        "given_up": list(advice.given_up) if advice else [],
        "grass": grass_block(chosen.job) if chosen else None,
        "notes": list(plan.notes),
    }  # fmt: skip


def fits(plan: Plan) -> bool:
    """Whether the job, as given, trains within the limits."""
    return plan.limits.hold(plan.base)


def _title(plan: Plan) -> str:
    shape = plan.shape
    blocks = f"{len(shape.block_numels)} blocks of {human_count(max(shape.block_numels))} in {', '.join(shape.lists)}"
    return (
        f"{plan.model.model_type}, {human_count(shape.numel)} parameters: {blocks}, "
        f"{human_count(shape.outer_numel)} outside"
    )


def _job_line(plan: Plan) -> str:
    job = plan.base.job
    outer = job.grass.outer if isinstance(job.grass.outer, str) else ", ".join(job.grass.outer)
    facts = [
        f"{job.dtype}, ZeRO stage {job.stage or '1 (promoted from 0)'}",
        f"{job.nodes} node{'s' * (job.nodes > 1)} x {job.ranks_per_node} rank{'s' * (job.ranks_per_node > 1)}",
        f"{job.micro_batch} x {job.seq_length} tokens, accumulation {job.accumulation}, "
        f"checkpointing {'on' if job.checkpointing else 'off'}",
        f"{job.grass.active_layers} active, outer {outer}, states {job.grass.states.mode} {job.grass.states.dtype}",
        f"probe {plan.shape.probe_steps} steps",
    ]
    return "; ".join(facts)


def _device_table(plan: Plan) -> Table:
    table = _table("Device memory of one rank, at the peak of each phase", "phase", "peak", "weights", "states",
                   "gradients", "activations", "where")  # fmt: skip
    rows = [("init", plan.base.init), ("probe", plan.base.probe), ("training", plan.base.train)]
    for name, moment in rows:
        if moment is not None:
            style = "bold" if moment == plan.base.peak else ""
            table.add_row(name, *_moment_cells(moment), _where(moment), style=style)
    table.add_row(
        "the floor",
        *_moment_cells(plan.floor.peak),
        "1 active, nothing outside, bf16 states, recomputed",
        style="dim",
    )
    return table


def _moment_cells(moment: Moment) -> list[str]:
    weights = moment.of(WEIGHTS) + moment.of(GATHERED)
    gradients = moment.of(GRADIENTS) + moment.of(IN_FLIGHT)
    parts = (moment.total_bytes, weights, moment.of(STATES), gradients, moment.of(ACTIVATIONS))
    return [gigabytes(part) if part else "-" for part in parts]


def _where(moment: Moment) -> str:
    return f"{moment.phase}, {moment.place}" if moment.place else moment.phase


def _host_table(plan: Plan) -> Table:
    base, ranks = plan.base, plan.base.job.ranks_per_node
    table = _table("Host memory, and what passes between host and device", "", "a rank", "a node", "")
    saving = base.host_bytes + base.saving_bytes
    rows = [
        ("states, once every block was drawn", base.host_bytes, "grows until then, from nothing"),
        (
            "while a checkpoint is saved",
            saving,
            "fp32 copies of weights without a master" if base.saving_bytes else "",
        ),
        ("to the device, a step", base.moved_bytes, "and as much back"),
    ]
    for name, nbytes, remark in rows:
        table.add_row(name, gigabytes(nbytes), gigabytes(nbytes * ranks), f"[dim]{remark}[/]")
    return table


def _alternatives_table(plan: Plan) -> Table:
    table = _table(
        "What another setting would give", "setting", "device, a rank", "host, a node", "moved a step", "fits"
    )
    rows: Iterable[Alternative] = (Alternative("as given", plan.base), *plan.alternatives)
    for row in rows:
        table.add_row(
            row.change,
            gigabytes(row.budget.peak.total_bytes),
            gigabytes(row.budget.host_bytes_node),
            gigabytes(row.budget.moved_bytes),
            _verdict(plan, row.budget),
            style="bold" if row.budget is plan.base else "",
        )
    return table


def _verdict(plan: Plan, budget: Budget) -> str:
    if plan.limits.device is None and plan.limits.host is None:
        return ""
    over = shortfall(plan.limits, budget)
    return f"[red]not {', nor '.join(over)}[/]" if over else "[green]yes[/]"


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, column in enumerate(columns):
        words = index == 0 or column in ("where", "", "fits")
        table.add_column(
            column, justify="left" if words else "right", header_style="cyan", no_wrap=index == 0
        )
    return table


def _conclusion(plan: Plan) -> list[str]:
    if plan.advice is None:
        return ["Give --device-memory and --host-memory to learn the largest active_layers that fits."]
    chosen, lost = plan.advice.budget, plan.advice.given_up
    limits = _limits(plan)
    if chosen is None:
        return [f"[bold red]Nothing fits {limits}[/], not even {', '.join(lost)} with one active block: take a "
                "shorter --seq-length, more ranks with ZeRO stage 3, or a larger device or host."]  # fmt: skip
    changed = f", with {', '.join(lost)}" if lost else ""
    lines = [
        f"[bold green]The largest active_layers that fits {limits} is {chosen.job.grass.active_layers}[/]{changed}: "
        f"{gigabytes(chosen.peak.total_bytes)} on a device, {gigabytes(chosen.host_bytes_node)} on a host. Write",
        escape(as_json(chosen.job)),
    ]
    if chosen.job.checkpointing and not plan.base.job.checkpointing:
        lines.append("and turn gradient checkpointing on.")
    if not plan.limits.hold_saving(chosen):
        lines.append(
            f"[yellow]Saving a checkpoint with optimizer states would take {gigabytes(chosen.saving_bytes_node)} of "
            "host memory[/], which is not there: save the weights only (engine.save_16bit_model, or the Trainer's "
            "save_only_model)."
        )
    return lines


def _limits(plan: Plan) -> str:
    told = []
    if plan.limits.device is not None:
        told.append(f"{gigabytes(plan.limits.device)} of device")
    if plan.limits.host is not None:
        told.append(f"{gigabytes(plan.limits.host)} of host")
    return " and ".join(told) + " memory"


def _job_facts(job: PlannedJob) -> dict[str, Any]:
    return {"stage": job.stage or 1, "dtype": job.dtype, "micro_batch": job.micro_batch, "seq_length": job.seq_length,
            "accumulation": job.accumulation, "nodes": job.nodes, "ranks_per_node": job.ranks_per_node,
            "gradient_checkpointing": job.checkpointing, "grass": grass_block(job)}  # fmt: skip


def _budget_facts(plan: Plan, budget: Budget) -> dict[str, Any]:
    return {
        "init": _moment_facts(budget.init),
        "probe": _moment_facts(budget.probe) if budget.probe else None,
        "train": _moment_facts(budget.train),
        "peak_bytes": budget.peak.total_bytes,
        "states_mode": budget.job.grass.states.mode,
        "host_bytes": budget.host_bytes,
        "host_bytes_node": budget.host_bytes_node,
        "saving_bytes_node": budget.saving_bytes_node,
        "moved_bytes_step": budget.moved_bytes,
        "fits": plan.limits.hold(budget),
    }


def _moment_facts(moment: Moment) -> dict[str, Any]:
    held = {kind.replace(" ", "_"): nbytes for kind, nbytes in zip(KINDS, moment.held, strict=True)}
    return {"bytes": moment.total_bytes, "phase": moment.phase, "place": moment.place, **held}
