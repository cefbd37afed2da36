"""The ``megatron_ext`` block of ds_config.json: its keys, its rules, and the one line said when it is wrong.

Contract: :func:`parse_block` turns the block into a frozen :class:`MegatronExtConfig` or raises ``ValueError`` with
a single line, as :mod:`ds_grass.block` has it. ``null`` means that the package decides and prints what it decided.
Not covered: which file holds the block (:mod:`megatron_ext.locate`), and whatever it takes a model, a group or a
device to know, such as a strategy that a model cannot run.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ds_grass.block import Block, FileName, distinct, fingerprint, key, parse
from ds_grass.telemetry.human import parse_bytes
from megatron_ext.sequence_parallel.names import STRATEGIES

__all__ = ["MegatronExtConfig", "fingerprint", "parse_block"]

NAME = "megatron_ext"
"""What ds_config calls the block."""


def _bytes(value: Any) -> Any:
    """A size such as "80GB" as an integer of bytes; everything else as it is, for the strict type to judge."""
    if not isinstance(value, str):
        return value
    number = parse_bytes(value)
    if number is None:
        raise ValueError("not a size")
    return number


def _known(name: str) -> str:
    if name not in STRATEGIES:
        raise ValueError("not a strategy")
    return name


def _module_name(name: str) -> str:
    if name == "auto" or not name.isidentifier():
        raise ValueError("not the name of a module")
    return name


_QUOTED = ", ".join(f'"{name}"' for name in STRATEGIES)
Bytes = Annotated[int, BeforeValidator(_bytes)]
Strategy = Annotated[str, AfterValidator(_known)]
Strategies = Annotated[list[Strategy], Field(min_length=1), AfterValidator(distinct)]
ModuleNames = Annotated[
    list[Annotated[str, AfterValidator(_module_name)]], Field(min_length=1), AfterValidator(distinct)
]


class MemoryConfig(Block):
    """What a rank may take of its device, for all that the job holds there."""

    limit: Bytes | None = key(
        None,
        'bytes as an integer above 0, a size such as "80GB" (80e9 bytes) or "80GiB" (80 x 2^30), or null',
        write='null or "80GB"',
        ge=1,
        le=sys.maxsize,
    )
    """Bytes. null: `fraction` of the memory of the device; on the CPU, of what is available to this rank."""

    fraction: float = key(0.92, "a number above 0 and at most 1", gt=0, le=1)
    """Of the memory of the device. Without effect where `limit` is given."""


class CostModelConfig(Block):
    """Where the planner's times and bytes come from."""

    kind: Literal["analytical", "forest"] = key("analytical", '"analytical" or "forest"')
    """`analytical`: closed forms of each strategy's work and traffic, fitted to a few measurements. `forest`: a random
    forest and polynomials as in the paper, which need more of them (and scikit-learn)."""

    load: FileName | None = key(None, "a file name or null", write='null or "cost_model.json"')
    """Measurements saved by an earlier job on the same machine, of every shape of layer. null: a short profile at the
    start of this one."""

    save: FileName | None = key(None, "a file name or null", write='null or "cost_model.json"')
    """Where to save this job's measurements of the layers of all stages, as JSON. null: nowhere."""


class SequenceParallelConfig(Block):
    """How sequences are cut over the tensor-parallel group, chosen anew for every micro-batch."""

    enabled: bool = key(True, "true or false")
    """false: Megatron-core runs its own layers. The block is still checked."""

    strategy: Strategy | None = key(
        None, f"one of megatron_ext.sequence_parallel.strategies ({_QUOTED}) or null"
    )
    """Use this one for every length and layer. null: the planner chooses the fastest that fits in memory."""

    strategies: Strategies = key(
        list(STRATEGIES),
        f"a list of different ones of {_QUOTED}, at least one",
        write=json.dumps(list(STRATEGIES)),
    )
    """What the planner may choose from. `megatron_ts` is Megatron-core's own code. What the model cannot run
    (`metp` with fewer KV heads than ranks) is left out, with the reason in the log."""

    granularity: Literal["layer", "model"] = key("layer", '"layer" or "model"')
    """`layer`: layers may differ. `model`: all layers of a micro-batch use one strategy."""

    smoothing: float = key(0.02, "a number from 0 to 1", ge=0, le=1)
    """The plan of the length before is kept where it fits and is slower than the best by at most this share. 0: always
    the best."""

    cost_model: CostModelConfig = key(CostModelConfig(), "an object", write="{}")
    """See :class:`CostModelConfig`."""

    @model_validator(mode="after")
    def _check_keys_together(self) -> SequenceParallelConfig:
        if self.strategy is not None and self.strategy not in self.strategies:
            allowed = ", ".join(f'"{name}"' for name in self.strategies)
            raise ValueError(
                f'megatron_ext.sequence_parallel.strategy is "{self.strategy}", which is not among '
                f"megatron_ext.sequence_parallel.strategies; allowed: {allowed} or null; "
                f'write "strategies": {json.dumps([*self.strategies, self.strategy])}, or another strategy'
            )
        return self


