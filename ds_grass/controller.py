"""Which blocks train now: a state machine over the optimizer steps that were really applied.

                 probe_steps measured                     every sampling_period applied steps: draw
    probe  ------------------------------>  train  ----+
    (nothing is updated)     first draw       ^        |  every refresh_period: refresh, then draw
                                              +--------+

The engine calls `advance` once per optimizer boundary with the squared gradient norms of the blocks in
`active`, already reduced over ranks and unscaled, or with None when the step was skipped because they were
not finite. The active set changes only there. The controller holds numbers, no tensors but the generator's
state, and no collectives: ranks agree because they are given the same norms; `zero/core.py` verifies it.

Paper: arXiv 2604.07808, the probing and the adaptive phase. Not here: moving states, reducing gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_grass.config import GrassConfig
from ds_grass.importance import Measure, Window, blend, complete, root_mean_square
from ds_grass.policies import make_policy
from ds_grass.sampler import Sampler, effective_blocks, turn

PROBE = "probe"
TRAIN = "train"
MAX_SKIPPED_IN_A_ROW = 20
_STATE_FORMAT = 1
_COUNTERS = (
    "applied_steps",  # optimizer steps that updated weights
    "probe_steps",
    "skipped_steps",  # non-finite gradients, in both phases
    "skipped_in_a_row",
    "draws",
    "refreshes",
    "switches",  # draws that changed the set; the first is none
)


@dataclass(frozen=True)
class Transition:
    """What one call of `advance` did."""

    phase_before: str
    """Phase that the step belonged to."""
    drew: bool = False
    """A new set was drawn (at the end of probing, and every sampling period)."""
    refreshed: bool = False
    """Importance was refreshed from the window. The end of probing is not a refresh."""
    active_changed: bool = False
    """`active` is another set than before: in probing the next group's turn, in training a switch."""
    window_means: tuple[float | None, ...] | None = None
    """Per block what the window that ended here measured, None where not active in it; None if none ended."""


