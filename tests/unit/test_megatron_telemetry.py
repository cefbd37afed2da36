"""Telemetry of megatron_ext: each plan is told once with what it should take, and later with what it took."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config import LogConfig, MegatronExtConfig
from megatron_ext.report import read_run
from megatron_ext.telemetry import Counters, StartFacts, Telemetry, layers_by_strategy, runs_of, start_line

REPOSITORY = Path(__file__).parents[2]
MIXED = ("megatron_ts", "megatron_ts", "metp")
FACTS = StartFacts(
    source="MEGATRON_EXT_CONFIG: ds_config.json",
    config=MegatronExtConfig().model_dump(),
    versions={"ds-grass": "0.1.0", "megatron-core": "0.16.1"},
    world_size=16,
    tensor_parallel=4,
    pipeline_parallel=2,
    data_parallel=2,
    num_layers=12,
    allowed=("megatron_ts", "ulysses"),
    refused={"metp": "2 KV heads cannot be shared by 4 ranks"},
    limit_bytes=80 * 2**30,
    cost_model="analytical, profiled at start",
)


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path):
    return tmp_path / "megatron_ext.jsonl"


def telemetry(path, *, enabled=True, is_writer=True, **options) -> Telemetry:
    return Telemetry(LogConfig(enabled=enabled, path=str(path)), is_writer=is_writer, **options)


def lines(path, event=None):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if event in (None, line["event"])]


def test_counters_add_up_by_strategy_length_and_phase():
    counters = Counters()
    for phase in ("forward", "recomputed", "backward", "forward"):
        counters.count("metp", 4096, phase)
    counters.count("ring", 128, "forward")
    snapshot = counters.snapshot()
    assert snapshot == {
        "metp": {4096: {"forward": 2, "backward": 1, "recomputed": 1}},
        "ring": {128: {"forward": 1, "backward": 0, "recomputed": 0}},
    }
    counters.count("metp", 4096, "forward")
    assert snapshot["metp"][4096]["forward"] == 2


def test_counters_are_empty_at_first():
    assert Counters().snapshot() == {}


@pytest.mark.parametrize(
    ("names", "runs", "layers"),
    [
        (("ring",) * 3, "3 x ring", {"ring": 3}),
        (("ring", "metp", "ring"), "1 x ring, 1 x metp, 1 x ring", {"ring": 2, "metp": 1}),
        (
            ["megatron_ts"] * 20 + ["metp"] * 12,
            "20 x megatron_ts, 12 x metp",
            {"megatron_ts": 20, "metp": 12},
        ),
        ((), "", {}),
    ],
)
def test_plan_is_told_as_runs(names, runs, layers):
    assert runs_of(names) == runs
    assert layers_by_strategy(names) == layers


def test_start_line_says_what_was_decided():
    line = start_line(FACTS)
    assert line.splitlines() == [line]
    parts = (
        "12 layers on this rank choose from megatron_ts, ulysses; not metp: 2 KV heads",
        "tensor parallel 4 x pipeline parallel 2 x data parallel 2 of 16 ranks",
        "80.00 GiB (85899345920 bytes)",
        "analytical, profiled at start",
        "MEGATRON_EXT_CONFIG: ds_config.json",
        "ds-grass 0.1.0, megatron-core 0.16.1",
    )
    assert all(part in line for part in parts)


def test_start_is_logged_and_said_by_the_writer_only(path, caplog):
    with caplog.at_level(logging.INFO, logger="megatron_ext"):
        telemetry(path, is_writer=False).start(FACTS)
        assert not caplog.records
        telemetry(path).start(FACTS)
    assert caplog.messages == [start_line(FACTS)]
    (line,) = lines(path)
    assert line["event"] == "start"
    assert line["refused"] == dict(FACTS.refused)
    assert line["config"]["sequence_parallel"]["smoothing"] == 0.02


def test_start_is_said_when_the_log_is_off(path, caplog):
    with caplog.at_level(logging.INFO, logger="megatron_ext"):
        telemetry(path, enabled=False).start(replace(FACTS, refused={}))
    assert len(caplog.messages) == 1
    assert not path.exists()


def test_null_path_is_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = Telemetry(LogConfig(), is_writer=True)
    monkeypatch.chdir("/")
    told.planned(1, 128, MIXED, seconds=1.0, peak_bytes=5)
    assert len(lines(tmp_path / "megatron_ext.jsonl")) == 1


def test_writer_is_decided_later_and_writes_where_it_would_have_written(tmp_path, monkeypatch):
    """Which rank has the model's first layer is known when its block is built; the script may have moved by then."""
    monkeypatch.chdir(tmp_path)
    told = Telemetry(LogConfig())
    told.planned(1, 64, MIXED, seconds=1.0, peak_bytes=5)
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir("/")
    for _ in range(2):
        told.become_writer()
        told.planned(1, 128, MIXED, seconds=1.0, peak_bytes=5)
    assert [line["length"] for line in lines(tmp_path / "megatron_ext.jsonl")] == [128]


