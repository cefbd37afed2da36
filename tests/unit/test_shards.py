"""Layouts of gradient buffers: nothing lost, nothing twice, every rank's slice where reduce-scatter puts it."""

import pytest
import torch

from ds_grass.zero.shards import FlatShards, ParameterShards

SIZES = [(7, 16, 1), (64, 64), (3,), (5, 1, 9, 2)]
WORLDS = [1, 2, 3, 4]


def layouts(kind, sizes, world):
    if kind is FlatShards:
        return [FlatShards(sizes, world, rank, 4) for rank in range(world)]
    return [ParameterShards(sizes, world, rank) for rank in range(world)]


@pytest.mark.parametrize("kind", [FlatShards, ParameterShards])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("world", WORLDS)
def test_store_then_slice_gives_every_element_to_exactly_one_rank(kind, sizes, world):
    ranks = layouts(kind, sizes, world)
    buffer = torch.full((ranks[0].numel,), float("nan"))
    grads = [torch.arange(size, dtype=torch.float32) + 100 * (i + 1) for i, size in enumerate(sizes)]
    for index, grad in enumerate(grads):
        ranks[0].store(buffer, index, grad.view(1, -1), accumulate=False)
    ranks[0].clear_padding(buffer)
    assert not buffer.isnan().any()
    shards = buffer.view(world, ranks[0].shard_numel)
    for index, grad in enumerate(grads):
        parts = [shards[rank, slice(*layout.owned(index))] for rank, layout in enumerate(ranks)]
        assert torch.equal(torch.cat(parts), grad)
    owned = sum(stop - start for layout in ranks for start, stop in map(layout.owned, range(len(sizes))))
    assert owned == sum(sizes)
    assert buffer.sum() == sum(grad.sum() for grad in grads)  # padding is zero


@pytest.mark.parametrize("kind", [FlatShards, ParameterShards])
@pytest.mark.parametrize("world", WORLDS)
def test_store_with_accumulate_adds(kind, world):
    layout = layouts(kind, (7, 16), world)[0]
    buffer = torch.zeros(layout.numel)
    layout.store(buffer, 1, torch.ones(4, 4), accumulate=False)
    layout.store(buffer, 1, torch.full((4, 4), 2.0), accumulate=True)
    assert buffer.sum() == 48
    layout.clear(buffer, 1)
    assert buffer.sum() == 0


def test_flat_shards_start_at_aligned_addresses():
    layouts_of_ranks = [FlatShards((7, 9), 3, rank, element_bytes=2) for rank in range(3)]
    assert all(layout.shard_numel * 2 % 32 == 0 for layout in layouts_of_ranks)
    assert [layout.padding for layout in layouts_of_ranks] == [0, 16, 16]  # rank 0 holds all 16 elements


def test_flat_shards_padding_is_what_no_parameter_owns():
    for rank in range(4):
        layout = FlatShards((5, 30), 4, rank, element_bytes=4)
        owned = sum(stop - start for start, stop in map(layout.owned, range(2)))
        assert owned + layout.padding == layout.shard_numel
