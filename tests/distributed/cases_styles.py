"""How scripts drive an engine: backward styles, no_sync, own accumulation, checkpointing, unused blocks."""

from __future__ import annotations

import contextlib

from tests import models
from tests.distributed import jobs
from tests.distributed.cases_trajectory import assert_near_the_reference
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.reference import Sampling

STAGES = (0, 1, 2, 3)


@case(most_quick=2, strength=1, ranks=(1, 2), stage=STAGES, dtype=("fp32", "bf16"), accumulation=(1, 2))
def loss_backward_gives_the_bits_of_engine_backward(
    ctx: Context, stage: int, dtype: str, accumulation: int
) -> None:
    """`engine.scale(loss).backward()` is what `engine.backward(loss)` is."""
    kept = []
    for style in ("engine", "loss"):
        job = jobs.Job(stage=stage, dtype=dtype, accumulation=accumulation)
        with jobs.engine_of(job) as engine:
            steps = [jobs.train_step(engine, job, ctx, number, style=style) for number in range(7)]
            kept.append((steps, jobs.masters(engine)))
    assert kept[0][0] == kept[1][0]
    jobs.assert_identical(kept[0][1], kept[1][1], "masters")


@case(strength=1, ranks=(1, 2), stage=(0, 1), dtype=("fp32", "bf16"))
def no_sync_accumulates_without_communication(ctx: Context, stage: int, dtype: str) -> dict:
    """Backward passes under `no_sync` count towards the next step and reduce nothing; probing measures their sum."""
    micros = 3
    job = jobs.Job(stage=stage, dtype=dtype, accumulation=1)
    reference = jobs.reference_of(job)
    window = []
    with jobs.engine_of(job) as engine:
        grass = jobs.controller(engine)
        for number in range(7):
            phase, active = grass.phase, tuple(grass.active)
            data = models.step_data(number, ranks=ctx.world_size, accumulation=micros)
            for index, batch in enumerate(data[ctx.rank]):
                with engine.no_sync() if index + 1 < micros else contextlib.nullcontext():
                    engine.backward(models.loss(engine, batch) / micros)
            engine.step()
            record = reference.step(data, active, update=phase == "train")
            window.append(record.importance)
            if phase == "probe" and grass.phase == "train":
                expected = Sampling(4).refresh(window)
                tolerance = 1e-4 if dtype == "fp32" else 2e-2
                close = [abs(a - b) <= tolerance * b for a, b in zip(grass.importance, expected, strict=True)]
                assert all(close), (grass.importance, expected)
        masters = jobs.masters(engine)
    return {"worst": assert_near_the_reference(masters, reference.masters, dtype)}


@case(most_quick=2, strength=1, ranks=(1, 2), stage=STAGES)
def boundaries_set_by_the_script_are_obeyed(ctx: Context, stage: int) -> None:
    """`set_gradient_accumulation_boundary` by hand, as Accelerate does, gives the same bits."""
    kept = []
    for by_hand in (False, True):
        job = jobs.Job(stage=stage, accumulation=2)
        with jobs.engine_of(job) as engine:
            for number in range(6):
                batches = job.data(number, ctx)[ctx.rank]
                for index, batch in enumerate(batches):
                    last = index + 1 == len(batches)
                    if by_hand:
                        engine.set_gradient_accumulation_boundary(last)
                    engine.backward(models.loss(engine, batch))
                    if last or not by_hand:
                        engine.step()
            assert jobs.controller(engine).counters["applied_steps"] == 4
            kept.append(jobs.masters(engine))
    jobs.assert_identical(kept[0], kept[1], "masters")


@case(most_quick=2, strength=1, ranks=(1, 2), stage=STAGES, dtype=("fp32", "bf16"))
def unmanaged_accumulation_is_the_reference(ctx: Context, stage: int, dtype: str) -> dict:
    """`managed_gradient_accumulation: false`: the script calls `step` when it likes; every call is a boundary."""
    job = jobs.Job(stage=stage, dtype=dtype, accumulation=1, extra={"managed_gradient_accumulation": False})
    job = jobs.with_grass(job, probe_steps=0)
    reference = jobs.reference_of(job)
    with jobs.engine_of(job) as engine:
        for number in range(5):
            active = tuple(jobs.controller(engine).active)
            data = models.step_data(number, ranks=ctx.world_size, accumulation=3)
            for batch in data[ctx.rank]:
                engine.backward(models.loss(engine, batch) / 3)
            engine.step()
            reference.step(data, active)
        masters = jobs.masters(engine)
    return {"worst": assert_near_the_reference(masters, reference.masters, dtype)}


@case(
    most_quick=2,
    strength=1,
    ranks=(1, 2),
    stage=STAGES,
    dtype=("fp32", "bf16"),
    checkpoint=("reentrant", "non_reentrant"),
    outer=("never", "always", "list"),
)
def gradient_checkpointing_changes_nothing(
    ctx: Context, stage: int, dtype: str, checkpoint: str, outer: str
) -> dict:
    """The same weights with and without recomputation, with frozen embeddings too (where reentrant needs help)."""
    kept = []
    block = {"outer": ["head"] if outer == "list" else outer}
    for kind in (None, checkpoint):
        options = {"checkpoint": kind, "tied": False}
        job = jobs.Job(stage=stage, dtype=dtype, model="stack", model_options=options, grass=block)
        with jobs.engine_of(job) as engine:
            steps = [jobs.train_step(engine, job, ctx, number) for number in range(8)]
            kept.append((steps, jobs.masters(engine)))
    _assert_same_course(kept[0][0], kept[1][0])
    return {"worst": assert_near_the_reference(kept[1][1], kept[0][1], dtype)}


