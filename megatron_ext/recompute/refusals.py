"""What recomputation cannot run beside, or cannot do: a ValueError before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .layer_loop import obstacle
from .plan import KEY, ChunkPlan, parse_choice

_KEYS = (
    "fp8",
    "fp4",
    "cpu_offloading",
    "fine_grained_activation_offloading",
    "overlap_moe_expert_parallel_comm",  # runs parts of layers by itself, and no block
    "enable_cuda_graph",
    "external_cuda_graph",
    "cuda_graph_impl",
)
_SPREAD = ("context_parallel_size", "expert_model_parallel_size")
"""So spread, a layer talks to ranks that plan by themselves, and would talk to them again in backward."""


def check_config(config: Any, *, is_measured: bool) -> None:
    """`config`: the model's TransformerConfig. `is_measured`: whether plans follow from what a rank measures."""
    for key in _KEYS:
        given = getattr(config, key, None)
        if given and given != "none":
            raise ValueError(
                f"megatron_ext.recompute cannot run layers under {key}, which the script's config sets to {given!r}; "
                f'write "recompute": {{"enabled": false}}, or leave {key} out'
            )
    for key in _SPREAD if is_measured else ():
        given = getattr(config, key, 1)
        if given > 1:
            raise ValueError(
                'megatron_ext.recompute.policy is "stage_aware", which plans each tensor-parallel group by itself, but '
                f"{key} is {given}: groups that recompute together would differ; allowed: 1, a policy that measures "
                'nothing ("uniform", "level", "merak", "none"), or plan.load'
            )


def check_plan(plan: ChunkPlan, layers: Sequence[nn.Module], path: str) -> None:
    """Whether these layers can do what the file at `path` says."""
    for place, layer in enumerate(layers):
        share = plan.share
        choices = (plan.layers[place], *([share.choice] if share and share.layer == place else []))
        for module in dict.fromkeys(module for choice in choices for module in parse_choice(choice)):
            reason = obstacle(layer, module)
            if reason is not None:
                raise ValueError(
                    f"{KEY} is {path!r}, which recomputes {module} of layer {layer.layer_number}, but {reason}; save a "
                    "new plan"
                )
