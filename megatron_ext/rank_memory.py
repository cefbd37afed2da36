"""What this rank holds besides activations, and how much it may hold: one account for all features of a job.

On a GPU the device counts: what is allocated when a step begins, between the activations of one step and of the next.
Optimizer states that the first step will make are not there yet and are counted at 12 bytes a parameter: an fp32 copy
and Adam's two moments, not divided over data-parallel ranks, as nothing here says that they are. From the second step
on what is allocated is the truth, so whoever plans in the first step looks again. On a CPU nothing counts, so all is
counted by parameter.

A limit that is known better than a share of the device is written down: ``megatron_ext.memory.limit``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .config import MemoryConfig

STATE_BYTES = 12
"""A parameter's optimizer state: fp32 master copy, first and second moment."""


class RankMemory:
    """Bytes of this rank, of all models that it has been told of."""

    def __init__(self, config: MemoryConfig, ranks_on_node: int):
        self._config, self._ranks_on_node = config, ranks_on_node
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._engines: list[_EngineSteps] = []
        self._ended = 0
        self._at_start: int | None = None
        """Allocated on the device when the step began that is running."""
        self._to_come = 0
        """What was not there then and will be: gradients, and the states that the first step makes."""
        self._gradients: int | None = None
        """Held when the last step ended, outside of Megatron-core's buffers; None before there was one."""

    def add(self, module: nn.Module) -> None:
        """A model or a part of one; parameters that are known already do not count again."""
        self._modules.add(module)

    def count_steps_of(self, engine: Any) -> None:
        """A DeepSpeed engine, which runs its steps without Megatron-core's schedules."""
        self._engines.append(_EngineSteps(engine))

    @property
    def steps_ended(self) -> int:
        """In this process."""
        return self._ended + sum(engine.ended() for engine in self._engines)

    @property
    def device(self) -> torch.device:
        """Of the parameters; the CPU where there is none."""
        found = next((p for module in self._modules for p in module.parameters()), None)
        return torch.device("cpu") if found is None else found.device

    @property
    def device_counts(self) -> bool:
        """Whether what is held is measured, not added up."""
        return self.device.type == "cuda"

    def limit(self) -> int:
        """Bytes that this rank may hold. A share is of what others than PyTorch (its context, NCCL) leave of a device,
        and on a CPU of what is available now."""
        config = self._config
        if config.limit is not None:
            return config.limit
        if self.device_counts:
            free, total = torch.cuda.mem_get_info(self.device)
            of_others = max(0, total - free - torch.cuda.memory_reserved(self.device))
            return int(config.fraction * (total - of_others))
        from ds_grass.host_memory import available_bytes

        available = available_bytes()
        if available is None:
            raise ValueError(
                "megatron_ext.memory.limit is None but this machine does not say how much memory is available; "
                'write a size such as "limit": "16GB"'
            )
        return int(config.fraction * available / self._ranks_on_node)

    def static(self) -> int:
        """Weights, gradients, optimizer states: what is there whatever the sequence."""
        if not self.device_counts:
            return bytes_by_parameter(self._parameters())
        if self._at_start is not None:
            return self._at_start + self._to_come
        return torch.cuda.memory_allocated(self.device) + self._not_there_yet()

    def room(self) -> int:
        """Bytes that may be taken now, before what is to come is there."""
        held = torch.cuda.memory_allocated(self.device) if self.device_counts else self.static()
        return max(0, self.limit() - held)

    def held_since_start(self) -> int:
        """On the device, by what the step that is running has done so far."""
        assert self._at_start is not None
        return torch.cuda.memory_allocated(self.device) - self._at_start

    @property
    def in_step(self) -> bool:
        """Whether a step is running whose start the device has counted."""
        return self._at_start is not None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around forward and backward of each step that a schedule of Megatron-core's runs."""
        if self.device_counts:
            self._at_start = torch.cuda.memory_allocated(self.device)
            self._to_come = self._not_there_yet()
        try:
            yield
            if self._at_start is not None:
                self._gradients = self._gradients_held()
            self._ended += 1
        finally:
            self._at_start = None

    @contextmanager
    def stays(self) -> Iterator[None]:
        """What the device still holds after this was not there before, but is nobody's activation: workspaces."""
        before = torch.cuda.memory_allocated(self.device) if self.in_step else 0
        yield
        if self._at_start is not None:
            self._at_start += torch.cuda.memory_allocated(self.device) - before

    def _not_there_yet(self) -> int:
        """As many gradients as the last step left. Before it: those of all that trains, and until a step has ended
        optimizer states, which a job that goes on from a checkpoint has already: they count twice until then."""
        if self._gradients is not None:
            return max(0, self._gradients - self._gradients_held())
        trained = [p for p in self._parameters(in_training=True) if p.requires_grad]
        without = (p for p in trained if p.grad is None and not hasattr(p, "main_grad"))
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in without)
        states = 0 if self.steps_ended else STATE_BYTES * sum(parameter.numel() for parameter in trained)
        return gradients + states

    def _gradients_held(self) -> int:
        held = (p.grad for p in self._parameters() if p.grad is not None and not hasattr(p, "main_grad"))
        return sum(gradient.numel() * gradient.element_size() for gradient in held)

    def _parameters(self, *, in_training: bool = False) -> Iterator[nn.Parameter]:
        """Each once. `in_training`: not of models that only evaluate, such as the reference of a reward."""
        modules = (module for module in self._modules if module.training or not in_training)
        found = {id(p): p for module in modules for p in module.parameters()}
        return iter(found.values())


class _EngineSteps:
    """Optimizer steps of an engine since it was first asked: a checkpoint brings the steps of the job before."""

    def __init__(self, engine: Any):
        self._engine = weakref.ref(engine)
        self._before: int | None = None
        self._last = 0

    def ended(self) -> int:
        engine = self._engine()
        if engine is not None:
            if self._before is None:
                self._before = engine.global_steps
            self._last = engine.global_steps - self._before
        return self._last


def bytes_by_parameter(parameters: Iterable[nn.Parameter]) -> int:
    """Weights, gradients of the same type, and optimizer states of those that train."""
    return sum(
        p.numel() * (p.element_size() * (1 + p.requires_grad) + STATE_BYTES * p.requires_grad)
        for p in parameters
    )
