"""What a layer costs where the script itself recomputes it: Megatron-core's ``recompute_granularity="full"``.

Kept is the input of the layers that are recomputed together; in backward all of them are there once more, and their
forward is paid twice. Forward is a third of forward and backward: matrices are multiplied once there and twice in
backward. Contract: pure. Not covered: selective recomputation, whose modules keep a little less than is planned for.
"""

from __future__ import annotations

from typing import Any

from .cost_model import Cost
from .layer_shape import LayerShape

FORWARD_SHARE = 1 / 3


def layers_together(config: Any, num_layers: int) -> tuple[int, ...]:
    """For each layer of a block, how many are recomputed with it, itself included; 0 where it is not recomputed."""
    if getattr(config, "recompute_granularity", None) != "full":
        return (0,) * num_layers
    if config.recompute_method == "block":
        return tuple(int(place < config.recompute_num_layers) for place in range(num_layers))
    return (min(config.recompute_num_layers, num_layers),) * num_layers


def recomputed_cost(cost: Cost, shape: LayerShape, tokens: int, together: int) -> Cost:
    """`cost` of a layer that is recomputed with `together - 1` others; `tokens` of the whole group."""
    layer_input = tokens // shape.group_size * shape.hidden_size * shape.element_bytes
    return Cost(
        cost.seconds * (1 + FORWARD_SHARE),
        layer_input // together,
        together * cost.kept_bytes + cost.transient_bytes,
    )