def test_working_directory_that_was_deleted_ends_no_job(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    Telemetry(LogConfig(), is_writer=True).planned(1, 64, MIXED, seconds=1.0, peak_bytes=5)


def test_plan_is_told_once(path):
    told = telemetry(path)
    for _ in range(3):
        told.planned(2, 4096, MIXED, seconds=0.5, peak_bytes=1000, fits=False, documents=(4000, 96))
    told.planned(
        2, 4096, ["metp"] * 3, seconds=0.75, peak_bytes=900
    )  # another plan for the same length is news
    first, second = lines(path, "plan")
    expected = {"batch": 2, "length": 4096, "plan": "2 x megatron_ts, 1 x metp", "fits": False, "documents": 2,
                "longest": 4000, "predicted_seconds": 0.5, "predicted_bytes": 1000}  # fmt: skip
    assert expected.items() <= first.items()
    assert second["plan"] == "3 x metp"
    assert "documents" not in second


def test_summary_holds_the_median_beside_the_prediction(path):
    told = telemetry(path)
    told.planned(1, 64, MIXED, seconds=0.5, peak_bytes=1000)
    for seconds, peak_bytes in ((0.4, 900), (0.6, 1100), (9.0, 1100)):
        told.ran(1, 64, MIXED, seconds=seconds, peak_bytes=peak_bytes)
    told.ran(1, 64, list(MIXED))  # not measured
    told.counters.count("metp", 64, "forward")
    told.summarise()
    (summary,) = lines(path, "summary")
    expected = {"micro_batches": 4, "measured_seconds": 0.6, "measured_bytes": 1100, "predicted_seconds": 0.5,
                "predicted_bytes": 1000, "layers": {"megatron_ts": 2, "metp": 1}}  # fmt: skip
    assert expected.items() <= summary.items()
    (counted,) = lines(path, "counters")
    assert counted["calls"] == {"metp": {"64": {"forward": 1, "backward": 0, "recomputed": 0}}}


def test_plan_that_was_not_measured_has_no_median(path):
    told = telemetry(path)
    told.planned(1, 64, MIXED, seconds=0.5, peak_bytes=1000)
    told.ran(1, 64, MIXED)
    told.summarise()
    (summary,) = lines(path, "summary")
    assert (summary["measured_seconds"], summary["measured_bytes"]) == (None, None)


def test_summary_comes_from_time_to_time_and_holds_what_is_new(path):
    clock = Clock()
    told = telemetry(path, summary_seconds=60, clock=clock)
    for length in (64, 128):
        told.planned(1, length, MIXED, seconds=0.5, peak_bytes=1000)
        told.ran(1, length, MIXED)
    assert lines(path, "summary") == []
    clock.now = 60.0
    told.ran(1, 64, MIXED)
    assert [(line["length"], line["micro_batches"]) for line in lines(path, "summary")] == [(64, 2), (128, 1)]
    for now, told_times in ((179.0, []), (180.0, [4]), (419.0, [4]), (420.0, [4, 6])):  # later and later
        clock.now = now
        told.ran(1, 64, MIXED)
        assert [line["micro_batches"] for line in lines(path, "summary")[2:]] == told_times
    clock.now = 1e6
    told.ran(1, 64, MIXED)
    clock.now += 3600.0  # but every hour
    told.ran(1, 64, MIXED)
    assert len(lines(path, "summary")[2:]) == 4


def run_three_hours(path) -> None:
    """A micro-batch an hour, of two lengths."""
    clock = Clock()
    told = telemetry(path, summary_seconds=60, clock=clock)
    for length in (64, 128, 64):
        told.planned(1, length, ["ring"], seconds=0.5, peak_bytes=1000)
        told.counters.count("ring", length, "forward")
        clock.now += 3600.0
        told.ran(1, length, ["ring"])
    told.close()


def test_counters_tell_what_changed_and_everything_at_the_end(path):
    """A line for every minute with every length that ever came would make the log grow with the square of a job."""
    run_three_hours(path)
    found = [
        (
            {int(length): phases["forward"] for length, phases in line["calls"]["ring"].items()},
            line["complete"],
        )
        for line in lines(path, "counters")
    ]
    assert found == [({64: 1}, False), ({128: 1}, False), ({64: 2}, False), ({64: 2, 128: 1}, True)]


@pytest.mark.parametrize("is_cut", [False, True])
def test_report_adds_up_counters_of_all_lines(path, is_cut):
    """Also of a job that was killed, whose log has no last line with everything."""
    run_three_hours(path)
    if is_cut:
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    calls = read_run(path).calls
    assert {length: phases["forward"] for length, phases in calls["ring"].items()} == {"64": 2, "128": 1}


def test_summary_says_what_its_medians_are_over(path):
    """The newest: of each of thousands of plans a few are kept."""
    told = telemetry(path)
    told.planned(1, 64, MIXED, seconds=0.5, peak_bytes=1000)
    for number in range(1000):
        told.ran(1, 64, MIXED, seconds=float(number), peak_bytes=None if number < 990 else number)
    told.summarise()
    (summary,) = lines(path, "summary")
    kept = summary["medians_over"]["seconds"]
    assert kept < 100
    assert summary["medians_over"]["bytes"] == 10
    assert summary["micro_batches"] == 1000
    assert summary["measured_seconds"] == (999 + 1000 - kept) / 2
    assert sum(len(plan.seconds) for plan in told._plans.values()) == kept


def test_close_tells_the_rest_once(path):
    told = telemetry(path)
    told.planned(1, 64, MIXED, seconds=0.5, peak_bytes=1000)
    told.ran(1, 64, MIXED)
    told.close()
    told.close()
    told.ran(1, 64, MIXED)
    told.planned(1, 65, MIXED, seconds=0.5, peak_bytes=1000)
    assert [line["event"] for line in lines(path)] == ["plan", "summary", "counters"]


def test_nothing_that_ran_is_no_summary(path):
    told = telemetry(path)
    told.planned(1, 64, MIXED, seconds=0.5, peak_bytes=1000)
    told.ran(1, 65, MIXED)  # never planned: nothing to compare with
    told.close()
    assert [line["event"] for line in lines(path)] == ["plan"]


@pytest.mark.parametrize(("enabled", "is_writer"), [(False, True), (True, False)])
def test_nothing_is_written_where_nothing_shall_be(path, enabled, is_writer):
    told = telemetry(path, enabled=enabled, is_writer=is_writer)
    told.planned(1, 64, MIXED, seconds=0.5, peak_bytes=1000)
    told.ran(1, 64, MIXED, seconds=1.0)
    told.close()
    assert not path.exists()


def test_log_that_cannot_be_written_is_one_warning_and_names_the_key(tmp_path, caplog):
    told = telemetry(tmp_path)  # a folder
    told.planned(1, 64, MIXED, seconds=0.5, peak_bytes=1000)
    told.close()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"megatron_ext.log.path: {tmp_path} cannot be written")


@pytest.mark.parametrize(("end", "summaries"), [("", 1), ("raise SystemExit(3)", 1), ("os._exit(1)", 0)])
def test_last_summary_is_written_at_exit_and_plans_survive_a_kill(path, end, summaries):
    source = f"""
        import os, sys
        from megatron_ext.config import LogConfig
        from megatron_ext.telemetry import Telemetry
        told = Telemetry(LogConfig(path=sys.argv[1]), is_writer=True)
        told.planned(1, 64, ["ring"], seconds=0.5, peak_bytes=1000)
        told.ran(1, 64, ["ring"])
        {end}
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(path)]
    subprocess.run(command, cwd=REPOSITORY, timeout=120, check=False)
    assert len(lines(path, "plan")) == 1
    assert len(lines(path, "summary")) == summaries