class Controller:
    """Phase, active blocks and importance of one engine.

    Every method is cheap Python; nothing waits for a device. Attributes are for reading. Those that hold no
    value while probing: `importance` is None, `probabilities` is empty, `effective_blocks` is None.
    """

    def __init__(
        self,
        config: GrassConfig,
        numels: Sequence[int],
        *,
        accumulation_steps: int = 1,
        measure: Measure = root_mean_square,
    ) -> None:
        """`numels`: unsharded trainable parameters per block. ValueError if the config does not fit them."""
        config.check_layers(len(numels))
        self.config = config
        self.numels = tuple(numels)
        self.policy = make_policy(config.policy)
        self.probe_steps = 0
        if self.policy.probes:
            self.probe_steps = config.probe_steps_for(len(numels), accumulation_steps)
        self.probabilities: tuple[float, ...] = ()
        self.visits = [0] * len(numels)  # draws that chose the block
        self.trained_steps = [0] * len(numels)  # applied steps in which the block was active
        self.counters = dict.fromkeys(_COUNTERS, 0)
        self._measure = measure
        self._accumulates = accumulation_steps > 1
        self._found_parts = False
        self._window = Window(len(numels))
        self._sampler = Sampler(
            self.policy, config.active_layers, config.temperature, config.exploration, config.seed
        )
        self._known: list[float | None] = [None] * len(numels)  # importance of the blocks measured so far
        self.phase = PROBE
        self.active = self._probe_turn()
        if self.probe_steps == 0:
            self._begin_training()

    @property
    def num_blocks(self) -> int:
        """Blocks that take part in the draw."""
        return len(self.numels)

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Blocks whose gradients are wanted in the step now running, ascending."""
        return self.active

    @property
    def importance(self) -> tuple[float, ...] | None:
        """Importance by block, on the scale of the measure; see `complete` for blocks never measured."""
        return None if self.phase == PROBE else tuple(complete(self._known))

    @property
    def effective_blocks(self) -> float | None:
        """exp of the entropy of `probabilities`: 1 = always the same block first, L = uniform."""
        return effective_blocks(self.probabilities) if self.probabilities else None

    @property
    def probes_in_turns(self) -> bool:
        """Whether a probe step measures as many blocks as train at once, not all of them."""
        return self._accumulates or self._found_parts

    @property
    def needs_norms(self) -> bool:
        """Whether `advance` will use the norms of the step now running; if not, an empty mapping will do."""
        return self.phase == PROBE or (self.policy.refreshes and self.config.refresh_period is not None)

    def advance(self, squared_norms: Mapping[int, float] | None, *, may_end: bool = True) -> Transition:
        """Close one optimizer step.

        `squared_norms`: `||g||^2` by block index, of every active block; None if the step was skipped: that
        is counted and does nothing else, but the twentieth in a row raises RuntimeError, unless not `may_end`.
        """
        if squared_norms is None:
            self._count_skip(may_end)
            return Transition(self.phase)
        self.counters["skipped_in_a_row"] = 0
        return self._probe_step(squared_norms) if self.phase == PROBE else self._train_step(squared_norms)

    def _probe_step(self, squared_norms: Mapping[int, float]) -> Transition:
        before = self.active
        self._record(squared_norms)
        self.counters["probe_steps"] += 1
        if self.counters["probe_steps"] < self.probe_steps:
            self.active = self._probe_turn()
            return Transition(PROBE, active_changed=self.active != before)
        means = self._window.means()
        self._begin_training()
        return Transition(PROBE, drew=True, active_changed=self.active != before, window_means=means)

    def _train_step(self, squared_norms: Mapping[int, float]) -> Transition:
        before = self.active
        if self.needs_norms:
            self._record(squared_norms)
        for block in self.active:
            self.trained_steps[block] += 1
        self.counters["applied_steps"] += 1
        is_refresh_due = self.policy.refreshes and self._is_due(self.config.refresh_period)
        means = self._refresh() if is_refresh_due else None
        drew = self._is_due(self.config.sampling_period)
        if drew:
            self._draw()
        return Transition(TRAIN, drew, means is not None, self.active != before, means)

    def _is_due(self, period_steps: int | None) -> bool:
        return period_steps is not None and self.counters["applied_steps"] % period_steps == 0

    def _probe_turn(self) -> tuple[int, ...]:
        """Blocks to measure in the coming probe step.

        The norm of a sum over micro-batches needs the sum, and holding that for all blocks is what GRASS
        avoids: with accumulation the blocks take turns, no more at a time than train at a time.
        """
        if not self.probes_in_turns:
            return tuple(range(self.num_blocks))
        return turn(self.counters["probe_steps"], self.config.active_layers, self.num_blocks)

    def probe_in_turns(self) -> None:
        """Gradients come in parts: probe no more blocks a step than train at once, in as many steps as that takes."""
        if self.phase == PROBE and not self.probes_in_turns:
            self._found_parts = True
            enough = self.counters["probe_steps"] + self.config.turns_for(self.num_blocks)
            self.probe_steps = max(self.probe_steps, enough)
            self.active = self._probe_turn()

    def _begin_training(self) -> None:
        self.phase = TRAIN
        self._known = blend(self._known, self._window, self.config.ema)
        self._window.clear()
        self._draw()

    def _record(self, squared_norms: Mapping[int, float]) -> None:
        for block in self.active:
            assert block in squared_norms, f"block {block} is active but its norm was not given"
            self._window.add(block, self._measure(squared_norms[block], self.numels[block]))

    def _refresh(self) -> tuple[float | None, ...]:
        means = self._window.means()
        self._known = blend(self._known, self._window, self.config.ema)
        self._window.clear()
        self.counters["refreshes"] += 1
        return means

    def _draw(self) -> None:
        draw = self._sampler.draw(complete(self._known))
        is_switch = self.counters["draws"] > 0 and draw.active != self.active
        self.counters["switches"] += is_switch
        self.counters["draws"] += 1
        for block in draw.active:
            self.visits[block] += 1
        self.active, self.probabilities = draw.active, draw.probabilities

    def _count_skip(self, may_end: bool) -> None:
        self.counters["skipped_steps"] += 1
        self.counters["skipped_in_a_row"] += 1
        if may_end and self.counters["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"{MAX_SKIPPED_IN_A_ROW} optimizer steps in a row had non-finite gradients and were skipped; "
                "lower the learning rate, look for bad samples, or with fp16 start from a lower loss scale"
            )

    def log_fields(self) -> dict[str, Any]:
        """What a line of grass.jsonl says about the present set; plain values."""
        return {
            "phase": self.phase,
            **self.counters,
            "active": list(self.active),
            "importance": None if self.importance is None else list(self.importance),
            "probabilities": list(self.probabilities),
            "effective_blocks": self.effective_blocks,
            "visits": list(self.visits),
            "trained_steps": list(self.trained_steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on: strings, numbers, lists, dicts and one uint8 tensor."""
        return {
            **self._identity(),
            "phase": self.phase,
            "active": list(self.active),
            "importance": list(self._known),
            "probabilities": list(self.probabilities),
            "visits": list(self.visits),
            "trained_steps": list(self.trained_steps),
            "counters": dict(self.counters),
            "found_parts": self._found_parts,
            "probe_steps": self.probe_steps,
            "window": self._window.state_dict(),
            "sampler": self._sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state` was saved. ValueError, and nothing changed, where that can't be.

        Temperature, ema, exploration and the periods are those of the present config. If that has fewer probe
        steps than were already made, training begins at once.
        """
        self.check_state(state)
        window = Window(self.num_blocks)
        window.load_state_dict(state["window"])
        self._sampler.load_state_dict(state["sampler"])
        self._window = window
        self.phase = state["phase"]
        self._known = list(state["importance"])
        self.probabilities = tuple(state["probabilities"])
        self.visits = list(state["visits"])
        self.trained_steps = list(state["trained_steps"])
        self.counters = dict(state["counters"])
        self._found_parts = bool(state["found_parts"])
        if self._found_parts:
            self.probe_steps = max(self.probe_steps, int(state["probe_steps"]))
        # While probing the turn follows from the counter: accumulation may differ from that of the saved run.
        self.active = self._probe_turn() if self.phase == PROBE else tuple(state["active"])
        if self.phase == PROBE and self.counters["probe_steps"] >= self.probe_steps:
            self._begin_training()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for a state that cannot be continued; nothing is changed."""
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"the checkpoint's GRASS state lacks {missing}; use a checkpoint that is whole")
        names = {"format": "the format of GRASS's state", "num_blocks": "the number of blocks (grass.layers)"}
        for key, value in self._identity().items():
            if state[key] != value:
                raise ValueError(
                    f"{names.get(key, f'grass.{key}')} is {value!r} but the checkpoint was saved with "
                    f"{state[key]!r}; use that, or load the weights only (load_optimizer_states=False)"
                )

    def _identity(self) -> dict[str, Any]:
        """What a run cannot change when it continues: the rest of the state would lose its meaning."""
        return {
            "format": _STATE_FORMAT,
            "num_blocks": self.num_blocks,
            "policy": self.policy.name,
            "active_layers": self.config.active_layers,
        }
