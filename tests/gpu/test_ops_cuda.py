"""Contracts of the CUDA kernels: the bits of the PyTorch kernel on the CPU, on the caller's stream, without a wait."""

from __future__ import annotations

import itertools

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from ds_grass import ops
from ds_grass.ops.transfer import transfer_specification
from tests.tensors import BF16, FP16, FP32, WEIGHTS, assert_same_bits, clone, make_shard

if not ops.native("cuda")[0]:
    pytest.skip(ops.native("cuda")[1], allow_module_level=True)

HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8)
DELAY_CYCLES = 100_000_000


def on_device(shard: list) -> list:
    """The same tensors on the device, each with the alignment that it has on the host."""
    moved = []
    for tensor in shard:
        if tensor is None:
            moved.append(None)
            continue
        start = tensor.storage_offset()
        memory = torch.empty(tensor.numel() + start, dtype=tensor.dtype, device="cuda")
        moved.append(memory[start:])
        moved[-1].copy_(tensor)
    return moved


@pytest.mark.parametrize("start", [0, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 100_003])
@pytest.mark.parametrize(("param", "master"), WEIGHTS)
def test_adamw_equals_the_cpu_bit_for_bit(param, master, n, start):
    rules = [(True, False, 0.1), (False, True, 0.1), (True, True, 0.0)]
    for moments, grad, rule in itertools.product((FP32, BF16), (FP32, BF16, FP16), rules):
        here = make_shard(n, param, master, moments, grad, seed=n, start=start)
        there = on_device(here)
        for step in (1, 500):
            hyper = dict(zip(("decoupled", "maximize", "weight_decay"), rule, strict=True))
            hyper |= dict(HYPER, step=step, seed=12345678901234, offset=2**32 - 20)
            ops.adamw_specification(*here, torch.tensor([0.37]), **hyper)
            ops.adamw_(*there, torch.tensor([0.37], device="cuda"), **hyper)
        assert_same_bits(here, [None if tensor is None else tensor.cpu() for tensor in there])


def test_adamw_takes_more_than_2_to_the_31_elements():
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 8 * n + 2**30:
        pytest.skip("needs 18 GB of device memory")
    weights, exp_avg, exp_avg_sq, grad = (torch.zeros(n, dtype=BF16, device="cuda") for _ in range(4))
    grad[-5:] = 1.0
    ops.adamw_(
        weights,
        None,
        exp_avg,
        exp_avg_sq,
        grad,
        torch.ones((), device="cuda"),
        **HYPER,
        weight_decay=0.0,
        step=1,
    )
    assert (weights[-5:] < 0).all()
    assert not weights[:-5].any()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 255, 4096, 4097, 200_003, 4096 * 4096 + 5])
def test_squared_norm_equals_the_cpu_bit_for_bit(dtype, n, start):
    x = torch.randn(n + start, generator=torch.Generator().manual_seed(n)).to(dtype)[start:]
    (there,) = on_device([x])
    assert torch.equal(ops.squared_norm(there).cpu(), ops.squared_norm_specification(x))


@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 1), (1, 1_000_001), (3, 700_001)])
def test_transfer_gathers_and_scatters_both_ways(rows, width, pin):
    host = torch.randint(0, 256, (rows * (width + 64),), dtype=torch.uint8)
    host = host.pin_memory() if pin and host.numel() else host
    memory = torch.zeros(rows * (width + 3), dtype=torch.uint8, device="cuda")
    here, there = (
        host.as_strided((rows, width), (width + 64, 1)),
        memory.as_strided((rows, width), (width + 3, 1)),
    )
    ops.transfer_(there, here)
    assert torch.equal(there.cpu(), here)
    back = torch.zeros_like(host)
    ops.transfer_(back.as_strided((rows, width), (width + 64, 1)), there)
    torch.cuda.synchronize()
    expected = torch.zeros_like(host)
    transfer_specification(expected.as_strided((rows, width), (width + 64, 1)), here)
    assert torch.equal(back, expected)


def test_kernels_run_on_the_current_stream_and_the_host_does_not_wait():
    stream, x = torch.cuda.Stream(), torch.ones(1_000_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY_CYCLES)
        x.fill_(2.0)
        norm = ops.squared_norm(x)
        event = stream.record_event()
    assert not event.query()
    stream.synchronize()
    assert norm.item() == 4_000_000


def test_another_device_than_the_current_one_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.ones(5000, device="cuda:1")
    with torch.cuda.device(0):
        assert ops.squared_norm(x).item() == 5000


@pytest.mark.parametrize(("param", "master"), [(BF16, True), (BF16, False)])
def test_ops_pass_opcheck(param, master):
    shard = on_device(clone(make_shard(40, param=param, master=master)))
    one = torch.ones(1, device="cuda")
    values = (1e-2, 0.9, 0.999, 1e-8, 0.1, 1, True, False, 0, 0)
    torch.library.opcheck(torch.ops.grass.adamw_.default, (*shard, one, *values))
    torch.library.opcheck(torch.ops.grass.squared_norm.default, (shard[0],))


def test_adamw_runs_on_states_in_pinned_host_memory():
    """The zero-copy variant that `benchmarks/engine.py` measures: the kernel reaches into the host's memory."""
    from benchmarks.engine_cuda import on_device as mapped

    here = make_shard(10_000, param=BF16, moments=BF16, grad=BF16)
    pinned = [here[2].clone().pin_memory(), here[3].clone().pin_memory()]
    weights, grad = here[0].cuda(), here[4].cuda()
    hyper = dict(HYPER, weight_decay=0.1, step=1)
    ops.adamw_(weights, None, *map(mapped, pinned), grad, torch.ones((), device="cuda"), **hyper)
    torch.cuda.synchronize()
    ops.adamw_specification(*here, torch.ones(1), **hyper, decoupled=True, maximize=False, seed=0, offset=0)
    assert_same_bits([weights.cpu(), *pinned], [here[0], here[2], here[3]])
