"""Numbers as people read them."""

from __future__ import annotations


def human_count(number: int) -> str:
    """`1_234_567_890` -> `1.23 B`; K, M, B, T are powers of 1000."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def human_bytes(number: int) -> str:
    """`1_610_612_736` -> `1.50 GiB`; powers of 1024."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            return f"{number / (1 << power):.2f} {unit}"
    return f"{number} B"
