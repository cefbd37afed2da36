"""Contracts of the activation: a host module is hooked whichever way it is imported, nothing else changes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from ds_grass import activate

HOST = "fakehost.runtime.engine"
INSTALLER = "fake_installer"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A stand-in for DeepSpeed on disk, with an installer that writes down what it was called with."""
    write_host(tmp_path, "class DeepSpeedEngine:\n    def __init__(self, **kwargs): self.built = True\n")
    installer = ModuleType(INSTALLER)
    installer.calls = []
    installer.install = installer.calls.append
    monkeypatch.setitem(sys.modules, INSTALLER, installer)
    monkeypatch.setattr(activate, "HOOKS", {HOST: f"{INSTALLER}:install"})
    monkeypatch.setattr(activate, "failures", {})
    monkeypatch.setattr(activate, "_hooked", {})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not hasattr(f, "is_ds_grass")])
    monkeypatch.syspath_prepend(tmp_path)
    yield installer
    for name in [name for name in sys.modules if name.partition(".")[0] == "fakehost"]:
        del sys.modules[name]


def write_host(folder: Path, engine_source: str, package_source: str = "") -> None:
    runtime = folder / "fakehost" / "runtime"
    runtime.mkdir(parents=True, exist_ok=True)
    (runtime.parent / "__init__.py").write_text(package_source)
    (runtime / "__init__.py").write_text("")
    (runtime / "engine.py").write_text(textwrap.dedent(engine_source))


def test_autoload_hooks_a_module_imported_later(host):
    activate.autoload()
    assert host.calls == []
    engine = importlib.import_module(HOST)
    assert host.calls == [engine]
    assert engine.DeepSpeedEngine().built


def test_autoload_hooks_a_module_imported_before(host):
    engine = importlib.import_module(HOST)
    activate.autoload()
    assert host.calls == [engine]


def test_autoload_called_again_changes_nothing(host):
    engine = importlib.import_module(HOST)
    for _ in range(3):
        activate.autoload()
    assert sum(hasattr(finder, "is_ds_grass") for finder in sys.meta_path) == 1
    assert host.calls == [engine]
    assert activate.is_active()


def test_autoload_during_the_import_of_the_host_package_hooks(host, tmp_path):
    """The script imports deepspeed first: its package is running when torch calls us."""
    source = (
        "from ds_grass import activate\nactivate.autoload()\nfrom .runtime.engine import DeepSpeedEngine\n"
    )
    write_host(tmp_path, "class DeepSpeedEngine: pass", source)
    package = importlib.import_module("fakehost")
    assert host.calls == [package.runtime.engine]


def test_autoload_while_the_module_itself_runs_waits_for_its_end(host, tmp_path):
    write_host(
        tmp_path,
        f"""
        from ds_grass import activate
        import sys
        activate.autoload()
        activate.autoload()
        calls_inside = list(sys.modules["{INSTALLER}"].calls)
        class DeepSpeedEngine: pass
        """,
    )
    engine = importlib.import_module(HOST)
    assert engine.calls_inside == []
    assert host.calls == [engine]
    assert type(engine.__spec__) is ModuleSpec


def test_autoload_while_a_module_runs_that_then_fails_hooks_nothing(host, tmp_path):
    write_host(tmp_path, "from ds_grass import activate\nactivate.autoload()\nraise KeyError('host')\n")
    with pytest.raises(KeyError, match="host"):
        importlib.import_module(HOST)
    assert host.calls == []


def test_error_of_the_host_module_is_left_as_it_is(host, tmp_path):
    write_host(tmp_path, "raise KeyError('host')")
    activate.autoload()
    with pytest.raises(KeyError, match="host"):
        importlib.import_module(HOST)
    assert host.calls == []
    assert activate.failures == {}


def test_reload_hooks_the_new_classes(host):
    activate.autoload()
    engine = importlib.import_module(HOST)
    old_class = engine.DeepSpeedEngine
    assert importlib.reload(engine) is engine
    assert engine.DeepSpeedEngine is not old_class
    assert host.calls == [engine, engine]


def test_import_after_removal_from_sys_modules_hooks_the_new_module(host):
    activate.autoload()
    first = importlib.import_module(HOST)
    del sys.modules[HOST]
    second = importlib.import_module(HOST)
    assert host.calls == [first, second]
    assert first is not second


def test_find_spec_executes_nothing_and_looks_ordinary(host):
    activate.autoload()
    spec = importlib.util.find_spec(HOST)
    assert HOST not in sys.modules
    assert host.calls == []
    assert spec.origin.endswith("engine.py")
    assert "DeepSpeedEngine" in spec.loader.get_source(HOST)


