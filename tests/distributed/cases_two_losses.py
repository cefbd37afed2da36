"""Two losses, each with its own backward, in one optimizer step."""

from __future__ import annotations

from tests import models
from tests.distributed import jobs
from tests.distributed.cases_trajectory import assert_near_the_reference
from tests.distributed.harness import Context
from tests.distributed.registry import case
from tests.reference import Sampling


@case(most_quick=2, strength=1, ranks=(1, 2), stage=(0, 1, 2, 3))
def two_backwards_in_one_step_are_their_sum(ctx: Context, stage: int) -> dict:
    """A step whose probed gradients came in parts is repeated, not counted; importance and weights are of the sum."""
    job = jobs.Job(stage=stage)
    reference = jobs.reference_of(job)
    window, phases = [], []
    with jobs.engine_of(job) as engine:
        grass = jobs.controller(engine)
        for number in range(7):
            active = tuple(grass.active)
            phases.append(grass.phase)
            data = models.step_data(number, ranks=ctx.world_size, accumulation=2)
            for batch in data[ctx.rank]:
                engine.backward(models.loss(engine, batch) / 2)
            engine.step()
            assert engine.was_step_applied() == (phases[-1] == "train")
            record = reference.step(data, active, update=phases[-1] == "train")
            window.append(record.importance)
            if number == 0:
                assert grass.counters["probe_steps"] == grass.counters["skipped_steps"] == 0
            if number == 2:
                expected = Sampling(4).refresh(window[1:])
                close = [abs(a - b) <= 1e-4 * b for a, b in zip(grass.importance, expected, strict=True)]
                assert all(close), (grass.importance, expected)
        assert phases == ["probe"] * 3 + ["train"] * 4
        assert grass.counters["applied_steps"] == 4
        masters = jobs.masters(engine)
    return {"worst": assert_near_the_reference(masters, reference.masters, "fp32")}
