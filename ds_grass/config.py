"""The ``grass`` block of ds_config.json: its keys, its rules, and the one line said when it is wrong.

Contract: :func:`parse_block` turns the block into a frozen :class:`GrassConfig` or raises ``ValueError`` with
a single line, as :mod:`ds_grass.block` has it. ``null`` means that the package decides and prints what it
decided.
Not covered: the other keys of ds_config (see :mod:`ds_grass.conflicts`), and anything that takes a model to
know, except through :meth:`GrassConfig.check_layers` and :meth:`GrassConfig.probe_steps_for`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from .block import LARGEST, Block, FileName, distinct, fingerprint, key, parse, shown, whole

__all__ = ["GrassConfig", "LogConfig", "StatesConfig", "fingerprint", "parse_block", "shown"]

_PROBE_STEPS = 10
_PERIOD_STEPS = 50
_LARGEST_SEED = 2**63 - 1  # what a torch.Generator takes without wrapping round


def _module_path(path: str) -> str:
    if path == "auto" or not all(part and part == part.strip() for part in path.split(".")):
        raise ValueError("not a dotted module path")
    return path


ModulePath = Annotated[str, AfterValidator(_module_path)]
ModulePaths = Annotated[list[ModulePath], Field(min_length=1), AfterValidator(distinct)]


class StatesConfig(Block):
    """Where moments and master weights are kept, and in what precision."""

    mode: Literal["resident", "stream"] | None = key(None, '"resident", "stream" or null')
    """`resident`: the states of the active blocks stay on the device. `stream`: they pass through a few slots
    around each update, which takes less device memory and more traffic. The numbers are the same, bit for
    bit. null: starts as `stream`, settled on all ranks by the memory measured in the first training step."""

    dtype: Literal["fp32", "bf16"] = key("fp32", '"fp32" or "bf16"')
    """Of the two Adam moments: 8 bytes a parameter in fp32, 4 in bf16. Arithmetic is fp32 in both."""

    master_weights: bool = key(True, "true or false")
    """Keep an fp32 copy beside low-precision weights, 4 bytes a parameter. false: bf16 weights are updated in
    place with stochastic rounding. Without effect in fp32 training, where the weights are their own master
    copy; refused with fp16."""

    pin_memory: bool = key(True, "true or false")
    """Page-lock the host memory of the states, which asynchronous copies need. false: for hosts with a small
    memlock limit; copies then wait for each other."""

    buffers: int = key(2, whole(2), ge=2, le=LARGEST)
    """Device slots that states pass through, each as large as the largest block. Used by `stream` only."""


class LogConfig(Block):
    """The record of draws and refreshes, one JSON object a line, written by rank 0."""

    enabled: bool = key(True, "true or false")
    """Write the log."""

    path: FileName | None = key(None, "a file name or null", write='null or "grass.jsonl"')
    """null: grass.jsonl in the working directory of rank 0. Without effect when `enabled` is false."""


class GrassConfig(Block):
    """The whole block. Symbols in brackets are those of the paper, arXiv 2604.07808."""

    enabled: bool = key(True, "true or false")
    """false: DeepSpeed runs as if there were no block. The block is still checked."""

    policy: Literal["grass", "static", "top_k", "lisa", "cyclic"] = key(
        "grass", '"grass", "static", "top_k", "lisa" or "cyclic"'
    )
    """How blocks are chosen. `grass`: drawn by importance, which is refreshed. `static`: drawn by importance
    as the probe found it, never refreshed. `top_k`: the most important, without chance. `lisa`: drawn
    uniformly. `cyclic`: in turn. The last two measure nothing: `refresh_period`, `temperature`, `ema` and
    `exploration` are then without effect."""

    active_layers: int = key(2, whole(1), ge=1, le=LARGEST)
    """Blocks trained at once [gamma]; at most as many as the model has."""

    layers: ModulePath | ModulePaths | None = key(
        None,
        "a dotted module path, a list of different ones, or null",
        write='null or a path such as "model.layers"',
    )
    """The repeated module list whose entries are the blocks, or several that are drawn from together. null:
    found by the structure of the model."""

    outer: Literal["always", "never"] | ModulePaths = key(
        "always",
        '"always", "never" or a list of different module paths',
        write='"always" or a list such as ["lm_head"]',
    )
    """What trains outside the blocks (embeddings, final norm, head): all, nothing, or these modules only."""

    probe_steps: int | None = key(None, whole(0) + " or null", ge=0, le=LARGEST)
    """Optimizer steps without update in which every block is measured before the first draw [T_p]. They use
    up steps and data of the script. null: 10, or as many as reach every block: when gradients are
    accumulated, blocks are probed `active_layers` at a time. 0: start with equal importance. null or 0 for
    `lisa` and `cyclic`."""

    sampling_period: int | None = key(_PERIOD_STEPS, whole(1) + " or null", ge=1, le=LARGEST)
    """Applied optimizer steps between two draws [T_s]. null: draw once and stay."""

    refresh_period: int | None = key(_PERIOD_STEPS, whole(1) + " or null", ge=1, le=LARGEST)
    """Applied optimizer steps between two refreshes of importance [T_u], a multiple of `sampling_period`.
    null: never. Left out: 50, rounded up to a multiple of the `sampling_period` that was given; never, if
    that is null."""

    temperature: float = key(0.5, "a finite number above 0", gt=0)
    """Of the softmax over importance divided by its mean [tau]. Small: the largest wins; large: uniform."""

    ema: float = key(0.5, "a number above 0 and at most 1", gt=0, le=1)
    """Weight of the newest window when importance is refreshed [alpha]. 1: forget the past."""

    exploration: float = key(0.0, "a number from 0 to 1", ge=0, le=1)
    """Share of a uniform draw mixed into the probabilities [epsilon]."""

    seed: int = key(1234, whole(0, _LARGEST_SEED), ge=0, le=_LARGEST_SEED)
    """Of the sampler's own generator; the same on all ranks."""

    states: StatesConfig = key(StatesConfig(), "an object", write="{}")
    """See :class:`StatesConfig`."""

    log: LogConfig = key(LogConfig(), "an object", write="{}")
    """See :class:`LogConfig`."""

    @property
    def measures(self) -> bool:
        """Whether the policy needs the gradient norms of blocks."""
        return self.policy in ("grass", "static", "top_k")

    def check_layers(self, num_blocks: int) -> None:
        """Raise ``ValueError`` if more blocks are to be active than the model has."""
        if self.active_layers > num_blocks:
            raise ValueError(
                f"grass.active_layers is {self.active_layers} but the model has {num_blocks} layers; "
                f"use 1 to {num_blocks}"
            )

    def probe_steps_for(self, num_blocks: int, accumulation_steps: int) -> int:
        """The number of probe steps for this model, with null resolved; 0 for policies that do not measure.

        With accumulation the norm of a summed gradient cannot be had from freed parts, so blocks are probed
        in turn and the steps must reach all of them. Raises ``ValueError`` when too few were given.
        """
        if not self.measures:
            return 0
        enough = self.turns_for(num_blocks) if accumulation_steps > 1 else 1
        if self.probe_steps is None:
            return max(_PROBE_STEPS, enough)
        if 0 < self.probe_steps < enough:
            raise ValueError(
                f"grass.probe_steps is {self.probe_steps}, too few to probe {num_blocks} layers "
                f"{self.active_layers} at a time, as gradient_accumulation_steps {accumulation_steps} asks "
                f'for; allowed: 0, null or at least {enough}; write "probe_steps": {enough}'
            )
        return self.probe_steps

    def turns_for(self, num_blocks: int) -> int:
        """Steps that reach every block, `active_layers` of them at a time."""
        return math.ceil(num_blocks / self.active_layers)

    @model_validator(mode="before")
    @classmethod
    def _follow_sampling_period(cls, block: Any) -> Any:
        """Fit a refresh_period that was left out to the sampling_period that was given."""
        if not isinstance(block, dict) or "refresh_period" in block:
            return block
        period = block.get("sampling_period", _PERIOD_STEPS)
        if period is None:
            return {**block, "refresh_period": None}
        if type(period) is int and 1 <= period <= LARGEST:
            return {**block, "refresh_period": _round_up(_PERIOD_STEPS, period)}
        return block

    @model_validator(mode="after")
    def _check_keys_together(self) -> GrassConfig:
        sampling, refresh, probe = self.sampling_period, self.refresh_period, self.probe_steps
        if refresh is not None and sampling is None:
            raise ValueError(
                f"grass.refresh_period is {refresh} but grass.sampling_period is null, so nothing is drawn "
                'after a refresh; allowed: null; write "refresh_period": null'
            )
        if refresh is not None and refresh % sampling:
            raise ValueError(
                f"grass.refresh_period is {refresh}; allowed: a multiple of grass.sampling_period, which is "
                f'{sampling}, or null; write "refresh_period": {_round_up(refresh, sampling)}'
            )
        if probe and not self.measures:
            raise ValueError(
                f'grass.probe_steps is {probe} but grass.policy is "{self.policy}", which measures nothing; '
                'allowed: null or 0; write "probe_steps": null'
            )
        if probe == 0 and self.measures and (refresh is None or self.policy == "static"):
            raise ValueError(
                f'grass.probe_steps is 0 and nothing is refreshed, so policy "{self.policy}" would never learn what a '
                'layer matters; allowed: null or at least 1; write "probe_steps": null'
            )
        return self


def parse_block(block: object) -> GrassConfig:
    """The parsed ``grass`` block. Raises ``ValueError`` with one line about the first key that is wrong."""
    return parse(block, GrassConfig, "grass", '{"active_layers": 2}')


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
