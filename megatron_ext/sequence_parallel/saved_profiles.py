"""The file of `cost_model.save`: what a job has measured of every shape of layer, on whatever stage of its pipeline.

Contract: no collective, and nothing waits. Each stage puts what it has measured into the store; the rank that writes
the log adds what only other stages have to its own, and saves all in one file. It looks for that at the end of a step
in which its own has grown: all stages have run that step's forward passes by then, and so have told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch.distributed as dist

from ..stage_facts import StageFacts, stage_facts
from ..telemetry import Telemetry
from .layer_shape import LayerShape
from .profile import Profile, save_profiles

logger = logging.getLogger("megatron_ext")


class SavedProfiles:
    """By shape, of all blocks of this rank, and on the rank that writes of all stages."""

    def __init__(self, path: str | None, telemetry: Telemetry, name: str):
        """`path`: of the file, None for no file. `name`: of the job, equal on all ranks."""
        self._path, self._telemetry, self._name = path, telemetry, name
        self._own: dict[LayerShape, Profile] = {}
        self._theirs: dict[LayerShape, Profile] = {}
        self._facts: StageFacts | None = None
        self._has_grown = False

    def add(self, profiles: Iterable[Profile]) -> None:
        """What is known of the layers of one block, on every rank that has it."""
        if self._path is None:
            return
        for profile in profiles:
            known = self._own.get(profile.shape)
            self._own[profile.shape] = profile if known is None else known.merged(profile)
        if self._facts is None:
            self._facts = stage_facts(f"{self._name}/profiles")
        self._facts.tell("profiles", [profile.to_json() for profile in self._own.values()])
        self._has_grown = True
        self._save()

    def gather(self) -> None:
        """Save what other stages have told by now, if anything can be new."""
        if self._facts is None or not (
            self._has_grown and self._telemetry.is_writer and dist.is_initialized()
        ):
            return
        self._has_grown = False
        told = [
            Profile.from_json(each, "a profile in the store")
            for stage in self._facts.by_now("profiles")
            for each in stage
        ]
        theirs = {profile.shape: profile for profile in reversed(told) if profile.shape not in self._own}
        if theirs != self._theirs:
            self._theirs = theirs
            self._save()

    def _save(self) -> None:
        """A job does not end for want of a file that it needs no more."""
        if not self._telemetry.is_writer or self._path is None:
            return
        try:
            save_profiles(self._path, [*self._own.values(), *self._theirs.values()])
        except OSError as error:
            logger.warning(
                "megatron_ext.sequence_parallel.cost_model.save is %r, which cannot be written (%s); the job goes on",
                self._path, error,
            )  # fmt: skip
