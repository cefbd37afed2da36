"""What a run tells: every line reaches the monitor once, losses are those of backward, a resumed run is one run."""

from __future__ import annotations

import csv
import io
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch.distributed as dist

from tests import models
from tests.distributed import jobs
from tests.distributed.cases_universal import UNIVERSAL, convert_together
from tests.distributed.harness import Context
from tests.distributed.registry import case

STAGES = (0, 1, 2, 3)
PROBE, PERIOD, STEPS = 2, 3, 9  # steps in all: draws after 0, 3 and 6 applied steps
SCALARS_OF_A_DRAW = 19
BLOCKS = 4


def _lines(*events: str) -> list[dict]:
    lines = [json.loads(line) for line in Path("grass.jsonl").read_text().splitlines()]
    return [line for line in lines if not events or line["event"] in events]


# -- the monitor -----------------------------------------------------------------------------------------------------


class _Recorded:
    """Stands for the packages `wandb` and `comet_ml`: keeps what it is given as (label, value, samples)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float, int]] = []

    def modules(self) -> dict[str, ModuleType]:
        wandb, comet = ModuleType("wandb"), ModuleType("comet_ml")
        wandb.init = lambda **_: None
        wandb.log = lambda data, step, commit: self.events.extend((k, v, step) for k, v in data.items())
        log = SimpleNamespace(__internal_api__log_metric__=self._log_metric, set_name=lambda name: None)
        comet.__version__, comet.start = "3.99.0", lambda **_: log
        return {"wandb": wandb, "comet_ml": comet}

    def _log_metric(self, name: str, value: float, step: int) -> None:
        self.events.append((name, value, step))


@contextmanager
def _installed(modules: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def _csv_events(folder: Path) -> list[tuple[str, float, int]]:
    found = []
    for path in folder.rglob("Train_GRASS_*.csv"):
        (_, label), *rows = csv.reader(path.read_text().splitlines())
        label = path.stem.replace("Train_GRASS_", "Train/GRASS/")
        label = label.replace("importance_", "importance/").replace("probability_", "probability/")
        found += [(label, float(value), int(step)) for step, value in rows]
    return found


def _tensorboard_events(folder: Path) -> list[tuple[str, float, int]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found = []
    for path in folder.rglob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            found += [(v.tag, float(make_ndarray(v.tensor)), event.step) for v in event.summary.value]
    return found


@case(
    most_quick=2,
    ranks=(1, 2),
    strength=1,
    stage=STAGES,
    monitor=("csv_monitor", "tensorboard", "wandb", "comet"),
)
def monitor_is_given_every_draw_once(ctx: Context, stage: int, monitor: str) -> None:
    """As many scalars as the lines hold, with their values, at the samples seen by then; also without a log."""
    if monitor == "tensorboard":
        pytest.importorskip("tensorboard")
    recorded = _Recorded()
    to_files = {"output_path": str(ctx.folder / "out"), "job_name": "job"}
    options = {"wandb": {}, "comet": {"samples_log_interval": 1}}.get(
        monitor, to_files
    )  # Comet's default is 100
    monitored = {monitor: {"enabled": True, **options}}
    job = jobs.Job(stage=stage, extra=monitored, grass={"probe_steps": PROBE, "sampling_period": PERIOD})
    model = job.build()  # its library looks for wandb, and would find a stub
    with _installed(recorded.modules()), jobs.engine_of(job, model=model) as engine:
        for number in range(STEPS):
            jobs.train_step(engine, job, ctx, number)
    dist.barrier()
    if ctx.rank != 0:
        assert recorded.events == []
        return
    read = {"csv_monitor": _csv_events, "tensorboard": _tensorboard_events}.get(monitor)
    told = recorded.events if read is None else read(ctx.folder / "out")
    told = sorted(event for event in told if event[0].startswith("Train/GRASS/"))
    lines = _lines("draw")
    assert len(lines) == 3
    assert len(told) == len({(label, samples) for label, _, samples in told})
    assert len(told) == 3 * (SCALARS_OF_A_DRAW + 2 * BLOCKS), len(told)
    for line in lines:
        samples = (PROBE + line["applied_steps"]) * job.rows * ctx.world_size
        values = {label: value for label, value, at in told if at == samples}
        assert values["Train/GRASS/applied_steps"] == line["applied_steps"]
        assert values["Train/GRASS/loss"] == pytest.approx(line["loss"])
        assert values["Train/GRASS/bytes_to_host"] == pytest.approx(line["states"]["bytes_to_host"])
        for block in range(BLOCKS):
            for label, key in (("importance", "importance"), ("probability", "probabilities")):
                assert values[f"Train/GRASS/{label}/block_{block}"] == pytest.approx(line[key][block])


# -- the loss --------------------------------------------------------------------------------------------------------


@case(
    ranks=(1, 2),
    strength=1,
    stage=STAGES,
    dtype=("fp32", "bf16"),
    accumulation=(1, 2),
    style=("engine", "loss"),
)
def loss_of_a_line_is_the_mean_of_what_went_into_backward(
    ctx: Context, stage: int, dtype: str, accumulation: int, style: str
) -> None:
    """Since the line before, on the first rank; absent where the script calls `loss.backward()` itself."""
    job = jobs.Job(stage=stage, dtype=dtype, accumulation=accumulation, grass={"sampling_period": PERIOD})
    losses: dict[int, list[float]] = {}
    with jobs.engine_of(job) as engine:
        grass = jobs.controller(engine)
        for number in range(STEPS):
            seen = jobs.train_step(engine, job, ctx, number, style=style).losses
            at = -(-grass.counters["applied_steps"] // PERIOD) * PERIOD  # of the line that will tell of it
            losses.setdefault(at, []).extend(seen)
    dist.barrier()
    if ctx.rank != 0:
        return
    told = {line["applied_steps"]: line.get("loss") for line in _lines("draw")}
    assert list(told) == [0, 3, 6]
    for at, value in told.items():
        expected = sum(losses[at]) / len(losses[at])
        assert (value is None) if style == "loss" else value == pytest.approx(expected, rel=1e-5)


# -- resuming --------------------------------------------------------------------------------------------------------


@case(most_quick=2, ranks=(1, 2), strength=1, stage=STAGES, save_after=(1, 4, 7), universal=(False, True))
def resumed_run_is_one_run_in_the_log(ctx: Context, stage: int, save_after: int, universal: bool) -> None:
    """Saved while probing, and in the middle of two periods; another run's lines in between stay as they are."""
    job = jobs.Job(stage=stage, grass={"probe_steps": PROBE, "sampling_period": PERIOD})
    foreign = '{"run_id": "another", "event": "draw", "applied_steps": 99}\n'
    with jobs.engine_of(job) as engine:
        for number in range(save_after):
            jobs.train_step(engine, job, ctx, number)
        engine.save_checkpoint(str(ctx.folder / "saved"), tag="middle")
        for number in range(save_after, STEPS):
            if ctx.rank == 0 and number == save_after:
                with Path("grass.jsonl").open("a") as file:
                    file.write(foreign)
            jobs.train_step(engine, job, ctx, number)
    dist.barrier()
    whole = _lines() if ctx.rank == 0 else []
    dist.barrier()
    if universal:
        convert_together(ctx, ctx.folder / "saved" / "middle")
    resumed_job = jobs.replace(job, extra=UNIVERSAL if universal else {})
    with jobs.engine_of(resumed_job) as engine:
        engine.load_checkpoint(str(ctx.folder / "saved"), tag="middle_universal" if universal else "middle")
        for number in range(save_after, STEPS):
            jobs.train_step(engine, job, ctx, number)
    dist.barrier()
    if ctx.rank != 0:
        return
    lines = _lines()
    assert Path("grass.jsonl").read_text().count(foreign) == 1
    assert all(
        {"probe_steps", "applied_steps", "skipped_steps"} <= line.keys() for line in lines if "tag" in line
    )
    assert [line["event"] for line in lines].count("saved") == 1
    ours = [line for line in lines if line["run_id"] != "another"]
    assert len({line["run_id"] for line in ours}) == 1
    assert [line["event"] for line in ours].count("start") == 1
    (resumed,) = [line for line in ours if line["event"] == "resume"]
    applied = max(save_after - PROBE, 0)
    assert (resumed["probe_steps"], resumed["applied_steps"]) == (min(save_after, PROBE), applied)
    assert resumed["num_ranks"] == ctx.world_size
    draws, before = (
        [line for line in part if line["event"] == "draw" and "active" in line] for part in (ours, whole)
    )
    assert len(draws) == 3
    for line, twin in zip(draws, before, strict=True):
        for key in ("applied_steps", "active", "visits", "draws", "importance"):
            assert line[key] == twin[key], key


