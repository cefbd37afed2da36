"""The job: the one place that knows the config, the blocks that were adopted, and how to let go of them.

A process has one job, made when the first block is found in a config or by :func:`apply`, ended by :func:`remove`.
Adopting a ``TransformerBlock`` checks everything that can be known from the model and compares it between the ranks of
the tensor-parallel group through the store; nothing runs yet.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import compat
from .board import Board
from .config import MegatronExtConfig, parse_block
from .locate import Located, locate
from .rank_memory import RankMemory
from .recompute.planning_group import planning_group
from .recompute.recomputation import Recomputation
from .sequence_parallel import switch
from .sequence_parallel.block_policy import BlockPolicy, Surroundings, blocks_of
from .sequence_parallel.micro_batch import MicroBatch
from .sequence_parallel.names import NATIVE
from .sequence_parallel.saved_profiles import SavedProfiles
from .sequence_parallel.stopwatch import Stopwatch
from .speakers import speaks_for_job
from .telemetry import Phase, StartFacts, Telemetry, layers_by_strategy

logger = logging.getLogger("megatron_ext")

_numbers = itertools.count()


class Job:
    """What one config does in this process."""

    def __init__(self, located: Located):
        self.located = located
        self.config: MegatronExtConfig = parse_block(located.block)
        self.telemetry = Telemetry(self.config.log)
        self._number = next(_numbers)
        self.memory = RankMemory(self.config.memory, _ranks_on_node())
        self.recomputation = self._recomputation()
        path = self.config.sequence_parallel.cost_model.save
        self._profiles = SavedProfiles(path, self.telemetry, f"megatron_ext/{self._number}")
        self._policies: dict[nn.Module, BlockPolicy] = {}
        self._stopwatch = Stopwatch()
        self._has_compared = False
        """Whether ranks that hold one recomputation plan have compared their settings."""
        self.on_close = contextlib.ExitStack()
        """What else must be taken out with the job."""
        atexit.register(self._stopwatch.poll)  # before the telemetry's own, which was registered first

    @property
    def blocks(self) -> list[nn.Module]:
        """Adopted blocks, in the order in which they were found."""
        return list(self._policies)

    def adopt(self, block: nn.Module) -> None:
        """Let plans decide for this block. Raises ValueError where the model and the config cannot work together."""
        self._compare_recompute(block)
        if not self.config.sequence_parallel.enabled and self.recomputation is None:
            return
        compat.check()
        self.memory.add(block)
        if speaks_for_job(block):
            self.telemetry.become_writer()
        self._adopt_strategies(block)
        if self.recomputation is not None:
            self.recomputation.adopt(block, self._board(block, "recompute", planning_group(block)))

    def adopt_model(self, model: nn.Module) -> None:
        """The same for all blocks of a model that is built already."""
        for block in blocks_of(model):
            self.adopt(block)
        from megatron.core.models.gpt.gpt_model import GPTModel

        self.memory.add(model)
        for module in model.modules():
            if isinstance(module, GPTModel):
                tell_of(self, module)

    def _adopt_strategies(self, block: nn.Module) -> None:
        if block in self._policies or not self.config.sequence_parallel.enabled:
            return
        if not _can_switch(block):
            return
        policy = BlockPolicy(self._surroundings(block))
        attached = switch.attach(block, policy)
        try:
            policy.attached(attached)
            self._board(block).compare("the start", self._facts(block, policy))
        except (ValueError, RuntimeError):
            switch.detach(block)
            raise
        attached.begun, attached.finished = self._begun, self._finished
        self._policies[block] = policy
        if len(self._policies) == 1:
            self.telemetry.start(self._start_facts(block, policy))
        for number, reasons in attached.refusals().items():
            logger.warning("megatron_ext: layer %s stays with %s: %s", number, NATIVE, "; ".join(reasons))

    def set_vocabulary(self, block: nn.Module, size: int) -> None:
        """How many logits the tensor-parallel group computes for a token at the end of this block."""
        if block in self._policies:
            self._policies[block].vocabulary = size

    def close(self) -> None:
        """Give all blocks back as they were."""
        for block in self._policies:
            switch.detach(block)
        self._policies.clear()
        if self.recomputation is not None:
            self.recomputation.close()
        self._profiles.gather()
        self.on_close.close()
        self._stopwatch.poll()
        atexit.unregister(self._stopwatch.poll)
        self.telemetry.close()

    def _surroundings(self, block: nn.Module) -> Surroundings:
        return Surroundings(
            self.config,
            self.telemetry,
            self._profiles,
            self._board(block),
            self.memory,
            self._layers_recomputed,
        )

    def _compare_recompute(self, block: nn.Module) -> None:
        """Once, on every rank that has a job, also one that recomputes nothing by plan: the others would wait for it in
        a collective. Limits may differ, and so may the file that one rank writes."""
        if self._has_compared or not dist.is_initialized():
            return
        settings = self.config.recompute
        fact: dict[str, Any] = {"enabled": False}
        if settings is not None and settings.enabled:
            fact = settings.model_dump(mode="json", exclude={"plan": {"save"}})
        board = self._board(block, "settings", planning_group(block))
        board.compare_with_first("the recompute settings", _by_key(fact, "megatron_ext.recompute"))
        self._has_compared = True

    def _layers_recomputed(self, block: nn.Module) -> tuple[int, ...] | None:
        return None if self.recomputation is None else self.recomputation.layers_recomputed(block)

    def _recomputation(self) -> Recomputation | None:
        settings = self.config.recompute
        if settings is None or not settings.enabled:
            return None
        return Recomputation(settings, self.memory, self.telemetry, f"megatron_ext/{self._number}")

    @contextlib.contextmanager
    def step(self, micro_batches: int) -> Iterator[None]:
        """Around one training step that Megatron-core's schedule runs on this rank."""
        with self.memory.step():
            if self.recomputation is None or not self.recomputation.plans:
                yield
            else:
                with self.recomputation.step(micro_batches):
                    yield
        self._profiles.gather()

    def evaluation(self) -> AbstractContextManager[None]:
        """Around a pass of the schedule that runs nothing backward."""
        return contextlib.nullcontext() if self.recomputation is None else self.recomputation.evaluation()

    def forward_begins(self) -> None:
        """One forward pass of the schedule."""
        if self.recomputation is not None:
            self.recomputation.forward_begins()

    def forward_ended(self) -> None:
        """It has ended."""
        if self.recomputation is not None:
            self.recomputation.forward_ended()

    def _board(self, block: nn.Module, what: str = "strategies", group: Any = None) -> Board:
        """`group`: whose ranks tell each other, the tensor-parallel one where it is None."""
        from ds_grass.agreement import default_store

        ranks = dist.get_process_group_ranks(group or switch.group_of(block))
        place = len(self._policies)
        return Board(
            default_store(), ranks, _rank(), f"megatron_ext/{self._number}/{what}/{ranks[0]}/{place}"
        )

    def _facts(self, block: nn.Module, policy: BlockPolicy) -> dict[str, Any]:
        return {
            "versions": _versions(),
            **_by_key(self.config.model_dump(mode="json", exclude={"log"}), "megatron_ext"),
            "layers": [layer.layer_number for layer in block.layers],
            "refused strategies": policy.refused(),
        }

    def _start_facts(self, block: nn.Module, policy: BlockPolicy) -> StartFacts:
        from megatron.core import parallel_state

        refused = policy.refused()
        settings = self.config.sequence_parallel
        wanted = [settings.strategy] if settings.strategy else settings.strategies
        source = settings.cost_model.load or ("none" if settings.strategy else "a profile at start")
        return StartFacts(
            source=str(self.located),
            config=self.config.model_dump(mode="json"),
            versions=_versions(),
            world_size=dist.get_world_size(),
            tensor_parallel=switch.group_of(block).size(),
            pipeline_parallel=parallel_state.get_pipeline_model_parallel_world_size(),
            data_parallel=parallel_state.get_data_parallel_world_size(),
            num_layers=len(block.layers),
            allowed=tuple(name for name in wanted if name not in refused),
            refused=refused,
            limit_bytes=self.memory.limit(),
            cost_model=f"{settings.cost_model.kind}, from {source}",
        )

    def counters(self) -> dict[str, dict[int, dict[str, int]]]:
        """What ran on this rank: :meth:`megatron_ext.telemetry.Counters.snapshot`."""
        self._stopwatch.poll()
        return self.telemetry.counters.snapshot()

    def _begun(self, micro_batch: MicroBatch, block_input: torch.Tensor) -> None:
        self._stopwatch.poll()

        def finished(seconds: float, peak_bytes: int | None) -> None:
            self._count(micro_batch, "recomputed")
            for name, layers in layers_by_strategy(micro_batch.names).items():
                self.telemetry.counters.count(name, micro_batch.length, "backward", layers)
            self.telemetry.ran(
                micro_batch.batch,
                micro_batch.length,
                micro_batch.names,
                seconds=seconds,
                peak_bytes=peak_bytes,
            )

        micro_batch.run = self._stopwatch.start(block_input.device, finished)

    def _finished(self, micro_batch: MicroBatch, block_input: torch.Tensor, output: torch.Tensor) -> None:
        # The run's callback holds the micro-batch: as a cycle they would keep masks and tables until a collection.
        run, micro_batch.run = micro_batch.run, None
        run.forward_ended(block_input, output)
        self._count(micro_batch, "forward")

    def _count(self, micro_batch: MicroBatch, phase: Phase) -> None:
        for (counted, name), calls in micro_batch.calls.items():
            if counted == phase:
                self.telemetry.counters.count(name, micro_batch.length, phase, calls)


