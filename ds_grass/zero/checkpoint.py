"""GRASS inside DeepSpeed's checkpoint files.

The layouts are DeepSpeed's own, so that `zero_to_fp32.py` reads them: one "group" a unit, fp32 master weights and the
moments of every unit, zeros (and the weight itself) for blocks that were never drawn. GRASS adds one key, "grass",
made of tensors, numbers, strings, lists and dicts only: format, units, which of them have state, the controller.

Everything is assembled on the host from the state store; nothing is gathered on a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from ds_grass.controller import Controller
from ds_grass.copy_engine import copy_to_host
from ds_grass.host_memory import host_zeros
from ds_grass.state_store import StateStore
from ds_grass.units import Unit

KEY = "grass"
FORMAT = 1


@dataclass(frozen=True)
class SavedState:
    """One unit's state as host tensors: fp32 master and moments, each (shard,), and the unit's Adam steps."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


def collect(unit: Unit, store: StateStore, weights: Tensor) -> SavedState:
    """The unit's state, made up from its weights (`weights`: own shard, model dtype) when it was never drawn."""
    held = store.home(unit.key)
    if held is None:
        zeros = (host_zeros(weights.numel(), torch.float32) for _ in range(2))
        return SavedState(_fp32_copy(weights), *zeros, 0)
    master = weights if held.master is None else held.master
    return SavedState(_fp32_copy(master), _fp32_copy(held.exp_avg), _fp32_copy(held.exp_avg_sq), held.step)


def _fp32_copy(tensor: Tensor) -> Tensor:
    """On the host, in storage of its own: `torch.save` of a view would write all of the arena behind it."""
    copy = host_zeros(tensor.numel(), torch.float32)
    copy_to_host(copy, tensor.detach())
    return copy


def optimizer_state(states: Sequence[SavedState]) -> dict[int, dict]:
    """The "state" of a torch optimizer with one flat parameter a unit, as DeepSpeed's tools expect it."""
    return {
        key: {
            "step": torch.tensor(float(state.step)),
            "exp_avg": state.exp_avg,
            "exp_avg_sq": state.exp_avg_sq,
        }
        for key, state in enumerate(states)
    }


def hyper_parameters(group: Mapping) -> dict:
    """The plain values of a parameter group: learning rate, betas, what a scheduler keeps there."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {key: value for key, value in group.items() if key != "params" and isinstance(value, plain)}


def param_groups(units: Sequence[Unit], groups: Sequence[Mapping]) -> list[dict]:
    """One group a unit with the hyper-parameters of the user's group it came from."""
    return [{**hyper_parameters(groups[unit.group]), "params": [unit.key]} for unit in units]


def grass_state(units: Sequence[Unit], groups: Sequence[Mapping], store: StateStore, controller: Controller,
                counters: Mapping[str, int]) -> dict:  # fmt: skip
    """What GRASS adds to the file. `groups`: the user's, whose values a scheduler does not write until it steps."""
    return {
        "format": FORMAT,
        "units": [
            {"name": u.name, "block": -1 if u.block is None else u.block, "numel": u.numel} for u in units
        ],
        "groups": [hyper_parameters(group) for group in groups],
        "drawn": [u.key for u in units if store.has_state(u.key)],
        "moments": str(store.moment_dtype).removeprefix("torch."),
        "controller": controller.state_dict(),
        "counters": dict(counters),
    }


def refuse_universal(folder: str | None) -> None:
    """Universal checkpoints keep no states of blocks by name yet; loading one would silently drop what GRASS knows."""
    if folder is not None:
        raise ValueError(
            f"checkpoint.load_universal is true, but grass cannot load the universal checkpoint {folder}; "
            "resume from the checkpoint itself, with as many ranks as saved it"
        )


def check(optimizer: Mapping, units: Sequence[Unit], ranks: int, where: str) -> Mapping:
    """The "grass" part of a saved optimizer state; ValueError, in one line, when it cannot belong to this job."""
    state = optimizer.get(KEY)
    if state is None:
        raise ValueError(
            f"{where} was not saved by a grass job, so it holds no block states; "
            "start from its weights (load_module_only=True) or remove the grass block"
        )
    if state["format"] > FORMAT:
        raise ValueError(f"{where} has grass format {state['format']}, ours is {FORMAT}: upgrade")
    mine = [(u.name, u.numel) for u in units]
    theirs = [(u["name"], u["numel"]) for u in state["units"]]
    for at, (here, there) in enumerate(zip_longest(mine, theirs)):
        if here != there:
            raise ValueError(
                f"{where} is of another model or grouping: unit {at} is {there or 'missing'} there and "
                f"{here or 'missing'} here; load it with the model and the parameter groups that saved it"
            )
    count = optimizer["partition_count"]  # stage 3 writes one number, the others one a group
    saved_ranks = count if isinstance(count, int) else count[0]
    if saved_ranks != ranks:
        raise ValueError(
            f"{where} was saved by {saved_ranks} data-parallel ranks and is loaded by {ranks}; "
            "use as many ranks as saved it"
        )
    return state


def restore(state: Mapping, units: Sequence[Unit], store: StateStore, masters: Sequence[Tensor],
            moments: Mapping[int, Mapping], shard_numel: Mapping[int, int]) -> None:  # fmt: skip
    """Put every unit's state back; units that had none are forgotten. Tensors may lack their padding."""
    drawn = set(state["drawn"])
    for unit in units:
        if unit.key not in drawn:
            store.forget(unit.key)
            continue
        numel, held = shard_numel[unit.key], moments[unit.key]
        store.restore(
            unit.key,
            padded(masters[unit.key], numel) if store.has_master(unit.key) else None,
            padded(held["exp_avg"], numel),
            padded(held["exp_avg_sq"], numel),
            int(held["step"]),
        )


def padded(tensor: Tensor, numel: int) -> Tensor:
    """`tensor` (1-D) followed by zeros up to `numel`."""
    if tensor.numel() == numel:
        return tensor.detach()
    return torch.nn.functional.pad(tensor.detach(), (0, numel - tensor.numel()))
