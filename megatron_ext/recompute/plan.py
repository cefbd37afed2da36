"""What each layer of each pipeline stage does with its activations, and the file that keeps it.

Contract: a plan is data. It names a choice for every layer of every chunk (a pipeline rank's virtual stage): ``none``,
everything is kept; ``full``, the layer runs again in backward; or modules of Megatron-core's selective recomputation,
joined by ``+``. One layer of a pipeline rank may do one thing for some micro-batches and another for the rest: a
:class:`Share`. The JSON file holds the plan with what it was made from; one of another version or job is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.versioned_json import read_versioned, write_whole

NONE, FULL = "none", "full"
MODULES = ("core_attn", "layernorm", "mlp", "mla_up_proj", "moe", "moe_act", "shared_experts")
"""Names of Megatron-core's ``recompute_modules`` that a layer's choice may join."""

FORMAT = "megatron_ext.recompute.plan"
VERSION = 1
KEY = "megatron_ext.recompute.plan.load"


def parse_choice(choice: str) -> tuple[str, ...]:
    """The modules of a choice, () for none and full. Raises ValueError."""
    if choice in (NONE, FULL):
        return ()
    modules = tuple(choice.split("+")) if isinstance(choice, str) else ()
    unknown = [name for name in modules if name not in MODULES]
    if not modules or unknown or len(set(modules)) < len(modules):
        raise ValueError(
            f"a layer's recomputation is {choice!r}; allowed: {NONE}, {FULL}, or each once and joined by +: "
            f"{', '.join(MODULES)}"
        )
    return modules


def join_choice(modules: Sequence[str]) -> str:
    """The one spelling of a set of modules."""
    return "+".join(name for name in MODULES if name in modules) or NONE


@dataclass(frozen=True)
class Share:
    """Layer `layer` of the chunk does `choice` in `micro_batches` of any `window` in a row, and its own in the rest."""

    layer: int
    choice: str
    micro_batches: int
    window: int

    def __post_init__(self) -> None:
        parse_choice(self.choice)
        for key in ("layer", "micro_batches", "window"):
            _integer(f"a share's {key}", getattr(self, key))
        if not 0 < self.micro_batches < self.window:
            raise ValueError(
                f"a share has {self.micro_batches} of {self.window} micro-batches; allowed: more than none and fewer "
                "than all"
            )

    def holds(self, number: int) -> bool:
        """Whether the chunk's pass `number`, counted from 0, is one of them."""
        return number % self.window < self.micro_batches


@dataclass(frozen=True)
class ChunkPlan:
    """The layers of one chunk, first to last."""

    layers: tuple[str, ...]
    share: Share | None = None

    def __post_init__(self) -> None:
        for choice in self.layers:
            parse_choice(choice)
        if self.share is not None and not 0 <= self.share.layer < len(self.layers):
            raise ValueError(
                f"a share is of layer {self.share.layer} but the chunk has {len(self.layers)} layers"
            )

    def choice(self, layer: int, number: int) -> str:
        """What `layer` does in the chunk's pass `number`."""
        if self.share is not None and self.share.layer == layer and self.share.holds(number):
            return self.share.choice
        return self.layers[layer]

    def always_in_full(self) -> list[bool]:
        """Of each layer, whether it runs again in full in every pass."""
        always = [choice == FULL for choice in self.layers]
        if self.share is not None:
            always[self.share.layer] &= self.share.choice == FULL
        return always

    def digest(self) -> str:
        """Twelve hex digits to compare between ranks that replay collectives together."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class RecomputePlan:
    """All chunks of a job, by (pipeline rank, virtual stage)."""

    policy: str
    chunks: Mapping[tuple[int, int], ChunkPlan]
    job: Mapping[str, Any] = field(default_factory=dict)
    """What the plan was made for: stages, layers, micro-batches, sizes."""
    measured: Mapping[tuple[int, int], Mapping[str, Any]] = field(default_factory=dict)
    """Bytes and seconds that it was made from."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        stages = [
            {
                "pipeline_rank": rank,
                "virtual_stage": stage,
                "layers": list(chunk.layers),
                "share": None if chunk.share is None else asdict(chunk.share),
                "measured": dict(self.measured.get((rank, stage), {})),
            }
            for (rank, stage), chunk in sorted(self.chunks.items())
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "policy": self.policy,
            "versions": dict(self.versions),
            "job": dict(self.job),
            "stages": stages,
        }

    def save(self, path: str | Path) -> None:
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")


def load_plan(path: str | Path, chunks: Mapping[tuple[int, int], int], key: str = KEY) -> RecomputePlan:
    """The plan of a file. `chunks`: how many layers each chunk of this job has. Raises ValueError that names `key`."""
    found = read_plan(path, key)
    layers = {place: len(chunk.layers) for place, chunk in found.chunks.items()}
    if layers != dict(chunks):
        raise ValueError(
            f"{key} is {str(path)!r}, made for {_described(layers)}, but this job has {_described(chunks)}; start with "
            "the same pipeline, or without the file"
        )
    return found


def read_plan(path: str | Path, key: str = KEY) -> RecomputePlan:
    """The plan of a file, for whichever job it was made. Raises ValueError that names `key`."""
    content = read_versioned(path, key, FORMAT, VERSION, noun="plan", again="save a new plan")
    try:
        return _parsed(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{key} is {str(path)!r}, which is wrong: {cause}; save a new plan") from None


def _parsed(content: dict[str, Any]) -> RecomputePlan:
    chunks, measured = {}, {}
    for stage in content["stages"]:
        rank, number = (_integer(key, stage[key]) for key in ("pipeline_rank", "virtual_stage"))
        place = rank, number
        if place in chunks:
            raise ValueError(f"pipeline rank {place[0]}, virtual stage {place[1]} stands there twice")
        share = None if stage.get("share") is None else Share(**stage["share"])
        chunks[place] = ChunkPlan(tuple(stage["layers"]), share)
        measured[place] = dict(stage.get("measured") or {})
    return RecomputePlan(
        content["policy"], chunks, content.get("job") or {}, measured, content.get("versions") or {}
    )


def _integer(key: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise ValueError(f"{key} is {given!r}; allowed: an integer")
    return given


def _described(layers: Mapping[tuple[int, int], int]) -> str:
    return ", ".join(
        f"{count} layers on stage {rank}.{stage}" for (rank, stage), count in sorted(layers.items())
    )
