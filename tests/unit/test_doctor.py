"""Contracts of `ds_grass doctor`: it tells the truth about this machine, with a cure for each problem."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from ds_grass import cli, doctor
from ds_grass.doctor import machine

ENGINE, TRAINER = "deepspeed.runtime.engine", "transformers.trainer"
LIVE = {
    "finder": True,
    "errors": {},
    "hooked": {ENGINE: ["DeepSpeedEngine"], TRAINER: ["Trainer"]},
    "failures": {},
}
NONE_HOOKED = {ENGINE: [], TRAINER: []}


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which all is well, as far as the doctor can see."""
    versions = {"ds-grass": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "pydantic": "2", "rich": "15"}
    entry = EntryPoint("ds_grass", "ds_grass.activate:autoload", "torch.backends")
    monkeypatch.setattr(doctor, "_installed", versions.get)
    monkeypatch.setattr(doctor, "_probe", lambda timeout_s: LIVE)
    monkeypatch.setattr(doctor, "entry_points", lambda group: [entry] if group == "torch.backends" else [])
    monkeypatch.setattr(doctor, "_symbols", lambda: [doctor.Finding("symbols", "deepspeed", "all")])
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
    engine, trainer = [finding for finding in doctor.examine() if "hook" in finding.name]
    assert engine.value == "live on deepspeed.runtime.engine: DeepSpeedEngine"
    assert trainer.value == "live on transformers.trainer: Trainer"


def test_trainer_that_is_not_hooked_is_a_note(healthy, monkeypatch):
    """A block trains without it; what is missing is said."""
    probe_answers(
        monkeypatch, hooked={ENGINE: ["DeepSpeedEngine"], TRAINER: []}, failures={TRAINER: "X: gone"}
    )
    assert problems() == []
    notes = [finding.value for finding in doctor.examine() if finding.state == "note"]
    assert "X: gone" in notes
    assert "not in place: its log will lack the numbers of GRASS" in notes


def test_trainer_that_cannot_be_imported_is_a_note_where_it_is_installed(healthy, monkeypatch):
    probe_answers(monkeypatch, hooked={ENGINE: ["DeepSpeedEngine"]}, errors={TRAINER: "No module named 'x'"})
    assert not [finding for finding in doctor.examine() if finding.name == "hook on the Trainer"]
    healthy["transformers"] = "5.23.0"
    (finding,) = [finding for finding in doctor.examine() if finding.name == "hook on the Trainer"]
    assert (finding.state, finding.value) == ("note", "nothing to hook: No module named 'x'")


@pytest.mark.parametrize("package", ["torch", "deepspeed", "pydantic", "rich"])
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
    probe_answers(monkeypatch, finder=False, hooked=NONE_HOOKED)
    assert [problem.name for problem in problems()] == [
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
        "hook in a fresh interpreter",
    ]


def test_failed_installer_shows_its_traceback(healthy, monkeypatch):
    text = "Traceback (most recent call last):\n  File x\nLookupError: gone\n"
    probe_answers(monkeypatch, hooked=NONE_HOOKED, failures={ENGINE: text})
    first, second = problems()
    assert first.value == "LookupError: gone"
    assert first.detail == text
    assert "no class is hooked" in second.value


def test_deepspeed_that_cannot_be_imported_is_a_problem(healthy, monkeypatch):
    probe_answers(monkeypatch, hooked={}, errors={ENGINE: "No module named 'hjson'"})
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


def symbols(monkeypatch, needed, supported=True):
    from types import SimpleNamespace

    compat = SimpleNamespace(
        SUPPORTED=">=0.18,<0.20", by_module=lambda stage: needed, is_supported=lambda: supported
    )
    monkeypatch.setitem(sys.modules, "ds_grass.zero.compat", compat)
    return list(doctor._symbols())


def test_private_names_are_told_module_by_module(monkeypatch):
    lacking = ["deepspeed.runtime.engine.DeepSpeedEngine._x"]
    engine, utils, version = symbols(monkeypatch, {ENGINE: (8, lacking), "deepspeed.utils": (2, [])})
    assert (engine.name, engine.state) == (ENGINE, "problem")
    assert lacking[0] in engine.value
    assert engine.cure == "install deepspeed>=0.18,<0.20"
    assert (utils.value, utils.state) == ("2 names are as expected", "ok")
    assert (version.value, version.state) == ("yes (>=0.18,<0.20)", "ok")


def test_version_of_deepspeed_that_was_not_tried_is_a_note(monkeypatch):
    assert [finding.state for finding in symbols(monkeypatch, {ENGINE: (8, [])}, supported=False)] == [
        "ok",
        "note",
    ]


def test_deepspeed_that_breaks_the_check_of_names_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "ds_grass.zero.compat", None)
    assert [finding.state for finding in doctor._symbols()] == ["problem"]


def test_private_names_of_the_installed_deepspeed_are_all_told():
    pytest.importorskip("deepspeed")
    from ds_grass.zero import compat

    told = {finding.name: finding.state for finding in doctor._symbols()}
    assert set(told) == {*compat.NEEDED, *compat.NEEDED_BY_STAGE_3, "deepspeed supported"}
    assert set(told.values()) == {"ok"}


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
    pinned = next(machine.memory())
    assert (pinned.value, pinned.state) == (value, state)


