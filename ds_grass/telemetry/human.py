"""Numbers as people read and write them."""

from __future__ import annotations

import re

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int | None:
    """Bytes, at least 1, of "80GB" (80e9), "80GiB" (80 x 2^30) or "80000000000"; None for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None or (found[3] and not found[2]):
        return None
    number = int(found[1]) if found[1].isdecimal() else float(found[1])
    return int(number * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()]) or None


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


def gigabytes(nbytes: float) -> str:
    """`16_060_522_496` -> `16.1 GB`; three digits, powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= 0.9995 * size:
            return f"{_three_digits(nbytes / size)} {unit}"
    return f"{nbytes / 1e3:.0f} KB" if nbytes >= 1000 else f"{nbytes:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
