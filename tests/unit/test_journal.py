"""Contracts of what is told while a job runs: when there is a line, what it holds, and that the first rank tells it."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from ds_grass.telemetry import probe_bar
from ds_grass.telemetry.log_cut import PLACE
from ds_grass.telemetry.loss_meter import LossMeter
from ds_grass.telemetry.probe_bar import ProbeBar
from ds_grass.telemetry.scalars import events, trainer_logs
from tests.made_logs import MadeRun

LINE = {
    "phase": "train",
    "active": [0, 2],
    "loss": 1.5,
    "effective_blocks": 2.5,
    "importance": [0.1, math.nan, 0.3],
    "probabilities": [0.2] * 12,
    "states": {"mode": "resident", "bytes_to_host": 7, "wait_seconds": 0.25},
    "names": ["a", "c"],
}


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


# -- scalars


def test_events_are_labels_floats_and_samples():
    told = {label: value for label, value, samples in events(LINE, 64) if samples == 64}
    assert len(told) == len(events(LINE, 64)) == 6 + 2 + 12
    assert told["Train/GRASS/loss"] == 1.5
    assert told["Train/GRASS/phase_probe"] == 0.0
    assert told["Train/GRASS/active_layers"] == 2.0
    assert told["Train/GRASS/bytes_to_host"] == 7.0
    assert told["Train/GRASS/importance/block_2"] == 0.3
    assert told["Train/GRASS/probability/block_11"] == told["Train/GRASS/probability/block_00"] == 0.2
    assert all(type(value) is float and math.isfinite(value) for value in told.values())


def test_events_of_a_line_without_numbers_are_none():
    assert (
        events({"importance": None, "probabilities": [], "effective_blocks": None, "loss": math.nan}, 0) == []
    )


def test_trainer_logs_have_names_of_their_own():
    told = trainer_logs(LINE)
    assert told == {
        "grass_phase_probe": 0.0,
        "grass_active_layers": 2.0,
        "grass_effective_blocks": 2.5,
        "grass_bytes_to_host": 7.0,
        "grass_wait_seconds": 0.25,
    }


# -- the loss


def test_loss_is_the_mean_over_steps_of_the_sum_of_micro_batches():
    meter = LossMeter()
    for step in (1.0, 3.0):
        for micro in (0.25, 0.75):
            meter.add(torch.tensor(step * micro, requires_grad=True))
        meter.end_step()
    assert meter.take() == 2.0
    assert meter.take() is None


def test_loss_leaves_the_scripts_tensor_and_graph_alone():
    meter, weight = LossMeter(), torch.ones((), requires_grad=True)
    loss = weight * 2
    meter.add(loss)
    meter.add(loss)
    meter.end_step()
    assert meter.take() == 4.0
    assert loss.item() == 2.0
    assert meter._sum is None


def test_loss_of_any_shape_and_dtype_of_one_element_counts_and_nothing_else():
    meter = LossMeter()
    for loss in (torch.ones(1, dtype=torch.bfloat16), None, torch.ones(2), 5.0, torch.ones(1, 1)):
        meter.add(loss)
    meter.end_step()
    meter.end_step()  # a step whose losses were not seen
    assert meter.take() == 2.0


def test_loss_that_is_not_finite_is_told_as_it_is(tmp_path: Path):
    run = MadeRun(tmp_path / "a.jsonl", sampling_period=None, refresh_period=None)
    run.journal.saw_loss(torch.tensor(math.nan))
    run.train(1)
    assert lines(tmp_path / "a.jsonl")[-1]["loss"] == "nan"


# -- lines


def test_every_line_can_be_placed(tmp_path: Path):
    run = MadeRun(tmp_path / "a.jsonl", num_blocks=5)
    run.train(80)
    run.journal.skipped(["model.layers.1"])
    run.journal.saved(tag="step80", seconds=0.5)
    run.resume(run.save())
    run.train(81)
    found = lines(tmp_path / "a.jsonl")
    assert {line["event"] for line in found} >= {"start", "draw", "skipped", "saved", "resume"}
    for line in found:
        assert all(isinstance(line[name], int) for name in PLACE), line
    assert found[0]["planned_probe_steps"] == 4
    assert "telemetry_seconds" in found[1]


@pytest.mark.parametrize(("period", "steps"), [(None, (50, 100, 150)), (70, (50, 120)), (50, ()), (20, ())])
def test_short_lines_fill_stretches_of_fifty_steps(tmp_path: Path, period, steps):
    """A run that draws once has a loss curve too; one that draws often is not told twice."""
    run = MadeRun(
        tmp_path / "a.jsonl", policy="cyclic", probe_steps=None, sampling_period=period, refresh_period=None
    )
    run.values.random = lambda: 0.9  # no step is skipped
    run.train(150)
    told = [line for line in lines(tmp_path / "a.jsonl") if line["event"] == "step"]
    assert tuple(line["applied_steps"] for line in told) == steps
    for line in told:
        assert 2.0 < line["loss"] < 6.0
        assert "active" not in line
        assert len(json.dumps(line)) < 1200


def test_monitor_is_sent_lines_when_the_step_has_ended(tmp_path: Path):
    run, sent = MadeRun(tmp_path / "a.jsonl"), []
    run.journal._send = sent.append
    ended, in_between = run.journal.end_step, []
    run.journal.end_step = lambda: (in_between.append(len(sent)), ended())
    run.train(25)
    drawn = [line["applied_steps"] for line in sent if "active" in line]
    assert drawn == [0, 25]
    assert in_between[4] == 1  # the draw that ended the probe was sent by the end of its own step
    assert in_between[3] == 0


def test_monitor_is_served_without_a_log(tmp_path: Path):
    run, sent = MadeRun(tmp_path / "a.jsonl"), []
    run.journal._send = sent.append
    run.journal.log.close()
    run.train(25)
    assert [line["applied_steps"] for line in sent] == [0, 25]


def test_other_ranks_tell_nothing(tmp_path: Path):
    run = MadeRun(tmp_path / "a.jsonl")
    run.journal.tells, before = False, (tmp_path / "a.jsonl").read_bytes()
    run.train(60)
    run.journal.skipped(["x"])
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert (run.journal.time.calls, run.journal.loss.take()) == (1, None)  # the start line


def test_end_of_the_probe_is_one_line_on_the_console(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        run = MadeRun(tmp_path / "a.jsonl")
        run.train(60)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("grass: probed for 4 steps in ")
    assert "effective number of blocks" in message
    assert message.endswith(", ".join(lines(tmp_path / "a.jsonl")[1]["names"]))


def test_probe_resumed_in_its_middle_is_told_by_the_process_that_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first = MadeRun(tmp_path / "a.jsonl")
    first.controller.advance({block: 1.0 for block in first.controller.active})
    saved = first.save()
    second = MadeRun(tmp_path / "a.jsonl")
    with caplog.at_level(logging.INFO):
        second.resume(saved)
        second.train(1)
    assert len(caplog.records) == 1
    assert [line["event"] for line in lines(tmp_path / "a.jsonl")] == ["start", "resume", "draw"]


def test_checkpoint_without_the_key_begins_no_other_run(tmp_path: Path):
    run = MadeRun(tmp_path / "a.jsonl")
    run_id = run.journal.log.run_id
    run.resume({**run.save(), "log": None})
    run.train(1)
    assert [line["run_id"] for line in lines(tmp_path / "a.jsonl")] == [run_id] * 3


def test_checkpoint_loaded_and_not_trained_from_leaves_the_log_as_it_is(tmp_path: Path):
    """As the Trainer does with its best weights at the end; what is saved then is still of that run."""
    run = MadeRun(tmp_path / "a.jsonl")
    run.train(30)
    saved, run_id = run.save(), run.journal.log.run_id
    run.train(80)
    before = (tmp_path / "a.jsonl").read_bytes()
    run.resume(saved)
    run.journal.saved(tag="end")
    assert run.save()["log"] == {"run_id": run_id}
    run.journal.close()
    assert (tmp_path / "a.jsonl").read_bytes() == before
    other = MadeRun(tmp_path / "b.jsonl")
    other.resume(saved)
    assert other.save()["log"] == {"run_id": run_id}


# -- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_draws_on_a_terminal_and_vanishes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    bar = ProbeBar()
    bar.show(3, 10)
    assert bar.is_open
    text = sys.stderr.getvalue()
    assert "3/10" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor must not stay hidden"
    bar.close()
    bar.close()
    assert not bar.is_open
    assert sys.stderr.getvalue().endswith("\x1b[2K")  # the line is erased
    bar.show(1, 4)
    assert "1/4" in sys.stderr.getvalue()
    bar.close()


def test_bar_is_drawn_ten_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = iter([0.0, 100.0, 100.05, 100.09, 100.2])
    monkeypatch.setattr(probe_bar.time, "monotonic", lambda: next(clock, 100.3))
    bar = ProbeBar()
    bar._drawn_at = -1.0
    for done in range(1, 6):
        bar.show(done, 9)
    drawn = [done for done in range(1, 6) if f"{done}/9" in sys.stderr.getvalue()]
    assert drawn[0] == 1
    assert len(drawn) < 5
    bar.close()


def test_bar_is_nothing_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = ProbeBar()
    bar.show(1, 2)
    assert (bar.is_open, sys.stderr.getvalue()) == (False, "")
    bar.close()


def test_bar_forgotten_by_its_engine_is_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    bar = ProbeBar()
    bar.show(1, 2)
    del bar
    assert sys.stderr.getvalue().endswith("\x1b[2K")


# -- its cost


def test_a_step_that_tells_nothing_costs_microseconds(tmp_path: Path):
    """What is paid at every step; lines come on top, at most one in `sampling_period` steps."""
    run = MadeRun(tmp_path / "a.jsonl", policy="cyclic", probe_steps=None, refresh_period=None)
    journal, loss = run.journal, torch.tensor(2.0)

    def best_of(repeats: int) -> float:
        costs = []
        for _ in range(repeats):
            begin = time.process_time()
            for _ in range(40):
                journal.saw_loss(loss)
                journal.begin_step()
                journal.end_step()
            journal._steps_since_line = 0
            costs.append((time.process_time() - begin) / 40)
        return min(costs)

    assert best_of(20) < 200e-6
