"""What a job tells while it runs, and when: lines of the log, scalars for the monitor, the probe on the console.

    a draw or a refresh       a line with everything; scalars
    a skipped step            a line, with the blocks that were not finite
    a checkpoint is saved     a line, with its tag, bytes and seconds
    50 steps without a line   a short line with the loss and what adds up; scalars
    the first step after      the log goes on from where the checkpoint was saved; a line with everything, and the
    loading a checkpoint      start's facts

Contract: on ranks but the first, one comparison a call. Nothing here waits for a device, but for the loss when a line
is written. All of it is inside `time`, so that a benchmark can say its share of a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_grass.controller import PROBE, Controller
from ds_grass.telemetry.log import GrassLog
from ds_grass.telemetry.log_cut import PLACE
from ds_grass.telemetry.loss_meter import LossMeter
from ds_grass.telemetry.own_time import OwnTime
from ds_grass.telemetry.probe_bar import ProbeBar

logger = logging.getLogger(__name__)

MAX_STEPS_BETWEEN_LINES = 50
_BY_BLOCK = ("active", "names", "importance", "probabilities", "visits", "trained_steps")
"""What does not change between two draws, or is long: not in a short line."""


class Journal:
    """Tells of one engine. The core says what happens; the hooks on the engine say when a step has ended."""

    def __init__(
        self,
        log: GrassLog,
        controller: Controller,
        *,
        tells: bool,
        costs: Callable[[], dict[str, Any]],
        block_names: Sequence[str],
        send: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        """`tells`: this is the first rank. `costs`: bytes and seconds so far, for a line. `send` gives a line's
        numbers to the monitor, at the samples seen by then; None: no monitor is on."""
        self.log, self.controller, self.tells = log, controller, tells
        self.time = OwnTime()
        self.loss = LossMeter()
        self.bar = ProbeBar()
        self.facts: dict[str, Any] = {}
        self._costs, self._block_names, self._send = costs, block_names, send
        self._unsent: list[Mapping[str, Any]] = []
        self._is_step_open = False
        self._steps_since_line = 0
        self._resumes_as: str | None = None
        """The run that the next step goes on with."""
        self._was_probing = controller.phase == PROBE
        self._began = time.monotonic()

    # -- what happens ------------------------------------------------------------------------------------------------

    def start(self, facts: Mapping[str, Any]) -> None:
        """The job has been resolved: its facts, and what trains if nothing is probed."""
        if not self.tells:
            return
        with self.time:
            self.facts = {**facts, "blocks": list(self._block_names)}
            self.log.write("start", **self._place(), **self.facts)
            if not self._was_probing:
                self._tell("draw")
                self._send_all()

    def saw_loss(self, loss: object) -> None:
        """A micro-batch's loss, as its gradients were made of it."""
        if self.tells:
            with self.time:
                self.loss.add(loss)

    def begin_step(self) -> None:
        """The optimizer is about to make a step of the gradients."""
        if self.tells:
            if self._resumes_as is not None:
                self._go_on_as(self._resumes_as)
            self._is_step_open = True
            self._steps_since_line += 1
            self.loss.end_step()

    def drew(self, event: str) -> None:
        """A draw or a refresh has been made, and what it changes is in place."""
        if self.tells:
            with self.time:
                self._tell(event)

    def skipped(self, names: Sequence[str]) -> None:
        """The step in hand is skipped: the gradients of these blocks are not finite."""
        if self.tells:
            place = self._place()
            place["skipped_steps"] += 1  # this one is counted only afterwards
            with self.time:
                self.log.write("skipped", **place, blocks=list(names))

    def measures_in_turns(self) -> None:
        """The probe has found that gradients come in parts."""
        if self.tells:
            controller = self.controller
            logger.info(
                "grass: gradients come in parts, so the probe measures %d of %d blocks a step: %d steps in all",
                len(controller.active),
                controller.num_blocks,
                controller.probe_steps,
            )

    def end_step(self) -> None:
        """The engine is done with a step, or with a micro-batch: tell what there is to tell."""
        if not self._is_step_open:
            return
        self._is_step_open = False
        with self.time:
            self._show_probe()
            if self._steps_since_line >= MAX_STEPS_BETWEEN_LINES:
                self._tell("step", without=_BY_BLOCK)
            self._send_all()

    def saved(self, **fields: Any) -> None:
        """A checkpoint is complete. Of one that was loaded and not trained from, the log says nothing."""
        if self.tells and self._resumes_as is None:
            with self.time:
                self.log.write("saved", **self._place(), **fields)

    def resume(self, saved: Mapping[str, Any] | None) -> None:
        """A checkpoint was loaded, and the controller with it. `saved`: what `identity` was then; None: it had none.

        The log is left alone until a step is made: a Trainer that loads its best weights at the end undoes nothing.
        """
        self.bar.close()
        self.loss.clear()
        self._unsent.clear()
        self._steps_since_line, self._is_step_open = 0, False
        self._was_probing, self._began = self.controller.phase == PROBE, time.monotonic()
        self._resumes_as = self.log.run_id if saved is None else str(saved["run_id"])

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the run that goes on from it is the same run."""
        return {"run_id": self._resumes_as or self.log.run_id}

    def close(self) -> None:
        """The engine is destroyed."""
        self.bar.close()
        self.log.close()

    def describe(self) -> dict[str, Any]:
        """What a line with everything says, but for the loss; plain values."""
        return {
            **self.controller.log_fields(),
            "names": [self._block_names[block] for block in self.controller.active],
            **self._costs(),
            "telemetry_seconds": round(self.time.seconds, 6),
        }

    # -- how it is told ----------------------------------------------------------------------------------------------

    def _go_on_as(self, run_id: str) -> None:
        with self.time:
            self._resumes_as = None
            self.log.resume(run_id, self._place())
            self.log.write("resume", **self.facts, **self._line())

    def _place(self) -> dict[str, int]:
        return {name: self.controller.counters[name] for name in PLACE}

    def _line(self) -> dict[str, Any]:
        mean = self.loss.take()
        return self.describe() if mean is None else {**self.describe(), "loss": mean}

    def _tell(self, event: str, *, without: Sequence[str] = ()) -> None:
        self._steps_since_line = 0
        if self.log.is_open or self._send is not None:
            line = {key: value for key, value in self._line().items() if key not in without}
            self.log.write(event, **line)
            self._unsent.append(line)

    def _send_all(self) -> None:
        """Give the monitor what has not been sent, at the samples that the engine counts by now."""
        if self._send is not None:
            for line in self._unsent:
                self._send(line)
        self._unsent.clear()

    def _show_probe(self) -> None:
        if not self._was_probing:
            return
        controller = self.controller
        if controller.phase == PROBE:
            self.bar.show(controller.counters["probe_steps"], controller.probe_steps)
            return
        self._was_probing = False
        self.bar.close()
        logger.info(
            "grass: probed for %d steps in %.1f s; effective number of blocks %.1f of %d; the first to train: %s",
            controller.counters["probe_steps"],
            time.monotonic() - self._began,
            controller.effective_blocks,
            controller.num_blocks,
            ", ".join(self._block_names[block] for block in controller.active),
        )
