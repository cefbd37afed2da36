"""Bytes as people write them: 24GB is 24e9 bytes, 24GiB is 24 x 2^30."""

from __future__ import annotations

import re

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str, option: str) -> int:
    """The bytes of "24GB", "24GiB" or "24000000000". ValueError names `option`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]) or float(found[1]) == 0:
        raise ValueError(
            f"{option} is {text!r}; allowed: a size such as 24GB (24e9 bytes) or 24GiB (24 x 2^30)"
        )
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** _POWERS[found[2].upper()])


def gigabytes(nbytes: float) -> str:
    """`16_060_522_496` -> `16.1 GB`; three digits, powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= 0.9995 * size:
            return f"{_three_digits(nbytes / size)} {unit}"
    return f"{nbytes / 1e3:.0f} KB" if nbytes >= 1000 else f"{nbytes:.0f} B"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
