"""Contracts of the layout: tiles cover what may be seen, once; zigzag gives every rank the same work."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_ext.sequence_parallel import layout

DOCUMENTS = (None, (0, 16), (0, 1, 16), (0, 3, 4, 11, 16), (0, 8, 16))


def positions(spans: layout.Spans) -> list[int]:
    """The position of every row of memory."""
    return [p for span in sorted(spans, key=lambda span: span.row) for p in range(span.start, span.stop)]


def seen(queries: layout.Spans, keys: layout.Spans, causal: bool, documents: tuple | None) -> torch.Tensor:
    """Pairs of rows that may be seen, by the definition."""
    q, k = torch.tensor(positions(queries))[:, None], torch.tensor(positions(keys))[None]
    allowed = torch.ones(len(q), k.shape[1], dtype=torch.bool)
    if causal:
        allowed &= k <= q
    if documents:
        borders = torch.tensor(documents[1:])
        allowed &= torch.bucketize(q, borders, right=True) == torch.bucketize(k, borders, right=True)
    return allowed


def covered(found: tuple[layout.Tile, ...], rows: int, columns: int) -> torch.Tensor:
    """How often each pair is computed."""
    counts = torch.zeros(rows, columns, dtype=torch.int64)
    for tile in found:
        part = counts[slice(*tile.q_rows), slice(*tile.k_rows)]
        part += torch.ones_like(part).tril() if tile.causal else 1
    return counts


@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_tiles_cover_every_seen_pair_once(size, causal, documents):
    order = layout.zigzag if causal else layout.contiguous
    for rank, source in itertools.product(range(size), range(size)):
        for keys in (order(source, size, 16), layout.whole(16)):
            queries = order(rank, size, 16)
            found = layout.tiles(queries, keys, causal, documents)
            counts = covered(found, len(positions(queries)), len(positions(keys)))
            assert torch.equal(counts, seen(queries, keys, causal, documents).long())


def test_tiles_of_spans_that_overlap_in_part_cover_every_seen_pair_once():
    for a, b, c, d in itertools.product(range(0, 7), repeat=4):
        if a < b and c < d:
            queries, keys = (layout.Span(a, b, 0),), (layout.Span(c, d, 0),)
            counts = covered(layout.tiles(queries, keys, True), b - a, d - c)
            assert torch.equal(counts, seen(queries, keys, True, None).long())


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_zigzag_gives_every_rank_as_many_pairs(size):
    def pairs(order, rank):
        return sum(tile.pairs for tile in layout.tiles(order(rank, size, 64), layout.whole(64), True))

    assert len({pairs(layout.zigzag, rank) for rank in range(size)}) == 1
    assert sum(pairs(layout.zigzag, rank) for rank in range(size)) == 64 * 65 // 2
    if size > 1:
        assert pairs(layout.contiguous, size - 1) > 1.4 * pairs(layout.zigzag, 0)


def test_zigzag_holds_every_token_once():
    for size in (1, 2, 4, 8):
        held = sorted(p for rank in range(size) for p in positions(layout.zigzag(rank, size, 32)))
        assert held == list(range(32))


def test_whole_causal_sequence_is_one_tile():
    assert layout.tiles(layout.whole(64), layout.whole(64), True) == (layout.Tile((0, 64), (0, 64), True),)


@pytest.mark.parametrize("size", [4, 8])
def test_gathered_keys_take_few_tiles_however_many_ranks(size):
    for rank in range(size):
        assert len(layout.tiles(layout.zigzag(rank, size, 64), layout.whole(64), True)) <= 4