def test_module_is_ordinary_after_its_import(host):
    activate.autoload()
    engine = importlib.import_module(HOST)
    assert type(engine.__loader__) is type(engine.__spec__.loader) is SourceFileLoader
    assert "self.built" in inspect.getsource(engine.DeepSpeedEngine)
    assert pickle.loads(pickle.dumps(engine.DeepSpeedEngine)) is engine.DeepSpeedEngine


def test_module_made_by_hand_from_its_spec_is_hooked(host):
    activate.autoload()
    module = importlib.util.module_from_spec(importlib.util.find_spec(HOST))
    module.__spec__.loader.exec_module(module)
    assert host.calls == [module]


def test_lazily_loaded_module_is_hooked_at_first_use(host):
    activate.autoload()
    spec = importlib.util.find_spec(HOST)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[HOST] = module
    spec.loader.exec_module(module)
    assert host.calls == []
    assert module.DeepSpeedEngine().built
    assert len(host.calls) == 1


def test_module_in_a_zip_file_is_hooked(host, tmp_path, monkeypatch):
    archive = tmp_path / "host.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "fakehost").rglob("*.py"):
            file.write(path, path.relative_to(tmp_path))
    monkeypatch.setattr(sys, "path", [str(archive), *[p for p in sys.path if p != str(tmp_path)]])
    activate.autoload()
    engine = importlib.import_module(HOST)
    assert engine.__file__.startswith(str(archive))
    assert host.calls == [engine]


def test_finders_of_others_before_and_after_are_asked(host):
    class Silent:
        asked: list[str] = []

        def find_spec(self, fullname, path=None, target=None):
            self.asked.append(fullname)

    activate.autoload()
    sys.meta_path.insert(0, Silent())
    sys.meta_path.append(object())  # no find_spec at all
    engine = importlib.import_module(HOST)
    assert HOST in Silent.asked
    assert host.calls == [engine]


def test_module_that_is_not_installed_stays_missing(host, monkeypatch):
    monkeypatch.setattr(activate, "HOOKS", {"nosuchhost": f"{INSTALLER}:install"})
    activate.autoload()
    with pytest.raises(ModuleNotFoundError, match="nosuchhost"):
        importlib.import_module("nosuchhost")


def test_loader_can_be_copied_and_pickled(host):
    activate.autoload()
    loader = importlib.util.find_spec(HOST).loader
    for twin in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert twin.get_filename(HOST) == loader.get_filename(HOST)


def test_stub_module_without_spec_is_hooked_directly(host, monkeypatch):
    stub = ModuleType(HOST)
    assert stub.__spec__ is None
    monkeypatch.setitem(sys.modules, HOST, stub)
    activate.autoload()
    assert host.calls == [stub]


class _Config:
    def __init__(self, param_dict):
        self._param_dict = param_dict


@pytest.fixture
def broken_engine(host, caplog):
    def install(module):
        raise LookupError("deepspeed has no such name")

    host.install = install
    activate.autoload()
    with caplog.at_level(logging.WARNING):
        return importlib.import_module(HOST)


def test_failed_installer_leaves_the_host_usable_and_warns_once(broken_engine, caplog):
    assert broken_engine.DeepSpeedEngine(config_class=_Config({"bf16": {}})).built
    assert broken_engine.DeepSpeedEngine().built
    importlib.reload(broken_engine)
    messages = [record.getMessage() for record in caplog.get_records("setup") + caplog.records]
    assert len(messages) == 1
    assert HOST in messages[0]
    assert "deepspeed has no such name" in messages[0]


def test_failed_installer_refuses_a_block_with_the_traceback(broken_engine):
    assert "LookupError: deepspeed has no such name" in activate.failures[HOST]
    with pytest.raises(RuntimeError, match="(?s)`grass` block .*LookupError: deepspeed has no such name"):
        broken_engine.DeepSpeedEngine(config_class=_Config({"grass": {"active_layers": 1}}))
    with pytest.raises(RuntimeError, match="could not hook DeepSpeed"):
        broken_engine.DeepSpeedEngine(config_class=_Config({"grass": {}}))


