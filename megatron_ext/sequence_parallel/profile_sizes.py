"""Which lengths a job profiles, and when it profiles again.

The first micro-batch may be a short one, and nothing measured on it says what a sequence a hundred times as long takes.
So the profile grows: a micro-batch of more than `REACH` times the tokens of all before it is profiled when it comes.
`benchmarks/sequence_parallel_simulated.py` says what plans cost on such a profile ("from nothing").
"""

from __future__ import annotations

STEP = 4
"""From one profiled length to the next."""

MOST_LENGTHS = 3
"""To begin with."""

REACH = 1.25
"""Times the tokens that were profiled, which a profile is good for."""


def first_lengths(length: int, group_size: int) -> list[int]:
    """What the first micro-batch, of `length` tokens a row, is profiled at: a few lengths, the longest first."""
    found: list[int] = []
    while len(found) < MOST_LENGTHS:
        rounded = _divisible(length, group_size)
        if found and rounded >= found[-1]:
            break
        found.append(rounded)
        length //= STEP
    return found


def more_lengths(length: int, group_size: int, reach: float) -> list[int]:
    """What is profiled when `length`, beyond `reach`, comes: no gap is left below it. The longest first."""
    found = []
    while length > reach:
        found.append(_divisible(length, group_size))
        length //= STEP
    return found


def _divisible(length: int, group_size: int) -> int:
    """The next length down, not zero, that divides into two chunks for every rank: every strategy can cut it."""
    unit = 2 * group_size
    return max(unit, length // unit * unit)
