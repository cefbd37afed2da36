"""What one setting costs: the peaks of a rank's device, its host, and what is moved.

Contract: peaks come from replays, of the most expensive draw among `candidate_sets`; host and traffic are arithmetic
over the same state store that the job makes. All in bytes, per rank unless it says node.

Not covered: the CUDA context, NCCL's buffers and the allocator's fragmentation (1 to 2 GB together), the script's own
host memory, and the weights that it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ds_grass.config import StatesConfig
from ds_grass.plan.job import PlannedJob
from ds_grass.plan.ledger import Moment
from ds_grass.plan.replay import Rank
from ds_grass.state_store import StateStore
from ds_grass.units import Unit, largest_blocks
from ds_grass.zero.placement import spare_bytes


@dataclass(frozen=True)
class Budget:
    """One job, planned."""

    job: PlannedJob
    """With `states.mode` decided."""
    init: Moment
    probe: Moment | None
    """None where the policy does not probe."""
    train: Moment
    worst_draw: str
    """Which blocks are active at the most expensive draw: a key of `candidate_sets`."""
    host_bytes: int
    """States once every block was drawn."""
    saving_bytes: int
    """More, on the host, while a checkpoint is written."""
    moved_bytes: float
    """To the device, and as much back, in a mean step."""

    @property
    def peak(self) -> Moment:
        return max((self.init, self.probe or self.init, self.train), key=lambda moment: moment.total_bytes)

    @property
    def host_bytes_node(self) -> int:
        return self.host_bytes * self.job.ranks_per_node

    @property
    def saving_bytes_node(self) -> int:
        """All that a node's host holds while a checkpoint is written."""
        return (self.host_bytes + self.saving_bytes) * self.job.ranks_per_node


@dataclass(frozen=True)
class Limits:
    """Bytes that there are; None is not checked."""

    device: int | None = None
    host: int | None = None
    """Of a node."""

    def hold(self, budget: Budget) -> bool:
        """Whether the job trains within them; saving is told apart."""
        on_device = self.device is None or budget.peak.total_bytes <= self.device
        return on_device and (self.host is None or budget.host_bytes_node <= self.host)

    def hold_saving(self, budget: Budget) -> bool:
        """Whether a checkpoint with optimizer states can be written."""
        return self.host is None or budget.saving_bytes_node <= self.host


