"""The audit of device bytes must notice any tensor, or the promises measured with it mean nothing."""

from __future__ import annotations

import threading

import pytest
import torch

from tests import audit

MEGABYTE = 2**20


def _ones(megabytes: float) -> torch.Tensor:
    return torch.ones(int(megabytes * MEGABYTE), dtype=torch.uint8)


def _assert_within(peak: audit.Peak, budget_bytes: int) -> None:
    assert peak.extra_bytes <= budget_bytes, f"{peak.extra_bytes} bytes, allowed {budget_bytes}"


def test_measure_peak_counts_what_was_freed_before_the_end() -> None:
    def run() -> None:
        _ones(3)
        _ones(1)

    peak = audit.measure_peak(run)
    assert 3 * MEGABYTE <= peak.extra_bytes < 3.1 * MEGABYTE
    assert peak.after - peak.bytes_before < 0.1 * MEGABYTE


def test_measure_peak_reports_what_stays() -> None:
    kept = []
    peak = audit.measure_peak(lambda: kept.append(_ones(2)))
    assert 2 * MEGABYTE <= peak.after - peak.bytes_before < 2.1 * MEGABYTE


def test_measure_peak_sees_another_thread() -> None:
    def run() -> None:
        thread = threading.Thread(target=_ones, args=(4,))
        thread.start()
        thread.join()

    assert audit.measure_peak(run).extra_bytes >= 4 * MEGABYTE


def test_measure_peak_sees_what_autograd_saves() -> None:
    weight = torch.ones(1024, 256, requires_grad=True)

    def run() -> None:
        (weight.exp() * 2).sum().backward()
        weight.grad = None

    assert audit.measure_peak(run).extra_bytes >= 2 * weight.nbytes


def test_measure_peak_leaves_mapped_host_memory_out() -> None:
    import mmap

    kept = []

    def run() -> None:
        kept.append(torch.frombuffer(mmap.mmap(-1, 4 * MEGABYTE), dtype=torch.uint8).fill_(1))

    assert audit.measure_peak(run).extra_bytes < 0.1 * MEGABYTE


def test_budget_fails_when_anything_allocates_the_whole_model() -> None:
    layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(8)]
    one = layers[0].weight.nbytes

    def one_at_a_time() -> None:
        for layer in layers:
            torch.zeros_like(layer.weight)

    def all_at_once() -> None:
        torch.cat([torch.zeros_like(layer.weight).flatten() for layer in layers])

    _assert_within(audit.measure_peak(one_at_a_time), 2 * one)
    with pytest.raises(AssertionError, match="allowed"):
        _assert_within(audit.measure_peak(all_at_once), 2 * one)


def test_measure_peak_agrees_with_the_profiler() -> None:
    def run() -> None:
        _ones(5)

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        peak = audit.measure_peak(run)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert abs(peak.extra_bytes - max(largest, 5 * MEGABYTE)) < 0.1 * MEGABYTE


def test_collectives_that_let_go_are_as_they_were_afterwards() -> None:
    methods = vars(torch.distributed.ProcessGroup)
    before = {name: methods[name] for name in audit.COLLECTIVES}
    with audit.collectives_that_let_go():
        assert all(methods[name] is not before[name] for name in audit.COLLECTIVES)
    assert all(methods[name] is before[name] for name in audit.COLLECTIVES)
