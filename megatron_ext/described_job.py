"""A job to plan: a model on a cluster with a ``megatron_ext`` block, and what one rank of it holds.

Contract: numbers only. The states are those of Megatron-core's distributed optimizer in bf16 training: bf16 weights,
fp32 gradients, and a share of fp32 AdamW. Not covered: pipelines, other than by the layers of one stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_ext.config import MegatronExtConfig
from megatron_ext.described_model import DescribedModel
from megatron_ext.sequence_parallel.cluster import Cluster
from megatron_ext.sequence_parallel.layer_shape import LayerShape
from megatron_ext.sequence_parallel.memory_forms import logits_bytes

_ELEMENT_BYTES, _GRADIENT_BYTES, _OPTIMIZER_BYTES = 2, 4, 12


@dataclass(frozen=True)
class Job:
    """What is planned for."""

    model: DescribedModel
    cluster: Cluster
    config: MegatronExtConfig
    group_size: int
    """Ranks of a tensor-parallel group."""
    micro_batch: int
    num_layers: int
    """On one rank."""

    @cached_property
    def shape(self) -> LayerShape:
        return self.model.shape(self.group_size, _ELEMENT_BYTES)

    @property
    def data_parallel(self) -> int:
        """Groups that train the same layers on other sequences."""
        return self.cluster.replicas * (self.cluster.group_size // self.group_size)

    @property
    def limit_bytes(self) -> int:
        """Of one rank's device, for all that the job holds there."""
        memory = self.config.memory
        return memory.limit or int(memory.fraction * self.cluster.memory_bytes)

    @property
    def state_bytes(self) -> int:
        """Of one rank: weights, gradients, and its share of the optimizer."""
        each = _ELEMENT_BYTES + _GRADIENT_BYTES + _OPTIMIZER_BYTES / self.data_parallel
        return int(each * self.model.rank_parameters(self.group_size, self.num_layers))

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those that the config allows and the heads do not forbid."""
        block = self.config.sequence_parallel
        asked = (block.strategy,) if block.strategy else tuple(block.strategies)
        return tuple(name for name in asked if self.shape.obstacle_of_heads(name) is None)

    @property
    def refused(self) -> dict[str, str]:
        """Strategy -> why the model cannot run it here."""
        obstacles = {
            name: self.shape.obstacle_of_heads(name) for name in self.config.sequence_parallel.strategies
        }
        return {name: reason for name, reason in obstacles.items() if reason is not None}

    def outside_bytes(self, batch: int, length: int) -> int:
        """Of the logits."""
        return logits_bytes(-(-batch * length // self.group_size), self.model.vocab_size, _ELEMENT_BYTES)


def make_job(
    model: DescribedModel,
    cluster: Cluster,
    config: MegatronExtConfig,
    *,
    group_size: int,
    micro_batch: int = 1,
    num_layers: int | None = None,
) -> Job:
    """A job that can be planned. ValueError names the option that makes it impossible."""
    if cluster.group_size % group_size:
        raise ValueError(
            f"--tp is {group_size} but {cluster.name} has {cluster.group_size} ranks that are linked as described; "
            f"allowed: a divisor of {cluster.group_size}"
        )
    job = Job(model, cluster, config, group_size, micro_batch, num_layers or model.num_layers)
    if not job.strategies:
        reasons = "; ".join(job.refused.values())
        raise ValueError(f"--tp is {group_size}, with which no strategy that is allowed can run: {reasons}")
    if job.state_bytes >= job.limit_bytes:
        raise ValueError(
            f"weights, gradients and optimizer of {job.num_layers} layers take {job.state_bytes / 1e9:.1f} GB of a "
            f"rank, and its limit is {job.limit_bytes / 1e9:.1f} GB; allowed: less; use a larger --tp, or --layers "
            "for the layers of one pipeline stage"
        )
    return job
