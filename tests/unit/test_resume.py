"""Contracts of `--resume`: a second run leaves out exactly what passed, as long as no source has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import resume

pytest_plugins = ["pytester"]

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
def suite(pytester):
    """A little repository of its own; call it to run pytest there with the plugin."""
    (pytester.mkdir("ds_grass") / "module.py").write_text("x = 1\n")
    pytester.makepyfile(test_suite=SUITE)

    def run(*arguments: str) -> tuple[dict[str, int], int]:
        result = pytester.runpytest_inprocess("-p", "tests.resume", "-p", "no:cacheprovider", *arguments)
        return result.parseoutcomes(), result.ret

    run.folder = pytester.path
    return run


def test_second_run_leaves_out_what_passed_and_repeats_the_rest(suite):
    outcomes, status = suite("--resume=done")
    assert outcomes == {"failed": 1, "passed": 4, "skipped": 1, "errors": 1}
    assert status == pytest.ExitCode.TESTS_FAILED
    (suite.folder / "repaired").touch()
    outcomes, status = suite("--resume=done")
    assert outcomes == {"passed": 2, "skipped": 1, "deselected": 3}
    assert status == pytest.ExitCode.OK


def test_run_with_nothing_left_succeeds(suite):
    assert suite("--resume=done", "-k", "good") == ({"passed": 1, "deselected": 5}, pytest.ExitCode.OK)
    assert suite("--resume=done", "-k", "good") == ({"deselected": 6}, pytest.ExitCode.OK)


def test_run_that_selects_nothing_is_still_an_error(suite):
    assert suite("--resume=done", "-k", "nosuch")[1] == pytest.ExitCode.NO_TESTS_COLLECTED


def test_changed_source_starts_from_nothing(suite):
    suite("--resume=done", "-k", "good")
    module = suite.folder / "ds_grass" / "module.py"
    module.write_text("x = 2\n")
    assert suite("--resume=done", "-k", "good")[0]["passed"] == 1
    module.write_text("x = 1\n")
    assert suite("--resume=done", "-k", "good")[0] == {"deselected": 6}


def test_run_without_the_option_writes_and_leaves_out_nothing(suite):
    suite("--resume=done", "-k", "good")
    before = {path: path.read_text() for path in (suite.folder / "done").iterdir()}
    assert suite("-k", "good")[0]["passed"] == 1
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
