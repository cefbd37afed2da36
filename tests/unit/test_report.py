"""Contracts of `ds_grass report`: any log becomes a page that is true, escaped and whole; errors are one line."""

from __future__ import annotations

import ast
import builtins
import json
import math
import re
from pathlib import Path

import pytest

from ds_grass import cli
from ds_grass.report.log import ReportError, read_run
from ds_grass.report.page import Picture, render
from tests.made_logs import MadeRun, write_made_log

SCRIPT = "<script>alert('x')</script>"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path) -> Path:
    """One run of 12 blocks: 100 steps, draws at 0, 25, ..., 100."""
    path = tmp_path / "grass.jsonl"
    write_made_log(path, num_steps=100)
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def state_events(path: Path) -> list[dict]:
    return [line for line in lines_of(path) if line["event"] in ("draw", "refresh")]


def test_run_is_what_the_log_says(log):
    run, written = read_run(log), state_events(log)
    assert [state.step for state in run.states] == [0, 25, 50, 75, 100]
    assert run.edges == (0, 25, 50, 75, 100, 125)
    assert [list(state.active) for state in run.states] == [line["active"] for line in written]
    assert [list(state.importance) for state in run.states] == [line["importance"] for line in written]
    assert (run.num_blocks, run.broken_lines, all(run.is_known)) == (12, 0, True)
    moved = [line["states"]["bytes_to_host"] for line in written]
    gains = [later - earlier for earlier, later in zip(moved, moved[1:], strict=False)]
    assert list(run.cost_by_period("bytes_to_host")) == gains
    assert read_run(log.parent) == run


def test_made_lines_have_the_keys_of_the_engine(log):
    """Or these tests would show that the report reads another log than the one that runs write."""
    core, announce = (
        (REPOSITORY / "ds_grass/zero" / name).read_text() for name in ("core.py", "announce.py")
    )
    assert _keys_told(core, "_costs") <= set(state_events(log)[0])
    assert _keys_told(announce, "_facts") <= set(lines_of(log)[0])


def _keys_told(source: str, function: str) -> set[str]:
    """Keys of the dictionary that the function returns."""
    (found,) = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", "") == function]
    (answer,) = [node.value for node in ast.walk(found) if isinstance(node, ast.Return)]
    return {key.value for key in answer.keys}


def test_line_being_written_is_ignored_and_broken_ones_are_counted(log):
    whole = read_run(log)
    with open(log, "ab") as file:
        file.write(b'{"time": "2026-01-01T00:00')
    assert read_run(log) == whole
    with open(log, "ab") as file:
        file.write(b'\nnot json\n[1, 2]\n{"event": "draw"}\n\xff\xfe\n\n')
    run = read_run(log)
    assert run.broken_lines == 5
    assert run.states == whole.states
    assert "5 lines are broken" in render([run], [])


@pytest.mark.parametrize(
    "change",
    [{"active": [12]}, {"active": "all"}, {"applied_steps": True}, {"applied_steps": -1}, {"visits": []},
     {"visits": [1] * 13}, {"applied_steps": 10**400}],
)  # fmt: skip
def test_state_that_makes_no_sense_is_a_broken_line(log, change):
    lines = lines_of(log)
    lines[2] |= change
    rewrite(log, lines)
    run = read_run(log)
    assert run.broken_lines == 1
    assert 25 not in [state.step for state in run.states]


def test_missing_draw_leaves_its_steps_unknown(log):
    rewrite(log, [line for line in lines_of(log) if line.get("applied_steps") != 50])
    run = read_run(log)
    assert run.edges == (0, 25, 75, 100, 125)
    assert run.is_known == (True, False, True, True)
    assert math.isnan(run.cost_by_period("wait_seconds")[1])
    assert "For 50 steps the log does not hold every draw" in render([run], [])


def test_draws_undone_by_an_older_checkpoint_are_dropped(log):
    lines = lines_of(log)
    rewrite(log, [*lines, *(line for line in lines if line.get("applied_steps") == 75)])
    assert read_run(log).edges == (0, 25, 50, 75, 100)