_job: Job | None = None
_looked = False


def running() -> Job | None:
    """The process's job where there is one already."""
    return _job


def current() -> Job | None:
    """The process's job; the first call looks for a block in the config that the process was started with."""
    global _job, _looked
    if not _looked:
        _looked = True
        located = locate()
        _job = None if located is None else Job(located)
    return _job


def apply(config: Any, model: nn.Module | None = None) -> Job | None:
    """Use this ds_config, a file name or a dict, for transformer blocks built from now on and for those of `model`.

    None where it has no ``megatron_ext`` block. A job that is running is ended first. Raises ValueError.
    """
    global _job, _looked
    remove()
    located = locate(config)
    _job, _looked = (None if located is None else Job(located)), True
    if _job is not None and model is not None:
        _job.adopt_model(model)
    return _job


def remove() -> None:
    """End the job, and look for no other: Megatron-core's modules and functions are as if there had never been one."""
    global _job, _looked
    job, _job, _looked = _job, None, True
    if job is not None:
        job.close()


def tell_of(found: Job, model: nn.Module) -> None:
    """What only a GPTModel knows: weights outside of the block, and how many logits its last stage computes."""
    found.memory.add(model)
    if model.post_process and hasattr(model, "decoder"):
        found.set_vocabulary(model.decoder, model.vocab_size)


