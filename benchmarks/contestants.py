"""What `step.py` compares: each contestant is a model, an optimizer and one function that makes a training step.

All get the same weights, the same batches and the same clipping, and train the same number of blocks at a time with
everything outside the blocks always training, so that they differ in the method alone:

    plain             DeepSpeed with torch AdamW, every parameter
    lisa              the same engine; a callback sets `requires_grad` on randomly drawn blocks, as LISA is done in
                      trainers. The engine knows nothing of it: states of all blocks stay on the device, and blocks
                      that rest still move, by weight decay and old momentum.
    badam             the `badam` package on plain torch; its states are dropped at each switch
    grass-*           this package, by the `grass` block in the config and nothing else
"""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ADAMW = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
CLIP = 1.0
PROBE_STEPS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Contestant:
    """`step(batch)` makes one optimizer step on int64 (batch, sequence) tokens."""

    name: str
    model: nn.Module
    step: Callable[[Tensor], None]
    measuring_seconds: Callable[[], float] = field(default=lambda: 0.0)
    """Spent so far on norms, importance and draws."""
    switching_seconds: Callable[[], float] = field(default=lambda: 0.0)
    """Spent so far on exchanging the active set."""
    telemetry_seconds: Callable[[], float] = field(default=lambda: 0.0)
    """Spent so far on the log, the loss and the probe's bar."""
    host_bytes: Callable[[], int] = field(default=lambda: 0)
    """Host memory of optimizer states."""


def names(settings: Namespace) -> list[str]:
    """Contestants that can take part with these settings."""
    chosen = ["plain", "lisa", "badam", "grass-resident", "grass-stream", "grass-bf16"]
    return [*chosen, "grass-stochastic"] if settings.dtype == "bf16" else chosen


def build(name: str, settings: Namespace) -> Contestant:
    """A contestant, ready for its first step. ValueError for an unknown name."""
    model = make_model(settings)
    if name == "badam":
        return build_badam(model, settings)
    if name == "plain":
        return build_engine(name, model, settings, grass=None)
    if name == "lisa":
        return build_lisa(model, settings)
    if name in GRASS_STATES:
        block = {
            "active_layers": settings.active,
            "sampling_period": settings.period,
            "refresh_period": settings.period,
            "probe_steps": PROBE_STEPS,
            "states": GRASS_STATES[name],
            "log": {"path": str(Path(tempfile.mkdtemp(prefix="grass-step-")) / "grass.jsonl")},
        }
        return build_engine(name, model, settings, grass=block)
    raise ValueError(f"no contestant is called {name!r}; there are {', '.join(names(settings))}")


GRASS_STATES: dict[str, dict[str, Any]] = {
    "grass-resident": {"mode": "resident"},
    "grass-stream": {"mode": "stream"},
    "grass-bf16": {"mode": "resident", "dtype": "bf16"},
    "grass-stochastic": {"mode": "resident", "dtype": "bf16", "master_weights": False},
}


def make_model(settings: Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 11 // 4,
        num_hidden_layers=settings.blocks,
        num_attention_heads=max(1, settings.hidden // 64),
        max_position_embeddings=max(2048, settings.sequence),
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(settings.device, DTYPES[settings.dtype])
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def build_engine(
    name: str, model: nn.Module, settings: Namespace, grass: dict[str, Any] | None
) -> Contestant:
    import deepspeed

    if grass is not None:
        import ds_grass  # noqa: F401  puts the hook in place where the entry point is not installed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        # DeepSpeed's default bucket of 5e8 elements would be the largest thing on the device; this is one block
        "zero_optimization": {"stage": settings.stage, "reduce_bucket_size": block_numel(model)},
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
    }
    if settings.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if grass is not None:
        config["grass"] = grass
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]

    def step(batch: Tensor) -> None:
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()

    contestant = Contestant(name, engine, step)
    if grass is not None:
        core = engine.optimizer.core
        contestant.measuring_seconds = lambda: core.measuring_time.seconds
        contestant.switching_seconds = lambda: core.switch_time.seconds
        contestant.telemetry_seconds = lambda: core.journal.time.seconds
        contestant.host_bytes = lambda: core.store.counters["host_bytes"]
    return contestant


def block_numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def build_lisa(model: nn.Module, settings: Namespace) -> Contestant:
    contestant = build_engine("lisa", model, settings, grass=None)
    engine_step, blocks = contestant.step, list(model.model.layers)
    generator, steps_done = random.Random(0), 0

    def step(batch: Tensor) -> None:
        nonlocal steps_done
        if steps_done % settings.period == 0:
            chosen = generator.sample(range(len(blocks)), settings.active)
            for index, block in enumerate(blocks):
                block.requires_grad_(index in chosen)
        steps_done += 1
        engine_step(batch)

    contestant.step = step
    return contestant


def build_badam(model: nn.Module, settings: Namespace) -> Contestant:
    from badam import BlockOptimizer

    base = torch.optim.AdamW(model.parameters(), **{**ADAMW, "betas": tuple(ADAMW["betas"])})
    starts = range(0, settings.blocks, settings.active)
    groups = [
        [f"model.layers.{i}." for i in range(s, min(s + settings.active, settings.blocks))] for s in starts
    ]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a page of names when the weights are fp32
        optimizer = BlockOptimizer(
            base_optimizer=base,
            named_parameters_list=list(model.named_parameters()),
            block_prefix_list=groups,
            active_modules=["embed_tokens", "model.norm.", "lm_head"],
            switch_block_every=settings.period,
            switch_mode="random",
            verbose=0,
        )

    def step(batch: Tensor) -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer.step()
        optimizer.zero_grad()

    return Contestant("badam", model, step)
