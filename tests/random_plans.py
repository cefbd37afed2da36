"""Plans drawn anew for every micro-batch and layer, and proof that they ran.

Contract: inside `random_plans(chunks, ...)` every transformer block draws each layer's strategy from `names`, the same
on all ranks of a tensor-parallel group, others on each data-parallel replica, whose micro-batches differ in a job too.
`Ran` counts where a strategy's body is called and what each micro-batch counted; its assertions compare the two.
Megatron-core is imported inside functions only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn

from megatron_ext.sequence_parallel.names import NATIVE, STRATEGIES


class Ran:
    """What ran: `micro_batches` with their plans and calls, and calls of bodies by (name, "attention" or ...)."""

    def __init__(self) -> None:
        self.micro_batches: list[Any] = []
        self.bodies: Counter[tuple[str, str]] = Counter()

    def forward(self) -> Counter[str]:
        """Strategy -> layers that ran it first."""
        return self._calls("forward")

    def recomputed(self) -> Counter[str]:
        """Strategy -> layers that ran it again in backward."""
        return self._calls("recomputed")

    def _calls(self, phase: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for micro_batch in self.micro_batches:
            found += Counter({name: n for (which, name), n in micro_batch.calls.items() if which == phase})
        return found

    def check(self, names: Sequence[str] = STRATEGIES, *, recomputed: bool = False) -> dict[str, int]:
        """Every one of `names` ran, each micro-batch what its plan says, and again in backward where layers are."""
        for micro_batch in self.micro_batches:
            planned = Counter(micro_batch.names)
            expected = {("forward", name): count for name, count in planned.items()}
            if recomputed:
                expected |= {("recomputed", name): count for name, count in planned.items()}
            assert micro_batch.calls == expected, (micro_batch.names, micro_batch.calls)
        forward = self.forward()
        assert set(forward) == set(names), f"only {dict(forward)} ran"
        both = forward + self.recomputed()
        for name in set(names) - {NATIVE}:
            for part in ("attention", "feed_forward"):
                assert self.bodies[name, part] == both[name], (name, part, dict(self.bodies), dict(both))
        return dict(both)


@contextmanager
def random_plans(
    chunks: Sequence[nn.Module], *, seed: int = 0, names: Sequence[str] = STRATEGIES
) -> Iterator[Ran]:
    """Attach a switch to every block of the chunks, or give the one that is there a new policy; detach at the end."""
    from megatron.core import parallel_state

    from megatron_ext.sequence_parallel import switch
    from megatron_ext.sequence_parallel.block_policy import blocks_of

    replica = parallel_state.get_data_parallel_rank()
    blocks = [block for chunk in chunks for block in blocks_of(chunk)]
    with counted_bodies() as ran:
        try:
            for block in blocks:
                number = block.layers[0].layer_number
                attached = switch.attach(
                    block, drawn(random.Random(f"{seed} {number} {replica}"), block, names)
                )
                assert not attached.refusals(), attached.refusals()
                attached.finished = _noted(ran, attached.finished)
            yield ran
        finally:
            for block in blocks:
                switch.detach(block)


def drawn(generator: random.Random, block: nn.Module, names: Sequence[str]) -> Callable[..., tuple[str, ...]]:
    """A policy that draws a strategy for each layer of `block`."""
    count = len(block.layers)
    return lambda batch, length, documents: tuple(generator.choices(list(names), k=count))


@contextmanager
def counted_bodies() -> Iterator[Ran]:
    """Count calls of every strategy's two functions."""
    from megatron_ext.sequence_parallel import strategies

    ran = Ran()
    counted = {
        name: strategies.Strategy(
            *(
                _counted(ran.bodies, (name, part), body)
                for part, body in zip(("attention", "feed_forward"), bodies, strict=True)
            )
        )
        for name, bodies in strategies.BODIES.items()
    }
    with patch.dict(strategies.BODIES, counted):
        yield ran


def _counted(calls: Counter, key: tuple[str, str], body: Callable) -> Callable:
    def run(*args: Any) -> Any:
        calls[key] += 1
        return body(*args)

    return run


def _noted(ran: Ran, then: Callable | None) -> Callable:
    def finished(micro_batch: Any, *rest: Any) -> None:
        ran.micro_batches.append(micro_batch)
        if then is not None:
            then(micro_batch, *rest)

    return finished
