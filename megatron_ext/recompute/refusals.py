"""What recomputation cannot run beside, or cannot do: a ValueError before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ds_grass.telemetry.human import human_bytes

from .layer_loop import obstacle
from .plan import KEY, ChunkPlan, load_plan, parse_choice
from .sizes import Size
from .stage import least_peak
from .stage_memory import StageProblem

_KEYS = (
    "fp8",
    "fp4",
    "cpu_offloading",
    "fine_grained_activation_offloading",
    "overlap_moe_expert_parallel_comm",  # runs parts of layers by itself, and no block
    "hybrid_context_parallel",  # ranks of one stage run different numbers of sequences in a micro-batch
    "enable_cuda_graph",
    "external_cuda_graph",
    "cuda_graph_impl",
)


def check_config(config: Any) -> None:
    """`config`: the model's TransformerConfig."""
    for key in _KEYS:
        given = getattr(config, key, None)
        if given and given != "none":
            raise ValueError(
                f"megatron_ext.recompute cannot run layers under {key}, which the script's config sets to {given!r}; "
                f'write "recompute": {{"enabled": false}}, or leave {key} out'
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


def plans_of_file(
    path: str, layers: Sequence[Sequence[int]], stage: int, blocks: Iterable[nn.Module]
) -> list[ChunkPlan]:
    """The plans that a file has for the blocks of `stage`; `layers`: how many each chunk of each stage has."""
    chunks = {(place, n): count for place, counts in enumerate(layers) for n, count in enumerate(counts)}
    plan = load_plan(path, chunks)
    plans = []
    for number, block in enumerate(blocks):
        plans.append(plan.chunks[stage, number])
        check_plan(plans[-1], block.layers, path)
    return plans


def nothing_fits(problem: StageProblem, unforeseen_bytes: int, stage: int, largest: Size) -> str:
    """What a stage would need that exceeds its limit with everything recomputed; `largest`: planned for;
    `unforeseen_bytes`: of the problem's static ones."""
    needed = human_bytes(least_peak(problem))
    there = f"{human_bytes(problem.static_bytes - unforeseen_bytes)} of it weights, gradients and optimizer states"
    if unforeseen_bytes:
        there += f", {human_bytes(unforeseen_bytes)} more than was predicted in a step that ran"
    return (
        f"megatron_ext.recompute: stage {stage} needs {needed} with every layer recomputed "
        f"({there}) for micro-batches of "
        f"{largest.batch} x {largest.length} tokens, but megatron_ext.memory allows "
        f"{human_bytes(problem.limit_bytes)}; give it {needed} or more, or use smaller micro-batches, shorter "
        "sequences, more pipeline stages or more tensor-parallel ranks"
    )
