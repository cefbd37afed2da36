"""Contracts of `ds_grass doctor`: it tells the truth about this machine, with a cure for each problem."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from ds_grass import cli, doctor

LIVE = {"finder": True, "error": None, "classes": ["DeepSpeedEngine"], "failures": {}}


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which all is well, as far as the doctor can see."""
    versions = {"ds-grass": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8"}
    entry = EntryPoint("ds_grass", "ds_grass.activate:autoload", "torch.backends")
    monkeypatch.setattr(doctor, "_installed", versions.get)
    monkeypatch.setattr(doctor, "_probe", lambda timeout_s: LIVE)
    monkeypatch.setattr(doctor, "entry_points", lambda group: [entry] if group == "torch.backends" else [])
    monkeypatch.setattr(
        doctor, "_supported_deepspeed", lambda: doctor.Finding("versions", "supported", "yes")
    )
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    return versions


def problems():
    return [finding for finding in doctor.examine() if finding.state == "problem"]


def probe_answers(monkeypatch, **changes):
    monkeypatch.setattr(doctor, "_probe", lambda timeout_s: {**LIVE, **changes})


def test_healthy_machine_has_no_problem(healthy):
    assert problems() == []
    assert doctor.is_healthy(doctor.examine())


def test_hook_is_named_with_its_classes(healthy):
    (hook,) = [finding for finding in doctor.examine() if "hook" in finding.name]
    assert hook.value == "live on deepspeed.runtime.engine: DeepSpeedEngine"


@pytest.mark.parametrize("package", ["torch", "deepspeed"])
def test_missing_host_is_a_problem_with_its_cure(healthy, package):
    del healthy[package]
    (problem,) = problems()
    assert (problem.name, problem.value, problem.cure) == (package, "not installed", f"pip install {package}")


def test_package_imported_from_a_folder_is_a_note(healthy):
    del healthy["ds-grass"]
    (finding,) = [finding for finding in doctor.examine() if finding.name == "ds-grass"]
    assert finding.state == "note"
    assert "pip install" in finding.cure


def test_missing_entry_point_is_a_problem(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert [problem.name for problem in problems()] == ["entry point"]


def test_autoload_switched_off_is_a_problem(healthy, monkeypatch):
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    probe_answers(monkeypatch, finder=False, classes=[])
    assert [problem.name for problem in problems()] == [
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
        "hook in a fresh interpreter",
    ]


def test_failed_installer_shows_its_traceback(healthy, monkeypatch):
    text = "Traceback (most recent call last):\n  File x\nLookupError: gone\n"
    probe_answers(monkeypatch, classes=[], failures={"deepspeed.runtime.engine": text})
    first, second = problems()
    assert first.value == "LookupError: gone"
    assert first.detail == text
    assert "no class is hooked" in second.value


def test_deepspeed_that_cannot_be_imported_is_a_problem(healthy, monkeypatch):
    probe_answers(monkeypatch, classes=[], error="No module named 'hjson'")
    (problem,) = problems()
    assert "No module named 'hjson'" in problem.value


@pytest.mark.parametrize(
    "error", [subprocess.TimeoutExpired("python", 1), ValueError("status 1"), OSError("no python")]
)
def test_interpreter_that_does_not_answer_is_a_problem_not_an_exception(healthy, monkeypatch, error):
    def fail(timeout_s):
        raise error

    monkeypatch.setattr(doctor, "_probe", fail)
    (problem,) = problems()
    assert problem.value.startswith("cannot be told")


def test_probe_of_an_interpreter_that_crashes_carries_its_last_line(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "raise SystemExit('torch is broken')")
    with pytest.raises(ValueError, match="status 1: torch is broken"):
        doctor._probe(60)


def test_probe_reads_the_answer_between_other_output(monkeypatch):
    source = "print('a log line, probe: of another kind'); print('probe:{\"finder\": true}')"
    monkeypatch.setattr(doctor, "_PROBE", source)
    assert doctor._probe(60) == {"finder": True}


@pytest.mark.parametrize(
    ("missing", "supported", "state"),
    [([], True, "ok"), ([], False, "note"), (["deepspeed.x.y"], True, "problem")],
)
def test_version_of_deepspeed_is_judged_by_names_then_by_range(monkeypatch, missing, supported, state):
    from types import SimpleNamespace

    compat = SimpleNamespace(
        SUPPORTED=">=0.18,<0.20", missing=lambda stage: missing, is_supported=lambda: supported
    )
    monkeypatch.setitem(sys.modules, "ds_grass.zero.compat", compat)
    finding = doctor._supported_deepspeed()
    assert finding.state == state
    assert ("deepspeed.x.y" in finding.value) == bool(missing)


def test_version_of_deepspeed_that_breaks_the_check_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "ds_grass.zero.compat", None)
    assert doctor._supported_deepspeed().state == "problem"


@pytest.mark.parametrize(
    ("limit", "value", "state"),
    [
        (resource.RLIM_INFINITY, "unlimited", "ok"),
        (8 * 2**20, "8 MiB", "note"),
        (3 * 2**30, "3.0 GiB", "note"),
    ],
)
def test_limit_of_pinned_memory_is_told(monkeypatch, limit, value, state):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    pinned = next(doctor._memory())
    assert (pinned.value, pinned.state) == (value, state)


def test_native_kernels_that_do_not_load_are_a_note_with_the_reason(healthy, monkeypatch):
    from ds_grass import ops

    monkeypatch.setattr(ops, "native", lambda: (False, "libgomp.so.1 is missing"))
    (finding,) = [finding for finding in doctor.examine() if finding.name == "native"]
    assert (finding.value, finding.state) == ("libgomp.so.1 is missing", "note")


def test_command_prints_the_report_and_exits_0(healthy, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "runs here" in out
    assert "0.19.8" in out


def test_command_prints_tracebacks_and_exits_1(healthy, monkeypatch, capsys):
    probe_answers(
        monkeypatch, classes=[], failures={"deepspeed.runtime.engine": "Traceback [x]\nKeyError: 1"}
    )
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "does not run here" in out
    assert "Traceback [x]" in out


def test_command_prints_one_json_document_and_nothing_else(healthy, monkeypatch, capsys):
    def probe(timeout_s):
        print("DeepSpeed says something while it is imported")
        return LIVE

    monkeypatch.setattr(doctor, "_probe", probe)
    assert cli.main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["healthy"] is True
    assert {finding["section"] for finding in document["findings"]} == {
        "versions",
        "activation",
        "kernels",
        "memory",
    }
    assert "DeepSpeed says something" in captured.err


def test_command_without_or_with_unknown_subcommand_exits_2(capsys):
    for arguments in ([], ["nosuch"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    assert "doctor" in capsys.readouterr().err


def test_command_tells_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == "ds_grass 0.1.0\n"


def test_examination_of_this_machine_finds_its_versions():
    """Nothing replaced: whatever is installed here, the doctor comes to an end and names it."""
    findings = doctor.examine()
    import torch

    assert any(finding.name == "torch" and finding.value == torch.__version__ for finding in findings)
    assert any(finding.name == "hook in a fresh interpreter" for finding in findings)
    assert all(finding.cure for finding in findings if finding.state == "problem")