def test_memory_of_the_host_is_told_by_what_bounds_it(monkeypatch):
    from ds_grass import host_memory

    found = {"available memory": 48 * 2**30, "cgroup limit": 12 * 10**9}
    monkeypatch.setattr(host_memory, "bounds", lambda: found)
    told = {finding.name: finding.value for finding in machine.memory()}
    assert told["host memory available"] == "48.0 GiB"
    assert told["host memory, left by the cgroup"] == "11.2 GiB"
    assert told["room for states"].startswith("1.0 billion parameters")
    found["cgroup limit"] = 2**63 - 4096
    assert "no limit" in [finding.value for finding in machine.memory()]


def test_device_is_told_with_all_that_it_takes(monkeypatch, tmp_path):
    """On a machine that has none, as far as PyTorch's answers go."""
    import torch

    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1\nGCC version: 12\n")
    monkeypatch.setattr(machine, "_DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for owner, name, answer in (
        (torch.cuda, "is_available", True),
        (torch.cuda, "device_count", 2),
        (torch.cuda, "get_device_name", "H100"),
        (torch.backends.cudnn, "is_available", True),
        (torch.backends.cudnn, "version", 91002),
        (torch.distributed, "is_nccl_available", True),
        (torch.cuda.nccl, "version", (2, 27, 3)),
    ):
        monkeypatch.setattr(owner, name, lambda *_, answer=answer: answer)
    told = {finding.name: finding.value for finding in machine.kernels() if "native" not in finding.name}
    assert told == {
        "device": "2 x H100",
        "CUDA of torch": "12.8",
        "cuDNN": "91002",
        "NCCL": "2.27.3",
        "driver": "NVIDIA UNIX x86_64 Kernel Module  570.1",
    }
    driver.unlink()
    assert "driver" not in {finding.name for finding in machine.kernels()}


def config_findings(tmp_path, text):
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    return [(f.name, f.state, f.value, f.cure) for f in doctor.examine(str(path)) if f.section == "config"][
        1:
    ]


def test_config_that_runs_is_told_with_its_block(healthy, tmp_path):
    text = "{ // HJSON, as DeepSpeed reads it\n zero_optimization: {stage: 2}, grass: {active_layers: 3} }"
    assert config_findings(tmp_path, text) == [
        ("grass", "ok", "policy 'grass', active_layers 3", ""),
        ("other keys", "ok", "none is in conflict with the block", ""),
    ]


def test_every_conflict_of_a_config_is_a_problem(healthy, tmp_path):
    text = """{"grass": {"policy": "lisa"}, "optimizer": {"type": "Lion"},
               "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}"""
    block, *conflicts = config_findings(tmp_path, text)
    assert block[:3] == ("grass", "ok", "policy 'lisa', active_layers 2")
    assert [finding[:2] for finding in conflicts] == [
        ("zero_optimization.offload_optimizer.device", "problem"),
        ("optimizer.type", "problem"),
    ]
    assert all(cure for *_, cure in conflicts)


@pytest.mark.parametrize(
    ("text", "name", "state", "words"),
    [
        ('{"gras": {}}', "grass", "problem", "absent"),
        ('{"grass": {"polcy": "lisa"}}', "grass", "problem", "did you mean grass.policy?"),
        ('{"grass": {"enabled": false}}', "grass", "note", "switched off"),
    ],
)
def test_block_of_a_config_that_does_not_run_is_told(healthy, tmp_path, text, name, state, words):
    (finding,) = config_findings(tmp_path, text)
    assert finding[:2] == (name, state)
    assert words in finding[2]
    assert finding[3]


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_config_that_cannot_be_read_is_one_problem(healthy, tmp_path, text):
    path = tmp_path / "ds_config.json"
    if text is not None:
        path.write_text(text)
    (problem,) = [finding for finding in doctor.examine(str(path)) if finding.state == "problem"]
    assert f"{path} cannot be read" in problem.value
    assert "\n" not in problem.value


def test_command_with_a_config_exits_by_it(healthy, tmp_path, capsys):
    path = tmp_path / "ds_config.json"
    path.write_text('{"grass": {}}')
    assert cli.main(["doctor", "--config", str(path)]) == 0
    assert "This ds_config runs here" in capsys.readouterr().out
    path.write_text('{"grass": {}, "hybrid_engine": {"enabled": true}}')
    assert cli.main(["doctor", "--json", "--config", str(path)]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [f["name"] for f in document["findings"] if f["state"] == "problem"] == ["hybrid_engine.enabled"]


def test_native_kernels_that_do_not_load_are_a_note_with_the_reason(healthy, monkeypatch):
    from ds_grass import ops

    monkeypatch.setattr(ops, "native", lambda device: (False, "libgomp.so.1 is missing"))
    (finding,) = [finding for finding in doctor.examine() if finding.name == "native, cpu"]
    assert (finding.value, finding.state) == ("libgomp.so.1 is missing", "note")


def test_command_prints_the_report_and_exits_0(healthy, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "runs here" in out
    assert "0.19.8" in out


def test_command_prints_tracebacks_and_exits_1(healthy, monkeypatch, capsys):
    probe_answers(monkeypatch, hooked=NONE_HOOKED, failures={ENGINE: "Traceback [x]\nKeyError: 1"})
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
        "symbols",
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