class RecomputePlanConfig(Block):
    """Files that hold which layers each stage recomputes."""

    load: FileName | None = key(None, "a file name or null", write='null or "recompute_plan.json"')
    """null: the plan is made at start."""

    save: FileName | None = key(
        "recompute_plan.json", "a file name or null", write='"recompute_plan.json" or null'
    )
    """null: the plan is not kept."""


class RecomputeConfig(Block):
    """How much of its activations each pipeline stage recomputes in backward."""

    enabled: bool = key(True, "true or false")
    """false: what the script itself asks Megatron-core for."""

    policy: Literal["stage_aware", "merak", "level", "uniform", "none"] = key(
        "stage_aware", '"stage_aware", "merak", "level", "uniform" or "none"'
    )
    """`stage_aware`: as little as each stage's measured memory allows. `merak`: the ratio rule of arXiv 2206.04959.
    `level`, `uniform`: `ratio` falling from stage to stage, or alike on all. `none`: nothing is recomputed."""

    ratio: float | None = key(None, "a number from 0 to 1, or null", write="null or 0.5", ge=0, le=1)
    """Share of the first stage's layers that is recomputed. Needed by `merak`, `level` and `uniform` and by no
    other."""

    modules: ModuleNames | None = key(
        None, "a list of different names of modules, or null", write='null or a list such as ["core_attn"]'
    )
    """Parts of a layer that `stage_aware` may recompute by themselves, by Megatron-core's names: `core_attn`,
    `layernorm`, `mlp`, `mla_up_proj`, `moe`, `moe_act`, `shared_experts`. One that the model cannot recompute by itself
    is refused with the reason. null: all that it can."""

    plan: RecomputePlanConfig = key(RecomputePlanConfig(), "an object", write="{}")
    """See :class:`RecomputePlanConfig`."""

    @model_validator(mode="after")
    def _check_keys_together(self) -> RecomputeConfig:
        needs_ratio = self.policy in ("merak", "level", "uniform")
        if needs_ratio and self.ratio is None:
            raise ValueError(
                f'megatron_ext.recompute.ratio is None but megatron_ext.recompute.policy is "{self.policy}", which '
                'needs it; allowed: a number from 0 to 1; write "ratio": 0.5'
            )
        if not needs_ratio and self.ratio is not None:
            raise ValueError(
                f'megatron_ext.recompute.ratio is {self.ratio} but megatron_ext.recompute.policy is "{self.policy}", '
                'which has no ratio; allowed: null; write "ratio": null, or the policy "merak", "level" or "uniform"'
            )
        return self


class LogConfig(Block):
    """The record of plans and of what they took, one JSON object a line, written by the first rank of the first
    pipeline stage that has layers: rank 0 of the world, but for a stage of only the embedding."""

    enabled: bool = key(True, "true or false")
    """Write the log."""

    path: FileName | None = key(None, "a file name or null", write='null or "megatron_ext.jsonl"')
    """null: megatron_ext.jsonl in the working directory of the rank that writes. Without effect when `enabled` is
    false."""


class MegatronExtConfig(Block):
    """The whole block."""

    memory: MemoryConfig = key(MemoryConfig(), "an object", write="{}")
    """See :class:`MemoryConfig`."""

    sequence_parallel: SequenceParallelConfig = key(SequenceParallelConfig(), "an object", write="{}")
    """See :class:`SequenceParallelConfig`."""

    recompute: RecomputeConfig | None = key(None, "an object or null", write='{"enabled": false}')
    """See :class:`RecomputeConfig`. null or left out: what the script itself asks Megatron-core for."""

    log: LogConfig = key(LogConfig(), "an object", write="{}")
    """See :class:`LogConfig`."""


def parse_block(block: object) -> MegatronExtConfig:
    """The parsed ``megatron_ext`` block. Raises ``ValueError`` with one line about the first key that is wrong."""
    return parse(block, MegatronExtConfig, NAME, '{"sequence_parallel": {"strategy": null}}')
