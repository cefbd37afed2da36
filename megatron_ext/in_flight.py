"""How many micro-batches' activations a pipeline rank holds at once, from the schedule alone.

1F1B (Narayanan et al., arXiv 2104.04473, section 2.2): stage i of p runs p - i - 1 forwards before its first backward,
so p - i are in flight, or all m where there are fewer. Interleaved with v chunks a rank and groups of N micro-batches:
2 (p - i - 1) + (v - 1) N warm-up passes and the running one, counted in chunks. Both as measured on Megatron-core's
schedules.
"""

from __future__ import annotations


def in_flight(
    stages: int, stage: int, chunks: int = 1, group_size: int | None = None, micro_batches: int | None = None
) -> int:
    """Forward passes of a chunk whose activations are held at once, at most.

    `stages`, `stage`: pipeline ranks, and which one (0 first). `chunks`: virtual stages of a rank. `group_size`:
    micro-batches that a chunk runs in a row, None for `stages`. `micro_batches`: of a step; None: many.
    """
    if chunks == 1:
        held = stages - stage
        return held if micro_batches is None else min(held, micro_batches)
    group = stages if group_size is None else group_size
    held = 2 * (stages - stage - 1) + (chunks - 1) * group + 1
    return held if micro_batches is None else min(held, chunks * micro_batches)
