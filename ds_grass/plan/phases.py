"""What one rank holds at its peak in each phase of a job: of the draws that can come, the most expensive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_grass.plan.job import PlannedJob
from ds_grass.plan.ledger import Moment
from ds_grass.plan.replay import Rank, candidate_sets


@dataclass(frozen=True)
class Phases:
    """The peak of each phase."""

    init: Moment
    probe: Moment | None
    """None where the policy does not probe."""
    train: Moment
    worst: str
    """Which blocks are active at the most expensive draw: a key of `candidate_sets`."""
    mode: str

    @property
    def peak(self) -> Moment:
        return max((self.init, self.probe or self.init, self.train), key=lambda moment: moment.total_bytes)


def phases(job: PlannedJob, config: Any, *, rank: Rank | None = None) -> Phases:
    """Replay `job`. `config` is a Hugging Face config."""
    rank = rank or Rank(job, config)
    num_blocks = len(rank.layout.blocks)
    sets = candidate_sets(num_blocks, job.grass.active_layers)
    mode = job.grass.states.mode or "stream"
    trained = {name: rank.train(blocks, mode=mode) for name, blocks in sets.items()}
    worst = max(trained, key=lambda name: trained[name].total_bytes)
    probe = None
    if job.grass.probe_steps_for(num_blocks, job.accumulation) > 0:
        probe = max((rank.probe(blocks) for blocks in sets.values()), key=lambda moment: moment.total_bytes)
        probe = max(
            (probe, rank.drawn), key=lambda moment: moment.total_bytes
        )  # its last step ends with a draw
    return Phases(rank.init, probe, trained[worst], worst, mode)
