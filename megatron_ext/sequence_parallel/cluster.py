"""Descriptions of machines: the rates that closed forms are divided by.

Contract: pure numbers, checked once; presets are the makers' data sheets times the stated shares that kernels and
collectives reach. A description is a prior: a profile of the machine itself replaces its scale.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cluster:
    """One tensor-parallel group's machine, and how many such groups train together."""

    name: str
    gemm_flops: float
    """FLOP/s that a large GEMM reaches, on one device."""
    attention_flops: float
    """FLOP/s that fused attention reaches, forward and backward."""
    memory_bandwidth: float
    """Bytes/s that element-wise kernels reach."""
    link_bandwidth: float
    """Bytes/s that a rank sends while it receives as many, within the group."""
    link_latency: float
    """Seconds before a message's first byte."""
    launch_seconds: float
    """Of the host for one kernel: nothing small is faster."""
    memory_bytes: int
    """Of one device."""
    group_size: int = 8
    """Ranks of a tensor-parallel group: a node."""
    replicas: int = 1
    """Groups that train the same model on other sequences."""

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            if field.name == "name":
                continue
            whole = field.type == "int"
            if isinstance(given, bool) or not isinstance(given, int if whole else int | float):
                raise ValueError(
                    f"cluster.{field.name} is {given!r}; allowed: {'an integer' if whole else 'a number'}"
                )
            least = 0 if field.name in ("link_latency", "launch_seconds") else 1
            if not math.isfinite(given) or given < least:
                raise ValueError(
                    f"cluster.{field.name} is {given!r}; allowed: a finite number from {least}; "
                    "rates are per second, times in seconds, memory in bytes"
                )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _described(
    name: str, tflops: float, memory_tb: float, link_gb: float, memory_gb: float, **more: Any
) -> Cluster:
    """From a data sheet: dense bf16 TFLOP/s, memory TB/s, NVLink GB/s in one direction, GB.

    Shares reached, assumed: GEMM 0.65; attention 0.45 over forward and backward (near what FlashAttention-2 reaches on
    A100 and -3 on Hopper); memory 0.8; NVLink 0.75 (NCCL's bus bandwidth for large messages). 8 us for a message within
    a node and 5 us for a launch are the order of magnitude for NCCL and PyTorch.
    """
    return Cluster(
        name=name,
        gemm_flops=0.65 * tflops * 1e12,
        attention_flops=0.45 * tflops * 1e12,
        memory_bandwidth=0.8 * memory_tb * 1e12,
        link_bandwidth=0.75 * link_gb * 1e9,
        link_latency=8e-6,
        launch_seconds=5e-6,
        memory_bytes=int(memory_gb * 1e9),
        **more,
    )


PRESETS = {
    cluster.name: cluster
    for cluster in (
        _described("8xA100-80G", 312, 2.039, 300, 80),
        _described("8xH100-80G", 989.4, 3.35, 450, 80),
        _described("8xH200", 989.4, 4.8, 450, 141),
        _described("64xH100", 989.4, 3.35, 450, 80, replicas=8),
    )
}
"""NVIDIA's data sheets of the SXM modules; NVLink's 600 and 900 GB/s count both directions. 64xH100: a group a node."""

PRIOR_CLUSTER = "8xH100-80G"
"""Whose rates a job's closed forms are divided by until it has profiled."""


def find_cluster(name: str, option: str = "cluster") -> Cluster:
    """A preset by name, or a JSON file of a description by path. ValueError names `option`."""
    if name in PRESETS:
        return PRESETS[name]
    allowed = f"allowed: {', '.join(PRESETS)}, or a JSON file with the fields of a Cluster"
    try:
        given = json.loads(Path(name).read_text())
    except OSError as error:
        raise ValueError(
            f"{option} is {name!r}, no preset and not readable ({error.strerror}); {allowed}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{option} is {name!r}, which is not JSON ({error}); {allowed}") from None
    known = {field.name for field in fields(Cluster)}
    if not isinstance(given, dict) or not set(given) <= known:
        raise ValueError(
            f"{option} is {name!r}, which must hold an object with the keys {', '.join(sorted(known))}"
        )
    try:
        return Cluster(**given)
    except TypeError as error:
        raise ValueError(f"{option} is {name!r}, which is incomplete ({error}); {allowed}") from None