# -- its cost --------------------------------------------------------------------------------------------------------


@case(ranks=(1,), stage=(2,))
def telling_costs_less_than_half_a_percent_of_a_step(ctx: Context, stage: int) -> dict:
    """A line every ten steps, with the median of steps with and without one: other jobs share the machine."""
    period = 10
    options = {"layers": 6, "hidden": 64}
    grass = {"policy": "cyclic", "probe_steps": None, "sampling_period": period, "refresh_period": None}
    job = jobs.Job(stage=stage, rows=4, length=48, model_options=options, grass=grass)
    steps, told, quiet = [], [], []
    with jobs.engine_of(job) as engine:
        own = engine.optimizer.core.journal.time
        for number in range(4 * period):
            draws, before = jobs.controller(engine).counters["draws"], own.seconds
            begin = time.perf_counter()
            jobs.train_step(engine, job, ctx, number)
            steps.append(time.perf_counter() - begin)
            drew = jobs.controller(engine).counters["draws"] > draws
            (told if drew else quiet).append(own.seconds - before)
    assert len(told) == 4
    own_seconds = statistics.median(quiet) + statistics.median(told) / period
    share = own_seconds / statistics.median(steps)
    assert share < 0.005, f"{share:.2%} of {statistics.median(steps):.3f} s"
    return {"share": share}


