"""Contracts of resuming a log: what will be done again goes, everything of others stays, nothing harms the job."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from ds_grass.telemetry import log_cut
from ds_grass.telemetry.log import GrassLog

HERE = {"probe_steps": 4, "applied_steps": 50, "skipped_steps": 1}


def line(run_id: str, event: str, probe: int = 4, applied: int = 0, skipped: int = 0) -> bytes:
    place = {"probe_steps": probe, "applied_steps": applied, "skipped_steps": skipped}
    return json.dumps({"time": "x", "run_id": run_id, "event": event, **place}).encode() + b"\n"


EARLY = (
    line("a", "start", 0) + line("a", "draw") + line("a", "skipped", 4, 30, 1) + line("a", "draw", 4, 50, 1)
)
LATE = line("a", "skipped", 4, 50, 2) + line("a", "step", 4, 99, 2) + line("a", "draw", 4, 100, 2)


def rest_of(content: bytes, run_id: str = "a", own: str = "new") -> bytes:
    begin, rest = log_cut.what_stays(content, run_id, own, HERE)
    return content[:begin] + rest


def test_lines_beyond_the_resumed_step_go():
    assert rest_of(EARLY + LATE) == EARLY
    assert rest_of(EARLY) == EARLY
    assert rest_of(b"") == b""


def test_lines_of_others_stay_byte_for_byte():
    others = [
        line("b", "draw", 4, 900),
        b"  not json\r\n",
        b"\n",
        b'{"a": 1}\n',
        b"[1]\n",
        b"\xff\xfe \r\n",
        b"{",
    ]
    content = others[0] + EARLY + others[1] + LATE + b"".join(others[2:])
    assert rest_of(content) == others[0] + EARLY + others[1] + b"".join(others[2:])


def test_line_of_the_run_that_was_cut_short_by_a_kill_goes():
    assert rest_of(EARLY + LATE[:-9] + b"\n" + line("b", "draw")) == EARLY + line("b", "draw")
    assert rest_of(EARLY + LATE[:-9]) == EARLY


def test_own_lines_go_unless_the_process_has_trained():
    fresh = line("new", "start", 0) + line("new", "draw", 0)
    assert rest_of(EARLY + LATE + fresh) == EARLY
    trained = fresh + line("new", "draw", 0, 25)
    assert rest_of(EARLY + LATE + trained) == EARLY + trained


def test_own_run_that_loads_its_own_checkpoint_keeps_what_came_before():
    assert rest_of(EARLY + LATE, own="a") == EARLY


def test_earlier_resumption_at_the_same_place_goes_with_what_it_did():
    first = line("a", "resume", 4, 50, 1)
    assert rest_of(EARLY + first + LATE) == EARLY
    assert rest_of(line("a", "resume", 4, 20) + EARLY) == line("a", "resume", 4, 20) + EARLY


def test_file_is_cut_in_place_and_others_go_on_appending(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(EARLY + LATE)
    other = GrassLog(str(path), True, True)
    other.write("start")
    inode = path.stat().st_ino
    mine = GrassLog(str(path), True, True)
    mine.write("start", probe_steps=0, applied_steps=0)
    mine.resume("a", HERE)
    mine.write("resume")
    other.write("draw")
    found = [json.loads(text) for text in path.read_text().splitlines()]
    told = [(entry["run_id"], entry["event"]) for entry in found[4:]]
    assert told == [(other.run_id, "start"), ("a", "resume"), (other.run_id, "draw")]
    assert path.read_bytes().startswith(EARLY)
    assert path.stat().st_ino == inode


def test_what_another_process_appends_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, calls = tmp_path / "a.jsonl", []
    path.write_bytes(EARLY + LATE)
    what_stays = log_cut.what_stays

    def slow(*arguments):
        if not calls:
            with path.open("ab") as file:
                file.write(line("b", "draw"))
        calls.append(1)
        return what_stays(*arguments)

    monkeypatch.setattr(log_cut, "what_stays", slow)
    log_cut.cut(path, "a", "new", HERE)
    assert path.read_bytes() == EARLY + line("b", "draw")
    assert len(calls) == 2


def test_log_that_cannot_be_rewritten_is_one_warning_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(EARLY + LATE)
    log = GrassLog(str(path), True, True)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(log_cut, "cut", refuse)
    log.resume("a", HERE)
    log.write("resume")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("grass.log.path: ")
    assert "cannot be rewritten" in warning
    assert path.read_bytes().startswith(EARLY + LATE)
    assert json.loads(path.read_text().splitlines()[-1])["run_id"] == "a"


@pytest.mark.parametrize(("enabled", "is_writer"), [(False, True), (True, False)])
def test_log_that_is_off_or_of_another_rank_takes_the_id_and_touches_no_file(
    enabled, is_writer, tmp_path: Path
):
    log = GrassLog(str(tmp_path / "a.jsonl"), enabled, is_writer)
    log.resume("a", HERE)
    assert log.run_id == "a"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="needs /dev/null")
def test_log_that_is_no_file_is_left_alone(caplog: pytest.LogCaptureFixture):
    log = GrassLog("/dev/null", True, True)
    log.resume("a", HERE)
    assert log.is_open
    assert not caplog.records