def test_resumed_run_is_read_as_one(tmp_path):
    """Saved at 60, killed at 130, resumed by a new process: what was undone is gone, costs go on adding up."""
    path = tmp_path / "grass.jsonl"
    first = MadeRun(path)
    first.train(60)
    saved = first.save()
    first.train(130)
    undone = [line for line in lines_of(path) if line.get("applied_steps", 0) > 60]
    second = MadeRun(path)
    second.resume(saved)
    second.train(120)
    run = read_run(path)
    assert run.run_id == first.journal.log.run_id == second.journal.log.run_id
    assert (run.resumed, run.edges, all(run.is_known)) == ((60,), (0, 25, 50, 75, 100, 125), True)
    assert len(undone) == 3
    assert not [line for line in undone if line in lines_of(path)]
    assert [line["event"] for line in lines_of(path)].count("start") == 1
    assert [step for step, _ in run.losses] == [0, 25, 50, 75, 100]
    moved = [state.costs["bytes_to_host"] for state in run.states]
    assert moved == sorted(moved)
    # steps 50 to 75 span both processes: the first's last line, then what the second moved
    after = [line for line in state_events(path) if line["applied_steps"] == 75][0]["states"]["bytes_to_host"]
    assert moved[3] - moved[2] == after
    assert "at step 60" in render([run], [])


def test_resumed_run_whose_log_was_not_cut_is_read_as_one(log):
    """The lines that resuming could not drop, and a resumption in another folder, which has the rest only."""
    run, path = MadeRun(log.parent / "other.jsonl"), log.parent / "other.jsonl"
    run.train(60)
    saved = run.save()
    run.train(100)
    before = lines_of(path)
    run.resume(saved)
    run.train(80)
    resumed = [line for line in lines_of(path) if line not in before]
    rewrite(path, before + resumed)
    found = read_run(path)
    assert (found.edges, found.resumed, all(found.is_known)) == ((0, 25, 50, 75, 100), (60,), True)
    rewrite(path, resumed)
    found = read_run(path)
    assert (found.edges, found.resumed, all(found.is_known)) == ((60, 75, 100), (60,), True)
    assert found.facts["num_blocks"] == 12


def test_run_resumed_last_is_taken_before_one_that_began_last(log):
    path = log.parent / "other.jsonl"
    first = MadeRun(path)
    first.train(60)
    second = write_made_log(path, num_steps=50)
    assert read_run(path).run_id == second
    again = MadeRun(path)
    again.resume(first.save())
    again.train(70)
    assert read_run(path).run_id == first.journal.log.run_id


def test_last_run_of_a_file_is_taken_unless_another_is_named(log):
    first = read_run(log).run_id
    second = write_made_log(log, num_blocks=5, num_steps=50)
    assert (read_run(log).run_id, read_run(log).num_blocks) == (second, 5)
    assert read_run(log, first[:8]).num_blocks == 12
    with pytest.raises(ReportError, match=f"--run-id 'zzz' is the beginning of 0 runs.*{first}, {second}"):
        read_run(log, "zzz")


def test_missing_and_odd_values_are_left_out(log):
    lines = lines_of(log)[1:]
    for line in lines:
        line |= {
            "importance": None,
            "effective_blocks": "nan",
            "states": None,
            "probabilities": [1, 2],
            "time": 3,
        }
        del line["measuring_seconds"], line["telemetry_seconds"]
    lines[1]["importance"] = ["nan", None, "inf", 10**400, *[0.5] * 8]
    rewrite(log, lines)
    run = read_run(log)
    assert (run.facts, run.times, run.states[0].importance, run.states[0].probabilities) == ({}, (), (), ())
    assert all(map(math.isnan, run.states[1].importance[:4]))
    assert run.states[1].importance[4:] == (0.5,) * 8
    assert set(run.states[0].costs) == {"switching_seconds"}
    assert run.edges[-1] == 125
    assert "nan" not in re.sub("<style>.*</style>", "", render([run], []), flags=re.DOTALL)


def test_every_string_of_a_log_is_escaped(log):
    """Also as a key of `facts` that the page prints only in some cases, and as names of blocks."""
    lines = lines_of(log)
    lines[0] = {key: value if key in ("time", "event") else SCRIPT for key, value in lines[0].items()}
    for line in lines:
        line |= {"run_id": f'{SCRIPT}" onload="x$y{{}}', "names": [SCRIPT], "phase": SCRIPT}
        line["states"] = (
            {**line.get("states", {}), "mode": SCRIPT} if isinstance(line.get("states", {}), dict) else {}
        )
    rewrite(log, lines)
    run, other = read_run(log), read_run(log)
    page = render([run, other], [Picture("a", SCRIPT, SCRIPT, b"png")])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10
    assert 'onload="' not in page


