"""Which tokens a rank holds and which parts of the attention matrix it computes: pure functions of integers.

Between layers a rank holds a contiguous run of each sequence, Megatron's layout. A causal mask makes contiguous runs
unequal work: the last rank sees all keys, the first only its own. So strategies that keep queries local reorder the
tokens once at their entrance and once at their exit: the sequence is cut into 2p chunks, and rank r takes chunks r and
2p-1-r, which together see the same number of keys on every rank ("zigzag"; Striped and ring attention literature call
it head-tail or zigzag as well).

A :class:`Tile` is a rectangle of the attention matrix that a kernel can compute without a mask tensor: seen in full, or
square and causal along its diagonal. Packed documents only make more tiles. Tiles of one layout cover every pair that
may be seen exactly once; nothing else is computed.

Contract: no tensor, no process group; positions count tokens of the whole sequence, rows count tokens as they lie in a
rank's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, order=True)
class Span:
    """Tokens `start` to `stop` of the sequence, which lie in memory from `row` on."""

    start: int
    stop: int
    row: int

    def cut(self, start: int, stop: int) -> Span | None:
        """The part of it between two positions, None where there is none."""
        low, high = max(self.start, start), min(self.stop, stop)
        return Span(low, high, self.row + low - self.start) if low < high else None


@dataclass(frozen=True)
class Tile:
    """Rows `q_rows` of the queries against rows `k_rows` of the keys; `causal`: square, along its diagonal."""

    q_rows: tuple[int, int]
    k_rows: tuple[int, int]
    causal: bool

    @property
    def pairs(self) -> int:
        """Query-key pairs that are seen."""
        height, width = self.q_rows[1] - self.q_rows[0], self.k_rows[1] - self.k_rows[0]
        return height * (height + 1) // 2 if self.causal else height * width


Spans = tuple[Span, ...]


def contiguous(rank: int, size: int, length: int) -> Spans:
    """Megatron's layout: rank `rank` of `size` holds one run of a sequence of `length` tokens."""
    local = length // size
    return (Span(rank * local, (rank + 1) * local, 0),)


def zigzag(rank: int, size: int, length: int) -> Spans:
    """Chunks `rank` and `2 * size - 1 - rank` of `2 * size`. `length` must divide by `2 * size`."""
    chunk = length // (2 * size)
    other = 2 * size - 1 - rank
    return join(
        (
            Span(rank * chunk, (rank + 1) * chunk, 0),
            Span(other * chunk, (other + 1) * chunk, chunk),
        )
    )


def whole(length: int) -> Spans:
    """All tokens, in order."""
    return (Span(0, length, 0),)


def zigzag_owner(chunk: int, size: int) -> int:
    """The rank that holds a chunk of `2 * size` in zigzag order."""
    return chunk if chunk < size else 2 * size - 1 - chunk


def can_zigzag(length: int, size: int) -> bool:
    """Whether `length` tokens can be cut into `2 * size` equal chunks."""
    return length % (2 * size) == 0


def join(spans: Sequence[Span]) -> Spans:
    """Spans with neighbours made one where they are neighbours both in the sequence and in memory."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and last.stop == span.start and last.row + last.stop - last.start == span.row:
            joined[-1] = Span(last.start, span.stop, last.row)
        else:
            joined.append(span)
    return tuple(joined)


@lru_cache(maxsize=512)  # packed documents make new ones for every micro-batch
def tiles(
    queries: Spans, keys: Spans, causal: bool, documents: tuple[int, ...] | None = None
) -> tuple[Tile, ...]:
    """The tiles that cover what `queries` may see of `keys`.

    `documents` are boundaries, (0, first length, ..., total): nothing is seen across one. None is one document.
    """
    edges = documents or (0, max(span.stop for span in (*queries, *keys)))
    found = []
    for start, stop in zip(edges, edges[1:], strict=False):
        inside_q = [part for span in queries if (part := span.cut(start, stop))]
        inside_k = [part for span in keys if (part := span.cut(start, stop))]
        for q in inside_q:
            for k in inside_k:
                found += _causal_tiles(q, k) if causal else [_full(q, k)]
    return _merged(found)


def _full(q: Span, k: Span) -> Tile:
    return Tile((q.row, q.row + q.stop - q.start), (k.row, k.row + k.stop - k.start), False)


def _causal_tiles(q: Span, k: Span) -> list[Tile]:
    """Cut both where they begin and end to overlap: what is left is before, after, or on the diagonal."""
    low, high = max(q.start, k.start), min(q.stop, k.stop)
    if low >= high:
        return [_full(q, k)] if k.stop <= q.start else []
    found = []
    on_q, on_k = q.cut(low, high), k.cut(low, high)
    assert on_q is not None
    assert on_k is not None
    found.append(Tile(_full(on_q, on_k).q_rows, _full(on_q, on_k).k_rows, True))
    before = k.cut(k.start, low)  # keys before the diagonal are seen by all queries on it and after it
    after = q.cut(high, q.stop)
    if before:
        found.append(_full(on_q, before))
    if after:
        found.append(_full(after, on_k))
        if before:
            found.append(_full(after, before))
    return found


def _merged(found: list[Tile]) -> tuple[Tile, ...]:
    """Fewer, larger tiles: neighbours along the keys first, then along the queries."""
    squares = [tile for tile in found if tile.causal]
    full = [tile for tile in found if not tile.causal]
    wide: list[Tile] = []
    for tile in sorted(full, key=lambda tile: (tile.q_rows, tile.k_rows)):
        last = wide[-1] if wide else None
        if last and last.q_rows == tile.q_rows and last.k_rows[1] == tile.k_rows[0]:
            wide[-1] = Tile(tile.q_rows, (last.k_rows[0], tile.k_rows[1]), False)
        else:
            wide.append(tile)
    high: list[Tile] = []
    for tile in sorted(wide, key=lambda tile: (tile.k_rows, tile.q_rows)):
        last = high[-1] if high else None
        if last and last.k_rows == tile.k_rows and last.q_rows[1] == tile.q_rows[0]:
            high[-1] = Tile((last.q_rows[0], tile.q_rows[1]), tile.k_rows, False)
        else:
            high.append(tile)
    return (*squares, *high)
