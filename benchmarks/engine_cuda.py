"""The engine's kernels and copies on a GPU, beside what the device itself can do, measured in the same run.

Kernels are timed by events on the device, copies too. The yardstick of a kernel is the device's own copy between two
buffers as large as the shard's tensors, in bytes read plus written; that of a transfer is one `cudaMemcpyAsync` of the
same bytes between the device and pinned memory of PyTorch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_grass import ops
from ds_grass.copy_engine import make_engine
from ds_grass.state_store import StateStore

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 100}
REPEATS = 20
FP32, BF16 = torch.float32, torch.bfloat16
WORKS = {
    "bare": (FP32, False, FP32, FP32),
    "full": (BF16, True, FP32, BF16),
    "pure_bf16": (BF16, False, BF16, BF16),
}
"""Weights, whether they have an fp32 master, moments, gradient."""


def adamw_rows(sizes: Sequence[int], progress: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for work, formats in WORKS.items():
        for numel in sizes:
            progress(f"AdamW on the GPU, {work}, {numel / 1e6:.0f} M elements")
            rows.append({"work": work, "elements": numel, **adamw_row(numel, *formats)})
    return rows


def adamw_row(
    numel: int, param: torch.dtype, has_master: bool, moments: torch.dtype, grad: torch.dtype
) -> dict[str, Any]:
    def random(dtype: torch.dtype) -> Tensor:
        return torch.randn(numel, device="cuda").to(dtype)

    weights, master = random(param), random(FP32) if has_master else None
    exp_avg, exp_avg_sq, gradient = random(moments), random(moments).abs(), random(grad)
    one = torch.ones((), device="cuda")
    seconds = device_seconds(lambda: ops.adamw_(weights, master, exp_avg, exp_avg_sq, gradient, one, **HYPER))
    held = [tensor for tensor in (master, exp_avg, exp_avg_sq) if tensor is not None]
    if master is None:
        held.append(weights)
    nbytes = (
        2 * sum(tensor.nbytes for tensor in held) + gradient.nbytes + (weights.nbytes if has_master else 0)
    )
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_seconds = device_seconds(lambda: target.copy_(source))
    bandwidth, copy_bandwidth = nbytes / seconds, 2 * source.nbytes / copy_seconds
    return {
        "seconds": seconds,
        "bytes_per_second": bandwidth,
        "copy_bytes_per_second": copy_bandwidth,
        "copy_fraction": bandwidth / copy_bandwidth,
    }


def transfer_row(numel: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """A unit's state in, out, and both ways at once, against single copies of as many bytes."""
    progress("transfers between host and device")
    engine = make_engine(torch.device("cuda"))
    store = StateStore(device=engine.device, moment_dtype=BF16, pin_memory=True, buffers=2, slot_numel=numel,
                       mode="stream", engine=engine)  # fmt: skip
    for key in range(2):
        store.add(key, numel, lambda: torch.zeros(numel, device="cuda"), master=False)
    store.activate([0, 1])
    buffers = [engine.allocate(4 * numel) for _ in range(2)]
    units = [store._units[key] for key in range(2)]
    nbytes = 4 * numel
    pinned = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    inward, outward = torch.cuda.Stream(), torch.cuda.Stream()

    def copy_in() -> None:
        with torch.cuda.stream(inward):
            buffers[0].memory.copy_(pinned[0], non_blocking=True)

    def copy_out() -> None:
        with torch.cuda.stream(outward):
            pinned[1].copy_(buffers[1].memory, non_blocking=True)

    def fetch() -> None:
        units[0].fetch(engine, buffers[0], 0, numel)

    def stash() -> None:
        units[1].stash(engine, buffers[1], 0, numel)

    row: dict[str, Any] = {"bytes": nbytes, "pinned": units[0].arena.pinned}
    for name, own, single in (
        ("to_device", [fetch], [copy_in]),
        ("to_host", [stash], [copy_out]),
        ("both_at_once", [fetch, stash], [copy_in, copy_out]),
    ):
        own_seconds, single_seconds = wall_seconds(own), wall_seconds(single)
        row[name] = {
            "seconds": own_seconds,
            "bytes_per_second": len(own) * nbytes / own_seconds,
            "memcpy_bytes_per_second": len(own) * nbytes / single_seconds,
            "memcpy_fraction": single_seconds / own_seconds,
        }
    store.close()
    return row


def zero_copy_row(numel: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The same update with moments in a device slot, in and out, and by a kernel that reaches into pinned memory."""
    progress("zero-copy update")
    weights, gradient = (torch.randn(numel, device="cuda").to(BF16) for _ in range(2))
    host = [torch.zeros(numel, dtype=BF16, pin_memory=True) for _ in range(2)]
    slot = [torch.empty(numel, dtype=BF16, device="cuda") for _ in range(2)]
    mapped = [on_device(tensor) for tensor in host]
    one = torch.ones((), device="cuda")

    def through_slot() -> None:
        for there, here in zip(slot, host, strict=True):
            there.copy_(here, non_blocking=True)
        ops.adamw_(weights, None, *slot, gradient, one, **HYPER)
        for there, here in zip(slot, host, strict=True):
            here.copy_(there, non_blocking=True)

    direct_seconds = device_seconds(lambda: ops.adamw_(weights, None, *mapped, gradient, one, **HYPER))
    return {
        "elements": numel,
        "through_slot_seconds": device_seconds(through_slot),
        "zero_copy_seconds": direct_seconds,
        "bytes_each_way_per_second": 4 * numel / direct_seconds,
    }


class _Mapped:
    """Pinned host memory as the device sees it: with one address space for both, at the same address."""

    def __init__(self, host: Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": (host.numel(),),
            "typestr": "<i2",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def on_device(host: Tensor) -> Tensor:
    """A CUDA tensor over the memory of a pinned bf16 host tensor, which must stay alive."""
    return torch.as_tensor(_Mapped(host), device="cuda").view(BF16)


def device_seconds(work: Callable[[], Any]) -> float:
    """Median by events on the current stream."""
    times = []
    for _ in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def wall_seconds(works: Sequence[Callable[[], None]]) -> float:
    """Median until all streams are done: for work on several of them."""
    times = []
    for _ in range(REPEATS + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for work in works:
            work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])
