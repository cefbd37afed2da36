"""What a layer of experts changes beside its own tensors when it runs, put back after a measurement.

Its router adds its losses to a table of the process, of which Megatron-core logs a step's sums; and a loss that runs
backward before the first loss scale is set leaves a scale of shape (), into which Megatron-core cannot copy its own of
shape (1,). Contract: inside :func:`put_back` layers run as they like; after it both are as before, and entries that
were not there are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def put_back() -> Iterator[None]:
    """Around layers of experts that run for no micro-batch."""
    from megatron.core.transformer.moe import moe_utils

    logged = _logged_losses(moe_utils)
    before = {name: (dict(entry), entry["values"].clone()) for name, entry in logged.items()}
    scaler = moe_utils.MoEAuxLossAutoScaler
    scale = scaler.main_loss_backward_scale
    try:
        yield
    finally:
        scaler.main_loss_backward_scale = scale
        for name in [name for name in logged if name not in before]:
            del logged[name]
        with torch.no_grad():
            for name, (entry, values) in before.items():
                logged[name].update(entry)
                logged[name]["values"].copy_(values)


def _logged_losses(moe_utils: Any) -> dict[str, dict[str, Any]]:
    """{name: {"values": a sum for each layer, ...}}; parallel_state has it in releases before it moved."""
    from megatron.core import parallel_state

    owner = moe_utils if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker") else parallel_state
    return owner.get_moe_layer_wise_logging_tracker()
