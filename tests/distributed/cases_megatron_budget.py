"""The memory that is left for activations, where a device counts what is held; what the device says is pretended.

Not covered: a real device (tests/gpu), what a plan does with its budget (cases_megatron_job.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

import megatron_ext
from megatron_ext import job
from megatron_ext.rank_memory import STATE_BYTES
from tests import megatron_models, plain_gpt
from tests.distributed import cases_recompute_job
from tests.distributed.cases_megatron_engine import _step, engine_of
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.plain_gpt import GPT
from tests.pretended_device import pretended_device

LIMIT = 50_000_000
STATIC = 10_000_000


def device_of(allocated: list[int]) -> AbstractContextManager[None]:
    """Inside, the allocator says what `allocated`, a list of one, has."""
    return pretended_device(lambda: allocated[0], lambda: allocated[0])


@contextmanager
def applied(ctx: Context, **block: object) -> Iterator[Path]:
    log = ctx.folder / "log.jsonl"
    block = {"memory": {"limit": LIMIT}, "log": {"path": str(log)}, **block}
    megatron_ext.apply({"megatron_ext": block})
    try:
        yield log
    finally:
        megatron_ext.remove()


def events(log: Path, name: str) -> list[dict]:
    torch.distributed.barrier()  # the first rank has written them
    return cases_recompute_job.events(log, name)


def to_come(chunks: list) -> int:
    """Gradients and states that the first step of fp64 weights makes."""
    return sum(p.numel() * (p.element_size() + STATE_BYTES) for chunk in chunks for p in chunk.parameters())


@case(ranks=(2,))
def what_is_held_is_measured_again_when_states_are_there(ctx: Context) -> dict:
    """States count by parameter until the first step has made them, and when they come late, plans follow."""
    gpt, batch = GPT(), plain_gpt.make_batch(GPT(), 0)
    allocated = [STATIC + 1000 * ctx.rank]  # ranks differ a little; the least that is left is everybody's
    with megatron_models.parallel_state(tp=2), device_of(allocated), applied(ctx) as log:
        chunks = megatron_models.build(gpt)
        first = STATIC + to_come(chunks)

        def step() -> None:
            megatron_models.forward_backward(chunks, [batch])

        grown = chunks[0].register_forward_pre_hook(lambda *_: allocated.append(allocated.pop() + 5_000_000))
        step()  # what is allocated in the step is no weight
        grown.remove()
        allocated[0] -= 5_000_000
        step()  # states are there, the gradients too
        step()  # nothing has changed
        allocated[0] += LIMIT - STATIC - 10_000
        step()
        step()
        told = events(log, "budget")
    statics = [first, STATIC, LIMIT - 10_000]
    assert [budget["static_bytes"] for budget in told] == statics, told
    assert [budget["planned_bytes"] for budget in told] == [LIMIT - static - 1000 for static in statics], told
    plans = events(log, "plan")
    assert [plan["fits"] for plan in plans] == [True, False], plans
    return {"plans": [plan["layers"] for plan in plans]}


@case(ranks=(2,), slow=True)
def an_evaluation_is_not_what_a_step_holds(ctx: Context) -> None:
    """Before the first step, and between steps when the device holds more for a while."""
    gpt, batch = GPT(), plain_gpt.make_batch(GPT(), 0)
    allocated = [STATIC]
    with megatron_models.parallel_state(tp=2), device_of(allocated), applied(ctx) as log:
        chunks = megatron_models.build(gpt)
        for _ in range(2):
            chunks[0].eval()
            allocated[0] += 20_000_000
            with torch.no_grad():
                megatron_models.forward_backward(chunks, [batch], forward_only=True)
            chunks[0].train()
            allocated[0] -= 20_000_000
            megatron_models.forward_backward(chunks, [batch])
        megatron_models.forward_backward(chunks, [batch])
        told = events(log, "budget")
    statics = [STATIC + 20_000_000, STATIC + to_come(chunks), STATIC]
    assert [budget["static_bytes"] for budget in told] == statics, told


@case(ranks=(2,), slow=True)
def what_does_not_fit_now_is_not_profiled(ctx: Context) -> None:
    """States that are to come leave no budget, but room for a profile of what is longer than all before."""
    gpt, allocated = GPT(length=256), [STATIC]
    with megatron_models.parallel_state(tp=2), device_of(allocated):
        for room, fits in ((1_000, False), (5_000_000, True)):
            allocated[0] = STATIC
            with applied(ctx) as log:
                chunks = megatron_models.build(gpt)
                megatron_models.forward_backward(chunks, [plain_gpt.make_batch(gpt, 0, length=16)])
                allocated[0] = LIMIT - room
                megatron_models.forward_backward(chunks, [plain_gpt.make_batch(gpt, 0, length=256)])
                (longer,) = events(log, "profile")[-1:]
                assert bool(longer["strategies"]) == fits, longer
            torch.distributed.barrier()
            log.unlink(missing_ok=True)
            torch.distributed.barrier()


@case(ranks=(4,), slow=True)
def all_chunks_of_a_rank_have_one_account(ctx: Context) -> None:
    """The second chunk's first micro-batch comes when the first one's activations are there: they are no weights."""
    gpt = GPT(layers=4)
    batches = [plain_gpt.make_batch(gpt, number) for number in range(4)]
    allocated = [STATIC]
    with megatron_models.parallel_state(tp=2, pp=2, vpp=2), device_of(allocated), applied(ctx) as log:
        chunks = megatron_models.build(gpt)
        for chunk in chunks:
            chunk.register_forward_hook(lambda *_: allocated.append(allocated.pop() + 1_000_000))
        first = STATIC + to_come(chunks)
        megatron_models.forward_backward(chunks, batches)
        allocated[0] = STATIC
        megatron_models.forward_backward(chunks, batches)
        told = events(log, "budget")
    if ctx.rank == 0:  # which has written them
        assert [budget["static_bytes"] for budget in told] == [first, first, STATIC, STATIC], told


@case(ranks=(2,))
def an_engine_is_measured_again_after_its_first_step(ctx: Context) -> None:
    """No schedule of Megatron-core's tells when a step begins; the engine's own count of steps does."""
    gpt, found = GPT(), []
    allocated = [2_000_000_000 - 1_000_000]  # of the engine's limit
    with megatron_models.parallel_state(tp=2), device_of(allocated), engine_of(gpt, 1) as engine:
        (policy,) = job.running()._policies.values()
        for number in range(6):
            _step(engine, [plain_gpt.make_batch(gpt, number)])
            found.append(policy._planner.budget_bytes)
    assert found[0] == found[1] < found[2] == found[5], found