def _can_switch(block: nn.Module) -> bool:
    """Whether there is anything to switch; ValueError where there is but the script's settings forbid it."""
    if not len(block.layers):
        return False  # a pipeline stage of its own for the embedding or the loss
    config = block.config
    size = switch.group_of(block).size()
    if size == 1:
        logger.warning(
            "megatron_ext: tensor_model_parallel_size is 1, so there is no group to spread a sequence over"
        )
        return False
    if not config.sequence_parallel:
        raise ValueError(
            f"megatron_ext.sequence_parallel needs Megatron-core's own sequence parallelism, but sequence_parallel is "
            f"False with tensor_model_parallel_size {size}; allowed: True; give the script --sequence-parallel, or "
            'write "enabled": false in megatron_ext.sequence_parallel'
        )
    if config.context_parallel_size > 1:
        raise ValueError(
            f"megatron_ext.sequence_parallel spreads sequences over the tensor-parallel group, but "
            f"context_parallel_size is {config.context_parallel_size}; allowed: 1; use those ranks for "
            'tensor_model_parallel_size, or write "enabled": false in megatron_ext.sequence_parallel'
        )
    return True


def _by_key(block: dict[str, Any], path: str) -> dict[str, Any]:
    """{dotted key: value}, so that one that differs is named."""
    found = {}
    for key, value in block.items():
        inside = f"{path}.{key}"
        found |= _by_key(value, inside) if isinstance(value, dict) else {inside: value}
    return found


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from ds_grass import __version__

    return {"ds-grass": __version__, "torch": torch.__version__, "megatron-core": version("megatron-core")}


def _ranks_on_node() -> int:
    from ds_grass.agreement import ranks_on_node

    return ranks_on_node() or (dist.get_world_size() if dist.is_initialized() else 1)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
