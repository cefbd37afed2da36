"""What this rank holds besides activations, and how much it may hold: one account for all features of a job.

On a GPU the device counts: what is allocated when a step begins, between the activations of one step and of the next.
Optimizer states that the first step will make are not there yet and are counted at 12 bytes a parameter: an fp32 copy
and Adam's two moments, not divided over data-parallel ranks, as nothing here says that they are. From the second step
on what is allocated is the truth, so whoever plans in the first step looks again. On a CPU nothing counts, so all is
counted by parameter.

A limit that is known better than a share of the device is written down: ``megatron_ext.memory.limit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .config import MemoryConfig

STATE_BYTES = 12
"""A parameter's optimizer state: fp32 master copy, first and second moment."""


class RankMemory:
    """Bytes of this rank, of all models that it has been told of."""

    def __init__(self, config: MemoryConfig, ranks_on_node: int):
        self._config, self._ranks_on_node = config, ranks_on_node
        self._modules: list[nn.Module] = []
        self._ended = 0
        self._ended_elsewhere: Callable[[], int] = lambda: 0
        self._at_start: int | None = None
        """Allocated on the device when the step began that is running."""
        self._to_come = 0
        """Gradients that were not there then, and the states that the first step makes."""

    def add(self, module: nn.Module) -> None:
        """A model or a part of one; parameters that are known already do not count again."""
        self._modules.append(module)

    def count_steps(self, ended: Callable[[], int]) -> None:
        """Where no schedule of Megatron-core's runs the steps: what tells how many have ended."""
        self._ended_elsewhere = ended

    @property
    def steps_ended(self) -> int:
        """Since the job began."""
        return self._ended + self._ended_elsewhere()

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(p for module in self._modules for p in module.parameters()).device

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
        """Around each step."""
        if self._modules and self.device_counts:
            self._at_start = torch.cuda.memory_allocated(self.device)
            self._to_come = self._not_there_yet()
        try:
            yield
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
        """Gradients of parameters that have neither one nor a place in Megatron-core's buffers; until a step has ended,
        optimizer states, which a job that goes on from a checkpoint has already: they count twice until then."""
        trained = [parameter for parameter in self._parameters() if parameter.requires_grad]
        without = (p for p in trained if p.grad is None and not hasattr(p, "main_grad"))
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in without)
        states = 0 if self.steps_ended else STATE_BYTES * sum(parameter.numel() for parameter in trained)
        return gradients + states

    def _parameters(self) -> Iterator[nn.Parameter]:
        found = {id(p): p for module in self._modules for p in module.parameters()}
        return iter(found.values())


def bytes_by_parameter(parameters: Iterable[nn.Parameter]) -> int:
    """Weights, gradients of the same type, and optimizer states of those that train."""
    return sum(
        p.numel() * (p.element_size() * (1 + p.requires_grad) + STATE_BYTES * p.requires_grad)
        for p in parameters
    )
