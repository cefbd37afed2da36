"""Telemetry: the log never harms a job, the start line says what was decided, own time is counted once."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_grass.config import GrassConfig
from ds_grass.telemetry import log, own_time
from ds_grass.telemetry.human import human_bytes, human_count
from ds_grass.telemetry.log import GrassLog
from ds_grass.telemetry.own_time import OwnTime
from ds_grass.telemetry.start_line import few_draws_warning, start_line

REPOSITORY = Path(__file__).parents[2]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_log_line_holds_event_time_run_and_fields(tmp_path: Path) -> None:
    log = GrassLog(str(tmp_path / "a.jsonl"), enabled=True, is_writer=True)
    log.write("draw", active=(1, 4), importance=[0.5], step=7)
    (line,) = lines(tmp_path / "a.jsonl")
    assert (line["event"], line["active"], line["importance"], line["step"]) == ("draw", [1, 4], [0.5], 7)
    assert line["run_id"] == log.run_id
    assert len(log.run_id) == 32
    assert datetime.fromisoformat(line["time"]).tzinfo is not None


def test_log_line_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    code = """
        import os, sys
        from ds_grass.telemetry.log import GrassLog
        log = GrassLog(sys.argv[1], True, True)
        log.write("draw", step=1)
        os._exit(1)
    """
    path = tmp_path / "a.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=120, check=False).returncode == 1
    assert lines(path)[0]["step"] == 1


def test_log_appends_to_earlier_runs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first, second = (GrassLog(str(path), enabled=True, is_writer=True) for _ in range(2))
    first.write("start")
    second.write("start")
    first.write("draw")
    assert [line["run_id"] for line in lines(path)] == [first.run_id, second.run_id, first.run_id]
    assert first.run_id != second.run_id


def test_log_begins_a_new_line_after_one_that_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"event": "start"}\n{"event": "dr')
    GrassLog(str(path), enabled=True, is_writer=True).write("start")
    whole, torn, new = path.read_text().splitlines()
    assert torn == '{"event": "dr'
    assert json.loads(new)["event"] == "start"


def test_log_without_a_path_goes_to_the_working_directory_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    log = GrassLog(None, enabled=True, is_writer=True)
    monkeypatch.chdir(tmp_path / "later")
    log.write("start")
    assert log.path == tmp_path / "grass.jsonl"
    assert len(lines(tmp_path / "grass.jsonl")) == 1


def test_log_makes_the_directory_that_is_missing(tmp_path: Path) -> None:
    GrassLog(str(tmp_path / "a" / "b" / "c.jsonl"), enabled=True, is_writer=True).write("start")
    assert len(lines(tmp_path / "a" / "b" / "c.jsonl")) == 1


@pytest.mark.parametrize(("enabled", "is_writer"), [(False, True), (True, False), (False, False)])
def test_log_that_is_off_or_of_another_rank_touches_no_file(
    enabled: bool, is_writer: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = GrassLog(str(tmp_path / "a" / "b.jsonl"), enabled, is_writer)
    log.write("start")
    log.close()
    assert not log.is_open
    assert list(tmp_path.iterdir()) == []
    assert warnings_of(caplog) == []


def unwritable(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "a.jsonl"
    if kind == "is a directory":
        path.mkdir()
    elif kind == "below a file":
        path.write_text("x")
        return str(path / "b.jsonl")
    elif kind == "null byte":
        return "a\0b"
    elif kind == "no permission":

        def refuse(
            *_: object, **__: object
        ) -> None:  # root may write anywhere, so permissions can't be tried
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(log, "open", refuse, raising=False)
    elif kind == "directory removed":
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        return "a.jsonl"
    return str(path)


@pytest.mark.parametrize(
    "kind", ["is a directory", "below a file", "null byte", "no permission", "directory removed"]
)
def test_log_that_cannot_be_opened_is_one_warning(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = GrassLog(unwritable(kind, tmp_path, monkeypatch), enabled=True, is_writer=True)
    for step in range(3):
        log.write("draw", step=step)
    log.close()
    monkeypatch.chdir(REPOSITORY)
    assert not log.is_open
    (warning,) = warnings_of(caplog)
    assert warning.startswith("grass.log.path: ")
    assert "cannot be written" in warning


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_log_on_a_full_disk_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    log = GrassLog("/dev/full", enabled=True, is_writer=True)
    assert warnings_of(caplog) == []
    for step in range(3):
        log.write("draw", step=step)
    log.close()
    assert len(warnings_of(caplog)) == 1
    assert "No space left" in warnings_of(caplog)[0]


def test_log_over_the_file_size_limit_is_one_warning_and_keeps_whole_lines_before(tmp_path: Path) -> None:
    code = """
        import resource, signal, sys
        from ds_grass.telemetry.log import GrassLog
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
        log = GrassLog(sys.argv[1], True, True)
        for step in range(50):
            log.write("draw", step=step)
        print("lived")
    """
    path = tmp_path / "a.jsonl"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout == "lived\n"
    assert run.stderr.count("cannot be written") == 1
    whole, torn = path.read_text().rsplit("\n", 1)
    assert [json.loads(line)["step"] for line in whole.splitlines()] == list(range(len(whole.splitlines())))
    assert len(whole) + 1 + len(torn) == 400


def test_log_line_that_is_taken_in_parts_arrives_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reluctant(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data[:7]))

    monkeypatch.setattr(log, "open", lambda path, mode, buffering: Reluctant(path, "a+"), raising=False)
    GrassLog(str(tmp_path / "a.jsonl"), enabled=True, is_writer=True).write("draw", step=1)
    assert lines(tmp_path / "a.jsonl")[0]["step"] == 1


def test_log_writes_what_json_cannot_hold_as_something_that_it_can(tmp_path: Path) -> None:
    log = GrassLog(str(tmp_path / "a.jsonl"), enabled=True, is_writer=True)
    log.write(
        "odd",
        nan=math.nan,
        infinite=[math.inf, {"deep": -math.inf}],
        tensor=torch.tensor([1.0, 2.0]),
        scalar=torch.tensor(3),
        dtype=torch.bfloat16,
        path=Path("x"),
        keys={1: True, None: None},
        text="line\nbreak \u00e9 \ud800",
    )
    (line,) = lines(tmp_path / "a.jsonl")
    assert (line["nan"], line["infinite"]) == ("nan", ["inf", {"deep": "-inf"}])
    assert (line["tensor"], line["scalar"]) == ([1.0, 2.0], 3)
    assert (line["dtype"], line["path"]) == ("torch.bfloat16", "x")
    assert line["keys"] == {"1": True, "None": None}
    assert line["text"] == "line\nbreak \u00e9 \ud800"


def test_log_closed_ignores_what_follows(tmp_path: Path) -> None:
    log = GrassLog(str(tmp_path / "a.jsonl"), enabled=True, is_writer=True)
    log.write("start")
    log.close()
    log.close()
    log.write("draw")
    assert len(lines(tmp_path / "a.jsonl")) == 1


FACTS: dict[str, Any] = {
    "policy": "grass",
    "num_blocks": 32,
    "lists": ["model.layers"],
    "other_lists": ["vision.blocks"],
    "active_layers": 2,
    "managed_params": 8_030_261_248,
    "active_params": 1_486_999_552,
    "outer": "always",
    "outer_params": 1_050_677_248,
    "planned_probe_steps": 16,
    "sampling_period": 50,
    "refresh_period": 100,
    "states_mode": None,
    "states_dtype": "fp32",
    "master_weights": True,
    "device_bytes": 3 << 29,
    "host_bytes": 96_363_134_976,
    "zero_stage": 1,
    "zero_stage_given": 0,
    "num_ranks": 2,
    "grass_version": "0.1.0",
    "deepspeed_version": "0.19.8",
}


def test_start_line_names_every_resolved_fact() -> None:
    line = start_line(**FACTS)
    for fact in (
        "policy grass",
        "2 of 32 blocks of model.layers active",
        "not drawn: vision.blocks",
        "managed 8.03 B (8,030,261,248)",
        "active at once 1.49 B (1,486,999,552)",
        "outer always, 1.05 B (1,050,677,248)",
        "probe 16 steps without update, draw every 50 steps, refresh every 100 steps",
        "stream until measured fp32 with master weights",
        "device 1.50 GiB (1610612736 bytes)",
        "host up to 89.75 GiB (96363134976 bytes)",
        "ZeRO stage 1 (promoted from 0), 2 ranks",
        "ds_grass 0.1.0, deepspeed 0.19.8",
    ):
        assert fact in line
    assert "\n" not in line


def test_start_line_of_other_choices() -> None:
    line = start_line(
        **{
            **FACTS,
            "other_lists": (),
            "outer": ["lm_head", "norm"],
            "outer_params": 0,
            "planned_probe_steps": 0,
            "sampling_period": None,
            "refresh_period": None,
            "states_mode": "resident",
            "master_weights": False,
            "zero_stage_given": 1,
            "num_ranks": 1,
        }
    )
    for fact in (
        "outer lm_head, norm, 0;",
        "probe none, draw once, refresh never",
        "states resident fp32 without master weights",
        "ZeRO stage 1, 1 rank;",
    ):
        assert fact in line
    assert "not drawn" not in line


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (1_234_567_890, "1.23 B"),
        (7_000_000, "7.00 M"),
        (2 * 10**12, "2.00 T"),
    ],
)
def test_human_count(number: int, text: str) -> None:
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (5 << 20, "5.00 MiB"),
        (3 << 29, "1.50 GiB"),
        (1 << 40, "1.00 TiB"),
    ],
)
def test_human_bytes(number: int, text: str) -> None:
    assert human_bytes(number) == text


def test_own_time_adds_up_what_is_spent_inside_and_counts_nesting_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 13.0, 20.0, 21.5])
    monkeypatch.setattr(own_time.time, "perf_counter", lambda: next(clock))
    own = OwnTime()
    with own, own:
        pass
    assert (own.seconds, own.calls) == (3.0, 1)
    with own:
        pass
    assert (own.seconds, own.calls) == (4.5, 2)
    own.reset()
    assert (own.seconds, own.calls) == (0.0, 0)


def test_own_time_counts_a_call_that_failed() -> None:
    own = OwnTime()
    with pytest.raises(KeyError), own:
        raise KeyError
    assert own.calls == 1
    assert own.seconds > 0


def config(**keys: Any) -> GrassConfig:
    return GrassConfig(**{"refresh_period": None, **keys})


@pytest.mark.parametrize(
    ("num_steps", "probe_steps", "active_layers", "sampling_period", "warns"),
    [
        (611, 10, 2, 50, False),  # 601 steps, 13 draws
        (560, 10, 2, 50, True),  # 550 steps, 11 draws of 2 of 12 blocks
        (561, 10, 2, 50, False),  # the twelfth draw has one step to train
        (60, 10, 12, 50, False),  # all active: nothing to miss
        (60, 10, 2, None, False),  # draw once and stay
        (110, 10, 5, 20, False),  # 5 draws of 5
        (90, 10, 5, 20, True),  # 4
        (10, 10, 2, 1, True),  # all spent on probing
        (9, 10, 12, None, True),
    ],
)
def test_few_draws_warning_comes_below_two_visits_a_block(
    num_steps: int, probe_steps: int, active_layers: int, sampling_period: int | None, warns: bool
) -> None:
    keys = config(active_layers=active_layers, sampling_period=sampling_period)
    assert (few_draws_warning(num_steps, keys, 12, probe_steps) is not None) == warns


def test_few_draws_warning_gives_a_period_that_silences_it() -> None:
    text = few_draws_warning(200, config(sampling_period=50), 32, 10)
    assert text is not None
    assert "190 training steps hold 4 draws of 2 of 32 blocks, fewer than the 32" in text
    assert "use a sampling_period of at most 5, or more active_layers" in text
    assert few_draws_warning(200, config(sampling_period=5), 32, 10) is None


def test_few_draws_warning_where_no_period_would_do_names_the_other_key() -> None:
    text = few_draws_warning(30, config(sampling_period=1), 32, 10)
    assert text is not None
    assert text.endswith("use more active_layers")


def test_few_draws_warning_when_probing_takes_all_steps_says_so() -> None:
    text = few_draws_warning(10, config(), 12, 10)
    assert text is not None
    assert "nothing would be trained" in text