def test_page_loads_nothing(log):
    page = render(
        [read_run(log)], [Picture("a", "A", "It shows.", b"png"), Picture("b", "B", "And so on.", b"png")]
    )
    sources = re.findall(r"\b(?:src|href|srcset|action|url)\s*[=(]\s*[\"']?([^\"'\s)]*)", page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(
        r"https?:|//|@import|<(script|link|iframe|object|embed)\b", page.replace("data:image", "")
    )
    assert "default-src 'none'" in page


def test_command_draws_two_runs_side_by_side(log, tmp_path, monkeypatch, capsys):
    """12 and 100 blocks; strings that would break mathematics in a title; a loss; a line being written."""
    pytest.importorskip("matplotlib")
    from ds_grass.report import figures

    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 40)  # an image is not looked at here
    lines = lines_of(log)
    rewrite(
        log,
        [{**line, "policy": r"$\frac{", "loss": 2.0 - 0.01 * number} for number, line in enumerate(lines)],
    )
    large = tmp_path / "large" / "grass.jsonl"
    write_made_log(large, num_blocks=100, num_steps=200, active_layers=4)
    with open(large, "a") as file:
        file.write('broken\n{"time"')
    folder = tmp_path / "out" / "page"
    assert cli.main(["report", str(log), str(large.parent), "-o", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder / 'report.html'}\n"
    assert err == f"ds_grass report: 1 line is broken in {large} and left out.\n"
    names = [
        "blocks",
        "loss",
        "importance",
        "probabilities",
        "effective-blocks",
        "visits",
        "memory",
        "transfers",
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["report.html", *(f"{name}.png" for name in names)]
    )
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(names)
    assert "100 of model.layers" in page


def test_first_line_alone_draws_what_it_has(log):
    """A job that has just left its probe, and whose log lost all that can be lost."""
    pytest.importorskip("matplotlib")
    from ds_grass.report.figures import draw_all

    line = state_events(log)[0] | {
        "importance": None,
        "probabilities": [],
        "effective_blocks": None,
        "states": {},
        "loss": None,
    }
    rewrite(log, [line])
    assert [picture.name for picture in draw_all([read_run(log)])] == ["blocks", "visits"]


def test_long_run_loses_no_block_between_two_pixels():
    pytest.importorskip("matplotlib")
    import numpy as np

    from ds_grass.report.axes import thinned

    values = np.zeros((3, 5000))
    values[0, 2500], values[1], values[2, :2500] = 1, 1, np.nan
    edges, shares = thinned(np.arange(5001.0), values)
    assert shares.shape == (3, len(edges) - 1)
    assert (shares[0] * np.diff(edges)).sum() == pytest.approx(1)
    assert shares[1] == pytest.approx(np.ones(len(edges) - 1))
    assert np.isnan(shares[2, :300]).all()
    assert (shares[2, 400:] == 0).all()


def test_error_is_one_line_and_status_1(log, tmp_path, monkeypatch, capsys):
    def error_of(*arguments) -> str:
        assert cli.main(["report", *map(str, arguments)]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    assert "No such file" in error_of(tmp_path / "nothing.jsonl")
    assert "No such file" in error_of(tmp_path.parent / "nowhere" / "at all")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "has no line of a GRASS run" in error_of(empty)
    rewrite(empty, lines_of(log)[:1])
    assert "has no draw of run" in error_of(empty)
    rewrite(empty, [line | {"visits": None} for line in lines_of(log)])
    assert "none that can be read" in error_of(empty)
    assert "given 2 times for 1 RUN" in error_of(log, "--run-id", "a", "--run-id", "b")
    real_import = builtins.__import__

    def no_matplotlib(name, *rest):
        if name == "ds_grass.report" and "figures" in (rest[2] or ()):
            raise ImportError("No module named 'matplotlib'")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    assert "pip install ds_grass[report]" in error_of(log, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_is_one_line(log, monkeypatch, capsys):
    from types import SimpleNamespace

    from ds_grass import report

    monkeypatch.setattr(report, "_figures", lambda: SimpleNamespace(draw_all=lambda runs: []))
    assert cli.main(["report", str(log), "-o", str(log)]) == 1
    assert f"--output {log} cannot be written" in capsys.readouterr().err


def test_command_imports_no_matplotlib_before_it_draws():
    """Or `ds_grass doctor` would need it."""
    for name in ("__init__.py", "log.py", "page.py"):
        tree = ast.parse((REPOSITORY / "ds_grass/report" / name).read_text())
        imported = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [text for text in imported if "matplotlib" in text or "figures" in text]
