"""The facts that a plan depends on, read from ds_config and the command line as DeepSpeed would read them.

Contract: whatever is "auto" (the Trainer's word) or left out is taken from the options; what no option gives is assumed
and named in `notes`. Conflicts and wrong keys raise the ValueError that the job itself would.

Not covered: tensor and sequence parallelism (every rank is a data-parallel one).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ds_grass import conflicts
from ds_grass.config import GrassConfig, parse_block

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


@dataclass(frozen=True)
class Gathering:
    """How DeepSpeed's stage 3 keeps gathered weights: its keys `stage3_*`, in elements."""

    persistence_threshold: int = 100_000
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000


@dataclass(frozen=True)
class PlannedJob:
    """One job as one rank sees it."""

    grass: GrassConfig
    stage: int = 2
    dtype: str = "bf16"
    wire_dtype: str = "bf16"
    """Of gradients on the wire (communication_data_type)."""
    sum_dtype: str = "bf16"
    """Of gradients as they add up (data_types.grad_accum_dtype)."""
    accumulation: int = 1
    micro_batch: int = 1
    seq_length: int = 2048
    """Tokens in a sequence."""
    ranks_per_node: int = 1
    nodes: int = 1
    checkpointing: bool = False
    gathering: Gathering = field(default_factory=Gathering)
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a CPU that plays the device, as in the tests; the host's tensors then count as its own."""

    @property
    def ranks(self) -> int:
        return self.ranks_per_node * self.nodes

    def on_cpu(self) -> PlannedJob:
        """The same job where a CPU plays the device."""
        return replace(self, device="cpu")

    def with_grass(self, **keys: Any) -> PlannedJob:
        """The same job with other keys of the block."""
        return replace(self, grass=self.grass.model_copy(update=keys))

    def activating(self, count: int) -> PlannedJob:
        """The same job with `count` active layers; fewer need more `probe_steps`, which the package then chooses."""
        return self.with_grass(active_layers=count, probe_steps=0 if self.grass.probe_steps == 0 else None)

    def with_states(self, **keys: Any) -> PlannedJob:
        """The same job with other keys of `grass.states`."""
        return self.with_grass(states=self.grass.states.model_copy(update=keys))


def read_ds_config(path: str) -> dict[str, Any]:
    """The parsed file. Raises ValueError in one line."""
    try:
        ds_config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"--config is {path!r}, which cannot be read ({error.strerror}); name a ds_config.json"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"--config is {path!r}, which is not JSON ({error}); name a ds_config.json"
        ) from None
    if not isinstance(ds_config, dict):
        raise ValueError(f"--config is {path!r}, which holds no JSON object; name a ds_config.json")
    return ds_config


def resolve(
    ds_config: Mapping[str, Any],
    *,
    micro_batch: int | None = None,
    accumulation: int | None = None,
    seq_length: int | None = None,
    ranks_per_node: int = 1,
    nodes: int = 1,
    checkpointing: bool = False,
) -> tuple[PlannedJob, list[str]]:
    """The job, and one line for each value that was assumed. Raises ValueError for what the job would refuse."""
    notes: list[str] = []
    block = ds_config.get("grass")
    if block is None:
        notes.append('the file has no "grass" block: planned with its defaults')
    grass = parse_block({} if block is None else block)
    conflicts.check(ds_config, grass)
    dtype = _dtype(ds_config, notes)
    sizes = _batch_sizes(ds_config, micro_batch, accumulation, ranks_per_node * nodes, notes)
    if seq_length is None:
        seq_length = PlannedJob.seq_length
        notes.append(f"--seq-length is not given: {seq_length} tokens")
    zero = ds_config.get("zero_optimization") or {}
    data_types = ds_config.get("data_types") or {}
    return PlannedJob(
        grass=grass,
        stage=_number(zero, "stage", 0),
        dtype=dtype,
        wire_dtype=_dtype_name(ds_config, "communication_data_type", dtype),
        sum_dtype=_dtype_name(data_types, "grad_accum_dtype", dtype),
        micro_batch=sizes[0],
        accumulation=sizes[1],
        seq_length=seq_length,
        ranks_per_node=ranks_per_node,
        nodes=nodes,
        checkpointing=checkpointing,
        gathering=_gathering(zero),
    ), notes


def _dtype(ds_config: Mapping[str, Any], notes: list[str]) -> str:
    given = {name: (ds_config.get(name) or {}).get("enabled", False) for name in ("bf16", "fp16")}
    given["bf16"] = given["bf16"] or (ds_config.get("bfloat16") or {}).get("enabled", False)
    for name in ("bf16", "fp16"):
        if given[name] is True:
            return name
    if given["bf16"] == "auto":
        notes.append('bf16.enabled is "auto": planned in bf16')
        return "bf16"
    return "fp32"


def _batch_sizes(
    ds_config: Mapping[str, Any], micro: int | None, accumulation: int | None, ranks: int, notes: list[str]
) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches of a step; any two of DeepSpeed's three keys give the third."""
    total = _count(ds_config, "train_batch_size")
    micro = micro or _count(ds_config, "train_micro_batch_size_per_gpu")
    accumulation = accumulation or _count(ds_config, "gradient_accumulation_steps")
    if total and micro and not accumulation:
        accumulation = max(1, total // (micro * ranks))
    if total and not micro:
        micro = max(1, total // ((accumulation or 1) * ranks))
    if not micro:
        notes.append("train_micro_batch_size_per_gpu and --micro-batch are not given: 1 row")
    if not accumulation and ds_config.get("gradient_accumulation_steps") == "auto":
        notes.append('gradient_accumulation_steps is "auto" and --accumulation is not given: 1')
    return micro or 1, accumulation or 1


def _count(mapping: Mapping[str, Any], key: str) -> int | None:
    value = mapping.get(key)
    if value in (None, "auto"):
        return None
    if type(value) is not int or value < 1:
        raise ValueError(f'{key} is {value!r}; allowed: an integer from 1, or "auto"')
    return value


def _number(mapping: Mapping[str, Any], key: str, default: int) -> int:
    value = mapping.get(key, default)
    if value == "auto":
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f'{key} is {value!r}; allowed: a number from 0, or "auto"')
    return int(value)


def _dtype_name(mapping: Mapping[str, Any], key: str, default: str) -> str:
    value = mapping.get(key)
    if value in (None, "auto"):
        return default
    name = _NAMES.get(str(value), str(value))
    if name not in DTYPES:
        raise ValueError(f"{key} is {value!r}; allowed: fp32, bf16 or fp16")
    return name


def _gathering(zero: Mapping[str, Any]) -> Gathering:
    defaults = Gathering()
    return Gathering(
        _number(zero, "stage3_param_persistence_threshold", defaults.persistence_threshold),
        _number(zero, "stage3_prefetch_bucket_size", defaults.prefetch_bucket_size),
        _number(zero, "stage3_max_live_parameters", defaults.max_live_parameters),
        _number(zero, "stage3_max_reuse_distance", defaults.max_reuse_distance),
    )
