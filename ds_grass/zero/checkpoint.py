"""GRASS inside DeepSpeed's checkpoint files.

The layouts are DeepSpeed's own, so that `zero_to_fp32.py` and `ds_to_universal` read them: one flat state a unit,
fp32 master weights and moments; a block that was never drawn has its weight and, in no more space than one number,
zeros. "param_groups" are the user's, which is what plain DeepSpeed compares with its own when it loads a converted
checkpoint. It knows one step count for all parameters, so "step" holds the largest; the units' own are in "grass".

GRASS adds that one key, made of tensors, numbers, strings, lists and dicts only: format, units, which of them have
state, their steps, the controller. Everything is a view of the state store's host memory, nothing is gathered on a
device: a state dict is for saving now, the next step writes into it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, Protocol

import torch
from torch import Tensor

import ds_grass
from ds_grass.controller import Controller
from ds_grass.copy_engine import copy_to_host
from ds_grass.host_memory import host_zeros
from ds_grass.state_store import StateStore
from ds_grass.units import Unit

KEY = "grass"
FORMAT = 2


@dataclass(frozen=True)
class SavedState:
    """One unit's state as host tensors, each (shard,): fp32 master, moments in their own dtype; and its Adam steps."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


def collect(unit: Unit, store: StateStore, weights: Tensor) -> SavedState:
    """The unit's state, made up from its weights (`weights`: own shard, model dtype) when it was never drawn."""
    held = store.home(unit.key)
    if held is None:
        # saved as one number; DeepSpeed's tools slice and clone it
        zeros = torch.zeros(1, dtype=store.moment_dtype).expand(weights.numel())
        return SavedState(_fp32_on_host(weights), zeros, zeros, 0)
    master = weights if held.master is None else held.master
    return SavedState(_fp32_on_host(master), held.exp_avg, held.exp_avg_sq, held.step)


def _fp32_on_host(tensor: Tensor) -> Tensor:
    """In storage of its own, for `torch.save` writes whole storages; a copy only where the state store has none."""
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32 and alone:
        return tensor.detach()
    copy = host_zeros(tensor.numel(), torch.float32)
    copy_to_host(copy, tensor.detach())
    return copy


def optimizer_state(states: Sequence[SavedState]) -> dict[int, dict]:
    """The "state" of a torch optimizer with one flat parameter a unit, as DeepSpeed's tools expect it."""
    step = float(max((state.step for state in states), default=0))
    return {
        key: {
            "step": torch.tensor(step),
            "exp_avg": state.exp_avg,
            "exp_avg_sq": state.exp_avg_sq,
        }
        for key, state in enumerate(states)
    }


def hyper_parameters(group: Mapping) -> dict:
    """The plain values of a parameter group: learning rate, betas, what a scheduler keeps there; tensors as numbers."""
    plain = (bool, int, float, str, tuple, list, type(None))
    numbers = {key: _number(value) for key, value in group.items() if key != "params"}
    return {key: value for key, value in numbers.items() if isinstance(value, plain)}


def _number(value: object) -> object:
    """A tensor of one element, or a number of numpy's, as Python's."""
    return value.item() if getattr(value, "shape", None) == () else value


def update_group(group: dict, saved: Mapping) -> None:
    """Take over saved values; a learning rate that is a tensor stays that tensor, which a scheduler may hold."""
    for key, value in saved.items():
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


def param_groups(units: Sequence[Unit], groups: Sequence[Mapping]) -> list[dict]:
    """The user's groups, "params" naming the units made of each."""
    return [
        {**hyper_parameters(group), "params": [unit.key for unit in units if unit.group == index]}
        for index, group in enumerate(groups)
    ]


