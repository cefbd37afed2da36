"""Plans to start from: the one with the least memory, and one that fills the room which that leaves.

Contract: pure. `leanest` is exact; `filled` is not: it only saves the search some work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_ext.recompute.chunk_labels import Label, Mixed, label_of
from megatron_ext.recompute.stage_bound import Chunk, ChunkPlan
from megatron_ext.recompute.stage_memory import Option


def leanest(chunks: Sequence[Chunk], room: Sequence[int]) -> tuple[list[ChunkPlan], int]:
    """A plan for each chunk, and the most bytes by which they exceed the room of a corner: the least, or 0 or less."""
    plans = [_lean_plans(chunk) for chunk in chunks]
    usages = [[c.usage(plan.kept, plan.cap) for plan in p] for c, p in zip(chunks, plans, strict=True)]
    rest = [
        [-size for size in room]
    ]  # for each number of chunks that are left: the least that they exceed by
    for usage in reversed(usages):
        rest.append([r + min(at) for r, at in zip(rest[-1], zip(*usage, strict=True), strict=True)])
    best: tuple[list[ChunkPlan], float] = ([], float("inf"))

    def visit(used: Sequence[int], trail: list[ChunkPlan]) -> None:
        nonlocal best
        number = len(trail)
        excess = max(map(sum, zip(used, rest[len(chunks) - number], strict=True)))
        if best[1] <= max(0, excess):
            return
        if number == len(chunks):
            best = trail, excess
            return
        for plan, usage in zip(plans[number], usages[number], strict=True):
            visit([u + more for u, more in zip(used, usage, strict=True)], [*trail, plan])

    visit([0] * len(room), [])
    return best[0], int(best[1])


def _lean_plans(chunk: Chunk) -> list[ChunkPlan]:
    """For each cap that pays, the options that keep least."""
    plans: list[ChunkPlan] = []
    for number, cap in enumerate(chunk.caps):
        picks = tuple(
            min(options, key=lambda option: (option.kept_bytes, option.seconds))
            for options in chunk.allowed_at(number)
        )
        pairs = list(zip(picks, chunk.groups, strict=True))
        kept = sum(pick.kept_bytes * group.count for pick, group in pairs)
        if not plans or kept < plans[-1].kept:
            seconds = sum(pick.seconds * group.count for pick, group in pairs)
            plans.append(ChunkPlan(seconds, kept, cap, picks))
    return plans[::-1]  # first the one that keeps least: its layers can be made faster one by one


def filled(
    chunks: Sequence[Chunk], room: Sequence[int], plans: Sequence[ChunkPlan], *, fractional: bool
) -> list[Label]:
    """The plans with layers moved to faster options, the cheapest bytes first, while there is room."""
    labels = [
        label_of(chunk, [[pick] * group.count for pick, group in zip(plan.picks, chunk.groups, strict=True)])
        for chunk, plan in zip(chunks, plans, strict=True)
    ]
    moved: list[Label] | None = labels
    while moved is not None:
        labels = moved
        moved = next(_moved(chunks, room, labels), None)
    mixed = _mixed(chunks, room, labels) if fractional else []
    return min([labels, *mixed], key=lambda row: sum(label.seconds for label in row))


def _moved(chunks: Sequence[Chunk], room: Sequence[int], labels: list[Label]) -> Iterator[list[Label]]:
    """One option of one group gives way to a faster one in as many layers as fit."""
    spare = _spare(room, labels)
    for _, number, group, slow, fast in _moves(chunks, labels):
        picks = labels[number].picks
        more = max(1, fast.kept_bytes - slow.kept_bytes)
        slows = most = picks[group].count(slow)
        for free, o in zip(spare, chunks[number].open, strict=True):
            most = min(most, free // (o * more)) if o else most
        others = [option for option in picks[group] if option != slow]
        for layers in range(most, 0, -1):
            row = [*others, *[fast] * layers, *[slow] * (slows - layers)]
            label = label_of(chunks[number], [*picks[:group], row, *picks[group + 1 :]])
            if _fits(spare, labels[number], label):
                yield [*labels[:number], label, *labels[number + 1 :]]
                return


def _mixed(chunks: Sequence[Chunk], room: Sequence[int], labels: list[Label]) -> Iterator[list[Label]]:
    """One layer runs a faster option for as many micro-batches of a window as fit."""
    spare = _spare(room, labels)
    for _, number, group, light, heavy in _moves(chunks, labels):
        if heavy.kept_bytes <= light.kept_bytes:
            continue
        picks = [list(row) for row in labels[number].picks]
        picks[group].remove(light)
        for count in range(1, chunks[number].window):
            label = label_of(chunks[number], picks, Mixed(group, heavy, light, count))
            if _fits(spare, labels[number], label):
                yield [*labels[:number], label, *labels[number + 1 :]]
                break


def _spare(room: Sequence[int], labels: Sequence[Label]) -> list[int]:
    return [size - sum(used) for size, *used in zip(room, *(label.usage for label in labels), strict=True)]


def _fits(spare: Sequence[int], before: Label, after: Label) -> bool:
    return all(a - b <= free for a, b, free in zip(after.usage, before.usage, spare, strict=True))


def _moves(chunks: Sequence[Chunk], labels: Sequence[Label]) -> list[tuple[float, int, int, Option, Option]]:
    """Chunk, group, slower and faster option, the fewest bytes for a second first."""
    moves = []
    for number, (chunk, label) in enumerate(zip(chunks, labels, strict=True)):
        for index, (group, picks) in enumerate(zip(chunk.groups, label.picks, strict=True)):
            for slow in {id(option): option for option in picks}.values():
                for fast in group.options:
                    if fast.seconds < slow.seconds:
                        more = (fast.kept_bytes - slow.kept_bytes) * max(chunk.open)
                        moves.append((more / (slow.seconds - fast.seconds), number, index, slow, fast))
    return sorted(moves, key=lambda move: move[:3])