# -- the probe -------------------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def _console(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[_Terminal, list[str]]]:
    """Standard error as a terminal, and what `ds_grass` logs at INFO."""
    terminal, messages = _Terminal(), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("ds_grass")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    try:
        yield terminal, messages
    finally:
        logger.removeHandler(handler)


@case(most_quick=2, ranks=(1, 2), strength=1, stage=STAGES, end=("trained", "destroyed", "failed", "resumed"))
def probe_shows_how_far_it_is_and_leaves_no_bar(ctx: Context, stage: int, end: str) -> None:
    """Four steps of probing on a terminal, ended in each way that there is; nothing on other ranks."""
    job = jobs.Job(stage=stage, grass={"probe_steps": 4})
    with pytest.MonkeyPatch.context() as monkeypatch, _console(monkeypatch) as (terminal, messages):
        with jobs.engine_of(job) as engine:
            bar = engine.optimizer.core.journal.bar
            for number in range(3):
                jobs.train_step(engine, job, ctx, number)
            assert bar.is_open == (ctx.rank == 0)
            if end == "failed":
                monkeypatch.setattr(engine.optimizer.core, "step", lambda *_, **__: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    jobs.train_step(engine, job, ctx, 3)
            elif end == "resumed":
                engine.save_checkpoint(str(ctx.folder / "saved"), tag="middle")
                engine.load_checkpoint(str(ctx.folder / "saved"), tag="middle")
                assert not bar.is_open
            if end in ("trained", "resumed"):
                for number in range(3, 5):
                    jobs.train_step(engine, job, ctx, number)
            if end != "destroyed":
                assert not bar.is_open
        assert not bar.is_open
    told = [message for message in messages if message.startswith("grass: probed for 4 steps in ")]
    assert len(told) == (ctx.rank == 0 and end in ("trained", "resumed"))
    assert ("GRASS probes" in terminal.getvalue()) == (ctx.rank == 0)
    assert "\x1b[?25l" not in terminal.getvalue().split("\x1b[?25h")[-1], "the cursor was left hidden"


@case(ranks=(1, 2), strength=1, stage=STAGES)
def probe_that_goes_on_in_turns_says_so_once(ctx: Context, stage: int) -> None:
    """Two backward passes a step: found out at the first step, in one line on the first rank."""
    job = jobs.Job(
        stage=stage, model="stack", model_options={"rounds": 2, "checkpoint": "reentrant", "tied": False}
    )
    with pytest.MonkeyPatch.context() as monkeypatch, _console(monkeypatch) as (_, messages):
        with jobs.engine_of(job) as engine:
            for number in range(6):
                jobs.train_step(engine, job, ctx, number)
            assert jobs.controller(engine).probes_in_turns
    told = [message for message in messages if "gradients come in parts" in message]
    assert (
        told
        == ["grass: gradients come in parts, so the probe measures 2 of 4 blocks a step: 2 steps in all"][
            : ctx.rank == 0
        ]
    )


# -- the Trainer -----------------------------------------------------------------------------------------------------


@case(ranks=(1, 2), strength=1, stage=(1, 2, 3))
def trainer_log_has_the_numbers_of_the_engine(ctx: Context, stage: int) -> None:
    """The hook on the Trainer, given a real engine: a training log is added to, others are not; the count is whole."""
    import transformers.trainer as hooked

    job = jobs.Job(stage=stage, grass={"probe_steps": PROBE, "sampling_period": PERIOD})
    with jobs.engine_of(job) as engine:
        trainer = _trainer_of(engine)
        logs = []
        for number in range(4):
            jobs.train_step(engine, job, ctx, number)
            trainer.log({"loss": 1.0})
            trainer.log({"eval_loss": 1.0})
            logs += trainer.state.log_history[-2:]
        total = hooked.get_model_param_count(engine, trainable_only=True)
        store = engine.optimizer.core.store.counters
        assert logs[-2]["grass_bytes_to_host"] == store["bytes_to_host"]
    assert [log["grass_phase_probe"] for log in logs[::2]] == [1.0, 0.0, 0.0, 0.0]
    assert [log["grass_applied_steps"] for log in logs[::2]] == [0, 0, 1, 2]
    assert [log.get("grass_draws") for log in logs[::2]] == [0, 1, 1, 1]
    assert [log["grass_active_layers"] for log in logs[::2]] == [4, 2, 2, 2]
    assert all(set(log) == {"eval_loss", "step", "epoch"} for log in logs[1::2])
    assert total == sum(p.numel() for p in models.build("llama").parameters())


def _trainer_of(engine: object) -> object:
    """A Trainer with what its `log` reads, and nothing else: making a whole one changes the process for good."""
    from transformers.trainer import Trainer
    from transformers.trainer_callback import TrainerState

    trainer = Trainer.__new__(Trainer)
    trainer.state = TrainerState(epoch=0.0)
    trainer.args = SimpleNamespace(include_num_input_tokens_seen="no")
    trainer.callback_handler = SimpleNamespace(on_log=lambda *_: None)
    trainer.control, trainer.deepspeed, trainer.model_wrapped = None, engine, engine
    return trainer
