"""Putting reducer, state store and core together for one engine; the same for every stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from ds_grass.host_memory import check_host_capacity
from ds_grass.state_store import StateStore
from ds_grass.units import Unit
from ds_grass.zero.core import GrassCore, Job
from ds_grass.zero.reducer import Averaging, GradientReducer
from ds_grass.zero.shards import ShardLayout
from ds_grass.zero.stores import make_store


def assemble(
    job: Job,
    units: Sequence[Unit],
    layouts: Mapping[int, ShardLayout],
    averaging: Averaging,
    *,
    partitioned: bool,
    overlap: bool,
    device: torch.device,
    mpu: object | None,
    weights: Callable[[int], Tensor],
    publish: Callable[[int], None],
    clip_grad: float,
) -> GrassCore:
    """One job's core. Raises ValueError for parameters that GRASS cannot manage."""
    _refuse_experts(units)
    reducer = GradientReducer(
        layouts,
        averaging,
        partitioned=partitioned,
        at_boundary=job.at_boundary,
        device=device,
        stream=torch.cuda.Stream(device) if overlap and device.type == "cuda" else None,
    )
    store = make_store(job.config.states, units, layouts, device, weights)
    _check_capacity_everywhere(store, job.ranks_on_node, device)
    model_parallel_group, model_parallel_rank = _model_parallel(mpu)
    return GrassCore(
        job,
        units,
        reducer,
        store,
        weights=weights,
        publish=publish,
        norm_groups=[group for group in (averaging.group, model_parallel_group) if _is_parallel(group)],
        norm_ranges={unit.key: _counted(unit, layouts[unit.key], model_parallel_rank) for unit in units},
        shard_start={key: layout.rank * layout.shard_numel for key, layout in layouts.items()},
        clip_grad=clip_grad,
    )


def _check_capacity_everywhere(store: StateStore, ranks_on_node: int, device: torch.device) -> None:
    """RuntimeError on every rank when the states would not fit on the host of any."""
    failure = None
    try:
        check_host_capacity(store.final_host_bytes, ranks_on_node)
    except RuntimeError as error:
        failure = error
    short = torch.tensor([float(failure is not None)], device=device)
    dist.all_reduce(short, op=dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if short.item():
        raise RuntimeError(
            "grass: another rank's host has too little memory for its optimizer states; see its message"
        )


def _refuse_experts(units: Sequence[Unit]) -> None:
    for unit in units:
        for name, param in zip(unit.names, unit.params, strict=True):
            if is_moe_param(param):
                raise ValueError(
                    f"grass cannot train DeepSpeed's expert-parallel layers yet, and {name} is one; "
                    "remove the grass block or the MoE layers"
                )


def _model_parallel(mpu: object | None) -> tuple[object | None, int]:
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel"):
        return None, 0
    return mpu.get_model_parallel_group(), mpu.get_model_parallel_rank()


def _is_parallel(group: object | None) -> bool:
    return group is not None and torch.distributed.get_world_size(group) > 1


def _counted(unit: Unit, layout: ShardLayout, model_parallel_rank: int) -> list[tuple[int, int]]:
    """Ranges of the shard whose squares this rank adds: all, or only what other tensor-parallel ranks do not hold."""
    ranges = [
        layout.owned(index)
        for index, param in enumerate(unit.params)
        if is_model_parallel_parameter(param) or model_parallel_rank == 0
    ]
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
