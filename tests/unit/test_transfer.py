"""Contracts of `ops.transfer_`: rows of bytes arrive, what lies between them stays."""

from __future__ import annotations

import pytest
import torch

from ds_grass import ops
from ds_grass.ops.transfer import transfer_specification


@pytest.fixture(params=["pytorch", "native"])
def kernel(request):
    if request.param == "pytorch":
        return transfer_specification
    if not ops.native()[0]:
        pytest.skip(ops.native()[1])
    return ops.transfer_


def random_bytes(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 0), (1, 1), (3, 7), (2, 3_000_001)])
def test_rows_arrive_and_what_lies_between_stays(kernel, rows, width):
    to_pitch, from_pitch = width + 5, width + 64
    before = random_bytes(rows * to_pitch + 3, seed=1)
    memory, source = before.clone(), random_bytes(rows * from_pitch + 1, seed=2)
    to = memory.as_strided((rows, width), (to_pitch, 1), 3)
    kernel(to, source.as_strided((rows, width), (from_pitch, 1), 1))
    expected = before.clone()
    for row in range(rows):
        start = 3 + row * to_pitch
        expected[start : start + width] = source[1 + row * from_pitch :][:width]
    assert torch.equal(memory, expected)


def test_native_kernel_is_what_the_dispatcher_runs_when_loaded():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("grass::transfer_", "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("grass::transfer_", "CPU") == ops.native()[0]


def test_op_passes_opcheck():
    rows = random_bytes(40, seed=1).as_strided((2, 7), (20, 1))
    torch.library.opcheck(torch.ops.grass.transfer_.default, (torch.zeros(2, 7, dtype=torch.uint8), rows))


GOOD = torch.zeros(2, 8, dtype=torch.uint8)
WRONG = [
    (GOOD.int(), GOOD, r"destination is \S+; use uint8"),
    (GOOD, GOOD.float(), r"source is \S+; use uint8"),
    (GOOD[0], GOOD[0], "destination has 1 dimensions or rows with gaps; pass rows of neighbouring bytes"),
    (GOOD, torch.zeros(2, 16, dtype=torch.uint8)[:, ::2], "source has 2 dimensions or rows with gaps"),
    (torch.zeros(8, dtype=torch.uint8).expand(2, 8), GOOD, "destination has 2 dimensions or rows with gaps"),
    (GOOD, GOOD[:1], "destination is 2 x 8 bytes but source is 1 x 8; pass two of one shape"),
]


@pytest.mark.parametrize(
    ("destination", "source", "message"), WRONG, ids=[message[:25] for *_, message in WRONG]
)
def test_wrong_arguments_are_named(kernel, destination, source, message):
    with pytest.raises(RuntimeError, match="grass::transfer_: " + message):
        kernel(destination, source)
