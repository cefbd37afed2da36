"""Bytes as people write them: 24GB is 24e9 bytes, 24GiB is 24 x 2^30."""

from __future__ import annotations

from ds_grass.telemetry.human import gigabytes, parse_bytes

__all__ = ["gigabytes", "parse_size"]


def parse_size(text: str, option: str) -> int:
    """The bytes of "24GB", "24GiB" or "24000000000". ValueError names `option`."""
    found = parse_bytes(text)
    if found is None:
        raise ValueError(
            f"{option} is {text!r}; allowed: a size such as 24GB (24e9 bytes) or 24GiB (24 x 2^30)"
        )
    return found