class Planner:
    """Budgets of one model. Ranks are made once for all settings that share them, probes replayed once for each."""

    def __init__(self, config: Any, limits: Limits, say: Callable[[str], None] = lambda text: None):
        self.config, self.limits, self._say = config, limits, say
        self._ranks: dict[PlannedJob, Rank] = {}
        self._probes: dict[PlannedJob, Moment] = {}
        self._budgets: dict[PlannedJob, Budget] = {}

    def budget(self, job: PlannedJob, *, draws: tuple[str, ...] | None = None) -> Budget:
        """Plan `job`. `draws`: look at these candidates only."""
        known = self._budgets.get(job)
        if known is None or draws is None:
            known = self._budgets[job] = self._make(job, draws)
        return known

    def rank(self, job: PlannedJob) -> Rank:
        """The rank that replays `job`: active_layers and states make no other one."""
        alike = _without_choice(job)
        if alike not in self._ranks:
            self._ranks.clear()  # one model at a time
            self._ranks[alike] = Rank(alike, self.config)
        return self._ranks[alike]

    def draws(self, rank: Rank, job: PlannedJob) -> dict[str, list[int]]:
        """The candidates for the most expensive draw."""
        return candidate_sets(len(rank.layout.blocks), job.grass.active_layers)

    def _make(self, job: PlannedJob, draws: tuple[str, ...] | None) -> Budget:
        self._say(describe(job))
        rank = self.rank(job)
        num_blocks = len(rank.layout.blocks)
        job.grass.check_layers(num_blocks)
        sets = self.draws(rank, job)
        sets = {name: blocks for name, blocks in sets.items() if draws is None or name in draws} or sets
        stream = job.grass.states.model_copy(update={"mode": job.grass.states.mode or "stream"})
        trained = {name: rank.train(blocks, stream) for name, blocks in sets.items()}
        worst = max(trained, key=lambda name: trained[name].total_bytes)
        store, active = rank.store, _largest_active(rank, job.grass.active_layers)
        keys = [unit.key for unit in active]
        mode = job.grass.states.mode or self._decided(trained[worst], store.device_bytes_resident(keys))
        job = job.with_states(mode=mode)
        train = trained[worst] if mode == stream.mode else rank.train(sets[worst], job.grass.states)
        return Budget(
            job=job,
            init=rank.init,
            probe=self._probe(job, rank, list(sets.values()), again=draws is not None),
            train=train,
            worst_draw=worst,
            host_bytes=store.final_host_bytes,
            saving_bytes=saving_copies(store, rank),
            moved_bytes=_moved(job, store, active),
        )

    def _probe(self, job: PlannedJob, rank: Rank, sets: list[list[int]], *, again: bool) -> Moment | None:
        in_turns = job.accumulation > 1
        if job.grass.probe_steps_for(len(rank.layout.blocks), job.accumulation) == 0 or (in_turns and again):
            return None  # a turn takes no more than training the same blocks does
        alike = replace(_without_choice(job), grass=job.grass) if in_turns else _without_choice(job)
        if alike not in self._probes:
            tried = sets[:2] if in_turns else sets[:1]  # turns go through the blocks in order
            self._probes[alike] = max(
                (rank.probe(blocks) for blocks in tried), key=lambda moment: moment.total_bytes
            )
        if job.grass.states.mode == "stream":  # its slots are made in the first training step
            return self._probes[alike]
        # the last step of the probe ends with a draw
        return max((self._probes[alike], rank.drawn), key=lambda moment: moment.total_bytes)

    def _decided(self, peak: Moment, resident: int) -> str:
        """`states.mode` null, as the job decides it after its first step."""
        if self.limits.device is None:
            return "stream"
        return "resident" if spare_bytes(self.limits.device - peak.total_bytes, resident) > 0 else "stream"


def candidate_sets(num_blocks: int, count: int) -> dict[str, list[int]]:
    """Sets of `count` blocks among which the most expensive draw is: what differs is how deep backward goes."""
    sets = {
        "lowest": list(range(count)),
        "highest": list(range(num_blocks - count, num_blocks)),
        "lowest and highest": [0, *range(num_blocks - count + 1, num_blocks)],
    }
    return {
        name: blocks
        for index, (name, blocks) in enumerate(sets.items())
        if blocks not in list(sets.values())[:index]
    }


def describe(job: PlannedJob) -> str:
    """A few words that tell a setting from another."""
    outer = job.grass.outer if isinstance(job.grass.outer, str) else "some"
    return f"{job.grass.active_layers} active, outer {outer}, stage {job.stage}, {job.dtype}"


def saving_copies(store: StateStore, rank: Rank) -> int:
    """Bytes of copies on the host while a checkpoint is written: fp32 weights of units without a master there.

    Checkpoints hold fp32 masters of every unit; what the host holds is written from where it is.
    """
    return sum(4 * layout.shard_numel for key, layout in rank.layouts.items() if not store.has_master(key))


def _largest_active(rank: Rank, count: int) -> list[Unit]:
    largest = largest_blocks(rank.units, count)
    return [unit for unit in rank.units if unit.block is None or unit.block in largest]


def _moved(job: PlannedJob, store: StateStore, active: list[Unit]) -> float:
    """One way. Resident blocks move when another set is drawn, at most all of them; what is outside stays."""
    if job.grass.states.mode == "stream":
        return store.device_bytes_resident([unit.key for unit in active])
    period = job.grass.sampling_period
    blocks = store.device_bytes_resident([unit.key for unit in active if unit.block is not None])
    return blocks / period if period else 0.0


def _without_choice(job: PlannedJob) -> PlannedJob:
    """What a rank is made from: `layers` and `outer`, not how many blocks are active or where states are."""
    return job.with_grass(active_layers=1, states=StatesConfig(), sampling_period=None, refresh_period=None)