def _assert_same_course(ours: list[jobs.Step], theirs: list[jobs.Step]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.phase_before, a.active_before, a.applied) == (b.phase_before, b.active_before, b.applied)
        assert abs(a.norm - b.norm) <= 1e-3 * abs(b.norm)


def _assert_course_with_unused_parts(ctx: Context, job: jobs.Job, style: str) -> dict:
    """Ten steps over data that leaves something of block 1 unused on some ranks, against the reference."""
    job = jobs.with_grass(job, sampling_period=2, refresh_period=2)
    reference = jobs.reference_of(job)
    odd = set()
    with jobs.engine_of(job) as engine:
        for number in range(10):
            odd |= {int(micros[0][0, 0]) % 2 for micros in job.data(number, ctx)}
            jobs.follow(reference, job, ctx, number, jobs.train_step(engine, job, ctx, number, style=style))
        masters = jobs.masters(engine)
        visits = jobs.controller(engine).visits
    assert odd == {0, 1}, "the data never differed"
    assert visits[1] > 0, "block 1 was never drawn"
    return {"worst": assert_near_the_reference(masters, reference.masters, "fp32")}


@case(
    strength=1,
    ranks=(2,),
    stage=(0, 1, 2),
    overlap=(True, False),
    accumulation=(1, 2),
    style=("engine", "loss"),
    unused=("skipped", "partly"),
)
def gradient_that_is_missing_on_some_ranks_hangs_nobody(
    ctx: Context, stage: int, overlap: bool, accumulation: int, style: str, unused: str
) -> dict:
    """A middle block, or one parameter of it, that one rank's data leaves unused counts as a zero gradient there.

    Not on stage 3: there DeepSpeed gathers weights on the way and hangs by itself when ranks take different courses.
    """
    options = {unused: 1}
    zero = {"overlap_comm": overlap}
    job = jobs.Job(stage=stage, accumulation=accumulation, model="stack", model_options=options, zero=zero)
    return _assert_course_with_unused_parts(ctx, job, style)


@case(
    strength=1,
    ranks=(2,),
    stage=STAGES,
    overlap=(True, False),
    accumulation=(1, 2),
    style=("engine", "loss"),
    unused=("skipped", "partly"),
)
def gradient_that_comes_nowhere_in_some_steps_is_zero(
    ctx: Context, stage: int, overlap: bool, accumulation: int, style: str, unused: str
) -> dict:
    """A block, or one parameter of a block, that all ranks leave unused in every other step, on any stage."""
    zero = {"overlap_comm": overlap}
    job = jobs.Job(
        stage=stage,
        accumulation=accumulation,
        model="stack",
        model_options={unused: 1},
        zero=zero,
        alternate=True,
    )
    return _assert_course_with_unused_parts(ctx, job, style)


@case(
    most_quick=2,
    strength=1,
    ranks=(1, 2),
    stage=STAGES,
    checkpoint=("reentrant", "non_reentrant", None),
    accumulation=(1, 2),
    style=("engine", "loss"),
)
def blocks_that_run_twice_add_up(
    ctx: Context, stage: int, checkpoint: str | None, accumulation: int, style: str
) -> dict:
    """A block walked through twice: reentrant checkpoints hand its gradient over in two parts, the second one late."""
    twice = {"rounds": 2, "tied": False}
    bare = jobs.Job(stage=stage, accumulation=accumulation, model="stack", model_options=twice)
    reference = jobs.reference_of(bare)
    job = jobs.replace(bare, model_options={**twice, "checkpoint": checkpoint})
    with jobs.engine_of(job) as engine:
        for number in range(8):
            step = jobs.train_step(engine, job, ctx, number, style=style)
            jobs.follow(reference, job, ctx, number, step)
        assert reference.applied >= 5
        masters = jobs.masters(engine)
    return {"worst": assert_near_the_reference(masters, reference.masters, "fp32")}


@case(strength=1, ranks=(1, 2), stage=(0, 1, 2), unused_on=("all", "last"))
def only_an_unused_block_is_active_hangs_nobody(ctx: Context, stage: int, unused_on: str) -> dict:
    """The one active block has no gradient, on one rank or on all: zero gradients, which still decay the weights."""
    options = {"skipped": 1, "layers": 2, "tied": False}
    job = jobs.Job(stage=stage, model="stack", model_options=options, clip=0.0)
    job = jobs.with_grass(
        job, policy="cyclic", probe_steps=None, refresh_period=None, active_layers=1, sampling_period=1
    )
    reference = jobs.reference_of(job)
    with jobs.engine_of(job) as engine:
        for number in range(6):
            active = tuple(jobs.controller(engine).active)
            data = job.data(number, ctx)
            for rank, (batch,) in enumerate(data):
                skips = unused_on == "all" or rank == ctx.world_size - 1
                batch[0, 0] = 1 if skips else 2 * (int(batch[0, 0]) // 2)
            engine.backward(models.loss(engine, data[ctx.rank][0]))
            engine.step()
            assert engine.was_step_applied()
            reference.step(data, active)
        masters = jobs.masters(engine)
    return {"worst": assert_near_the_reference(masters, reference.masters, "fp32")}
