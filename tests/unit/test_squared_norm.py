"""Contracts of `ops.squared_norm`: it is the norm, and every kernel adds in the order of the specification."""

from __future__ import annotations

import pytest
import torch

from ds_grass import host_memory, ops
from ds_grass.ops import library
from ds_grass.ops.squared_norm import squared_norm_specification
from tests.tensors import LargestResult

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [0, 1, 255, 256, 4095, 4096, 4097, 200_003]


@pytest.fixture(params=["pytorch", "native"])
def kernel(request):
    if request.param == "pytorch":
        return squared_norm_specification
    if not ops.native()[0]:
        pytest.skip(ops.native()[1])
    return ops.squared_norm


def values(n: int, dtype: torch.dtype, start: int = 0) -> torch.Tensor:
    return torch.randn(n + start, generator=torch.Generator().manual_seed(n)).to(dtype)[start:]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("n", SIZES)
def test_norm_is_the_sum_in_double_precision(kernel, dtype, n):
    x = values(n, dtype, start=3)
    norm = kernel(x)
    assert norm.dtype == FP32
    assert norm.dim() == 0
    torch.testing.assert_close(norm.double(), x.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.skipif(not ops.native()[0], reason=ops.native()[1])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("n", [*SIZES, 4096 * 4096 + 5])
def test_native_kernel_equals_the_specification_bit_for_bit(dtype, n):
    x = values(n, dtype, start=1)
    assert torch.equal(ops.squared_norm(x), squared_norm_specification(x))


def test_order_of_additions_is_the_one_described(kernel):
    """By hand, in Python: rows lane by lane, lanes folded in halves, segments as the next level's values."""
    x = values(4096 + 300, FP32)
    squares = [value * value for value in x.unbind()]
    sums = []
    for segment in (squares[:4096], squares[4096:] + [torch.zeros(())] * 3796):
        lanes = segment[:256]
        for row in range(1, 16):
            lanes = [lane + other for lane, other in zip(lanes, segment[256 * row :][:256], strict=True)]
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[i] + lanes[i + half] for i in range(half)]
        sums.append(lanes[0])
    assert torch.equal(kernel(x), sums[0] + sums[1])


@pytest.mark.skipif(not ops.native()[0], reason=ops.native()[1])
def test_native_kernel_takes_more_than_2_to_the_31_elements():
    x = host_memory.host_zeros(2**31 + 5, BF16)  # pages that are not written cost no memory
    x[0] = x[-1] = 2.0
    assert ops.squared_norm(x) == 8.0


def test_infinite_and_nan_values_show(kernel):
    x = torch.ones(5000)
    x[4999] = float("inf")
    assert kernel(x) == float("inf")
    x[0] = float("nan")
    assert kernel(x).isnan()


@pytest.mark.skipif(not ops.native()[0], reason=ops.native()[1])
def test_native_kernel_does_not_depend_on_the_number_of_threads():
    x, threads = values(300_001, BF16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.squared_norm(x)
        torch.set_num_threads(2)
        together = ops.squared_norm(x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


def test_pytorch_kernel_copies_no_more_than_a_chunk_and_chunks_do_not_matter(monkeypatch):
    x = values(50_000, BF16)
    whole = squared_norm_specification(x)
    monkeypatch.setattr(library, "CHUNK_CPU", 4096)
    with LargestResult() as largest:
        assert torch.equal(squared_norm_specification(x), whole)
    assert 0 < largest.numel <= 4096


def test_native_kernel_is_what_the_dispatcher_runs_when_loaded():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("grass::squared_norm", "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("grass::squared_norm", "CPU") == ops.native()[0]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_op_passes_opcheck(dtype):
    torch.library.opcheck(torch.ops.grass.squared_norm.default, (values(5000, dtype),))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 5), "x has 2 dimensions or gaps; pass a flat contiguous tensor"),
        (torch.ones(10)[::2], "x has 1 dimensions or gaps"),
        (torch.ones(10).double(), r"x is \S+; use float32, bfloat16 or float16"),
    ],
)
def test_wrong_arguments_are_named(kernel, x, message):
    with pytest.raises(RuntimeError, match="grass::squared_norm: " + message):
        kernel(x)