def grass_state(units: Sequence[Unit], groups: Sequence[Mapping], store: StateStore, controller: Controller,
                counters: Mapping[str, int]) -> dict:  # fmt: skip
    """What GRASS adds to the file. `groups`: the user's, whose values a scheduler does not write until it steps."""
    return {
        "format": FORMAT,
        "version": ds_grass.__version__,
        "units": [
            {
                "name": u.name,
                "block": -1 if u.block is None else u.block,
                "numel": u.numel,
                "params": _params(u),
            }
            for u in units
        ],
        "groups": [hyper_parameters(group) for group in groups],
        "drawn": [u.key for u in units if store.has_state(u.key)],
        "steps": [store.steps[u.key] for u in units],
        "moments": str(store.moment_dtype).removeprefix("torch."),
        "controller": controller.state_dict(),
        "counters": dict(counters),
    }


def _params(unit: Unit) -> list[list]:
    """Name and unsharded shape of each parameter, in the order in which they lie in the unit."""
    shapes = (getattr(param, "ds_shape", param.shape) for param in unit.params)
    return [[name, list(shape)] for name, shape in zip(unit.names, shapes, strict=True)]


def check(optimizer: Mapping, units: Sequence[Unit], groups: Sequence[Mapping], where: str) -> Mapping:
    """The "grass" part of a saved optimizer state; ValueError, in one line, when it cannot belong to this job."""
    state = optimizer.get(KEY)
    if state is None:
        raise ValueError(
            f"{where} was not saved by a grass job, so it holds no block states; "
            "start from its weights (load_module_only=True) or remove the grass block"
        )
    if state["format"] != FORMAT:
        raise ValueError(
            f"{where} has grass format {state['format']} and this ds_grass reads {FORMAT}; load it with ds_grass "
            f"{state.get('version', '0.1')}, which saved it"
        )
    mine = [(u.name, u.numel) for u in units]
    theirs = [(u["name"], u["numel"]) for u in state["units"]]
    for at, (here, there) in enumerate(zip_longest(mine, theirs)):
        if here != there:
            raise ValueError(
                f"{where} is of another model or grouping: unit {at} is {there or 'missing'} there and "
                f"{here or 'missing'} here; load it with the model and the parameter groups that saved it"
            )
    for unit, saved in zip(units, state["units"], strict=True):
        for here, there in zip_longest(_params(unit), saved["params"]):
            if here != there:
                raise ValueError(
                    f"{where} is of another model: in {unit.name} it has {there or 'nothing'} where this one has "
                    f"{here or 'nothing'}; load it with the model that saved it"
                )
    check_groups(state["groups"], groups, where)
    return state


def check_groups(saved: Sequence[Mapping], groups: Sequence[Mapping], where: str) -> None:
    """ValueError when the job was given another number of parameter groups."""
    if len(saved) != len(groups):
        raise ValueError(
            f"{where} has {len(saved)} parameter groups and this job {len(groups)}; give the optimizer the groups "
            "that saved it"
        )


def check_ranks(optimizer: Mapping, ranks: int, where: str) -> None:
    """ValueError when the shards are those of another number of data-parallel ranks."""
    count = optimizer["partition_count"]  # stage 3 writes one number, the others one a unit
    saved_ranks = count if isinstance(count, int) else count[0]
    if saved_ranks != ranks:
        raise ValueError(
            f"{where} was saved by {saved_ranks} data-parallel ranks and is loaded by {ranks}; "
            "use as many ranks as saved it, or a universal checkpoint"
        )


class Shards(Protocol):
    """Where a unit's saved tensors come from: this rank's shard, 1-D, with or without its padding."""

    def __call__(self, unit: Unit, what: Literal["fp32", "exp_avg", "exp_avg_sq"]) -> Tensor: ...


def steps_of(state: Mapping) -> dict[int, int]:
    """Adam steps by unit key, of the units that had a state. `state`: the "grass" part."""
    return {key: int(state["steps"][key]) for key in state["drawn"]}


def load_mapped(path: str) -> dict:
    """One of DeepSpeed's files; tensors stay on the disk until they are copied from, where the format allows."""
    return torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))


def padded(tensor: Tensor, numel: int) -> Tensor:
    """`tensor` (1-D) followed by zeros up to `numel`."""
    if tensor.numel() == numel:
        return tensor.detach()
    return torch.nn.functional.pad(tensor.detach(), (0, numel - tensor.numel()))