def test_failed_optional_installer_warns_of_what_is_missing_and_refuses_nothing(host, monkeypatch, caplog):
    monkeypatch.setattr(activate, "OPTIONAL", {HOST: "so the log lacks numbers"})
    monkeypatch.setattr(activate, "HOOKS", {HOST: "no_such_module_of_ours:install"})
    activate.autoload()
    with caplog.at_level(logging.WARNING):
        engine = importlib.import_module(HOST)
    (record,) = caplog.records
    assert "so the log lacks numbers" in record.getMessage()
    assert engine.DeepSpeedEngine(config_class=_Config({"grass": {}})).built


def test_hooks_that_may_fail_are_hooks():
    assert set(activate.OPTIONAL) < set(activate.HOOKS)


def test_failed_installer_lets_a_disabled_block_pass(broken_engine):
    assert broken_engine.DeepSpeedEngine(config_class=_Config({"grass": {"enabled": False}})).built


def test_installer_that_works_at_reload_clears_the_failure(broken_engine, host):
    host.install = host.calls.append
    importlib.reload(broken_engine)
    assert activate.failures == {}
    assert broken_engine.DeepSpeedEngine(config_class=_Config({"grass": {}})).built


def test_installer_that_cannot_be_imported_is_kept(host, monkeypatch):
    monkeypatch.setattr(activate, "HOOKS", {HOST: "no_such_module_of_ours:install"})
    activate.autoload()
    importlib.import_module(HOST)
    assert "No module named 'no_such_module_of_ours'" in activate.failures[HOST]


def test_autoload_never_raises_and_keeps_the_traceback(host, monkeypatch):
    class Hostile:
        def __getattr__(self, name):
            raise OSError("hostile finder")

    monkeypatch.setattr(sys, "meta_path", [Hostile(), *sys.meta_path])
    activate.autoload()
    assert "hostile finder" in activate.failures["autoload"]


# What follows needs a fresh interpreter.


def run_python(source: str, **environment: str) -> str:
    # Measured as a user has it: without the tracer of a coverage run.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    variables = {**inherited, "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=120, check=True
    ).stdout


def test_import_of_the_package_loads_no_heavy_module(tmp_path):
    out = run_python(
        """
        import sys
        import ds_grass, megatron_ext
        heavy = ("torch", "deepspeed", "pydantic", "megatron", "numpy", "logging")
        print([name for name in heavy if name in sys.modules])
        print(ds_grass.activate.is_active(), ds_grass.__version__, "controller" in dir(ds_grass))
        """
    )
    assert out.split("\n")[0] == "[]"
    assert out.split("\n")[1] == "True 0.1.0 True"


def test_autoload_costs_well_under_a_millisecond(tmp_path):
    """CPU time of loading and calling the entry point, as PyTorch does at the end of `import torch`."""
    source = """
        import importlib.metadata, typing, time, logging
        entry = importlib.metadata.EntryPoint("ds_grass", "ds_grass.activate:autoload", "torch.backends")
        start = time.process_time()
        entry.load()()
        print(time.process_time() - start)
        """
    cache = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    run_python(source, **cache)  # writes the bytecode, as pip does at installation
    # the least of several: a busy machine's caches and clock only ever add to the cost
    seconds = min(float(run_python(source, **cache)) for _ in range(7))
    assert seconds < 1e-3


def entry_point_on_path(folder: Path) -> str:
    """A folder that declares the entry point the way an installed distribution does."""
    metadata = folder / "ds_grass-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ds-grass\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nds_grass = ds_grass.activate:autoload\n")
    return os.pathsep.join([str(folder), str(REPOSITORY)])


@pytest.mark.parametrize("first", ["torch", "deepspeed"])
def test_deepspeed_is_hooked_whichever_is_imported_first(first, tmp_path):
    pytest.importorskip("deepspeed")
    source = f"""
        import {first}
        import torch, deepspeed, sys
        from ds_grass import activate
        print(deepspeed.DeepSpeedEngine.__init__.__grass_wrapped__ is not None, activate.failures)
        """
    out = run_python(source, PYTHONPATH=entry_point_on_path(tmp_path))
    assert out.strip().split("\n")[-1] == "True {}"


def test_deepspeed_is_not_touched_when_autoload_is_switched_off(tmp_path):
    pytest.importorskip("deepspeed")
    source = """
        import torch, deepspeed, sys
        print("ds_grass" in sys.modules, hasattr(deepspeed.DeepSpeedEngine.__init__, "__grass_wrapped__"))
        import ds_grass
        print(hasattr(deepspeed.DeepSpeedEngine.__init__, "__grass_wrapped__"))
        """
    environment = {"PYTHONPATH": entry_point_on_path(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert run_python(source, **environment).strip().split("\n")[-2:] == ["False False", "True"]
