"""Contracts of `--resume`: a second run leaves out exactly what passed, as long as no source has changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import resume

SUITE = """
    import pathlib, pytest
    def test_good(): pass
    @pytest.mark.parametrize("x", ["a b", "c"])
    def test_cell(x): pass
    def test_bad(): assert pathlib.Path("repaired").exists()
    def test_skipped(): pytest.skip("not here")
    @pytest.fixture
    def torn():
        yield
        assert pathlib.Path("repaired").exists()
    def test_bad_teardown(torn): pass
    """


@pytest.fixture
def suite(tmp_path):
    """A little repository of its own with the plugin in it; call it to run pytest there."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "ds_grass").mkdir()
    (tmp_path / "ds_grass" / "module.py").write_text("x = 1\n")
    options = "pythonpath = ['.']\ntestpaths = ['tests']\n"
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\n{options}")
    (tmp_path / "tests" / "conftest.py").write_text("pytest_plugins = ['tests.resume']\n")
    shutil.copy(resume.__file__, tmp_path / "tests" / "resume.py")
    lines = [line[4:] for line in SUITE.splitlines()]
    (tmp_path / "tests" / "test_suite.py").write_text("\n".join(lines))

    def run(*arguments: str) -> tuple[str, int]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        return done.stdout.strip().splitlines()[-1], done.returncode

    run.folder = tmp_path
    return run


def test_second_run_leaves_out_what_passed_and_repeats_the_rest(suite):
    line, status = suite("--resume=done")
    assert line.startswith("1 failed, 4 passed, 1 skipped, 1 error")
    assert status == 1
    (suite.folder / "repaired").touch()
    line, status = suite("--resume=done")
    assert line.startswith("2 passed, 1 skipped, 3 deselected")
    assert status == 0


def test_run_with_nothing_left_succeeds(suite):
    assert suite("--resume=done", "-k", "good")[1] == 0
    line, status = suite("--resume=done", "-k", "good")
    assert "6 deselected" in line
    assert status == 0


def test_changed_source_starts_from_nothing(suite):
    suite("--resume=done", "-k", "good")
    module = suite.folder / "ds_grass" / "module.py"
    module.write_text("x = 2\n")
    assert suite("--resume=done", "-k", "good")[0].startswith("1 passed")
    module.write_text("x = 1\n")
    assert "6 deselected" in suite("--resume=done", "-k", "good")[0]


def test_run_without_the_option_writes_and_leaves_out_nothing(suite):
    suite("--resume=done", "-k", "good")
    before = {path: path.read_text() for path in (suite.folder / "done").iterdir()}
    assert suite("-k", "good")[0].startswith("1 passed")
    assert {path: path.read_text() for path in (suite.folder / "done").iterdir()} == before


def test_line_cut_short_by_a_kill_is_ignored(tmp_path):
    journal = tmp_path / "journal.jsonl"
    journal.write_text(json.dumps({"passed": "a"}) + '\n{"pas')
    assert resume.read_journal(journal) == {"a"}
    assert resume.read_journal(tmp_path / "none") == set()


def test_fingerprint_covers_names_contents_and_only_sources(tmp_path):
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "adamw.cpp"
    source.write_text("one")
    first = resume.fingerprint(tmp_path)
    (tmp_path / "csrc" / "adamw.so").write_text("built")
    assert resume.fingerprint(tmp_path) == first
    source.rename(Path(tmp_path, "csrc", "renamed.cpp"))
    second = resume.fingerprint(tmp_path)
    source.write_text("two")
    assert len({first, second, resume.fingerprint(tmp_path)}) == 3
