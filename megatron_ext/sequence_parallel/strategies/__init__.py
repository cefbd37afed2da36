"""The strategies by name; each is one file, see :mod:`.layer` for what it is given."""

from __future__ import annotations

from .context import CONTEXT
from .layer import Strategy
from .megatron_ts import MEGATRON_TS
from .metp import METP
from .ring import RING
from .ulysses import ULYSSES

BODIES: dict[str, Strategy] = {
    "megatron_ts": MEGATRON_TS,
    "ulysses": ULYSSES,
    "context": CONTEXT,
    "ring": RING,
    "metp": METP,
}
