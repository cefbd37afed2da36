"""Needed names of DeepSpeed: all there in the installed version; a missing one is refused by its dotted path."""

import logging

import deepspeed
import pytest

from ds_grass.zero import compat


@pytest.mark.parametrize("stage", [1, 3])
def test_installed_deepspeed_has_every_needed_name(stage):
    assert compat.missing(stage) == []
    compat.check(stage)


@pytest.mark.parametrize(
    ("module", "name"),
    [("deepspeed.runtime.engine", "DeepSpeedEngine._gone"), ("deepspeed.no_such_module", "anything")],
)
def test_missing_name_is_refused_with_its_path_and_the_version(monkeypatch, module, name):
    monkeypatch.setitem(compat.NEEDED, module, (name,))
    with pytest.raises(RuntimeError, match=rf"{module}\.{name}.*deepspeed {deepspeed.__version__}"):
        compat.check(1)


def test_names_of_stage_3_are_needed_by_stage_3_only(monkeypatch):
    monkeypatch.setitem(compat.NEEDED_BY_STAGE_3, "deepspeed.runtime.zero.stage3", ("Gone",))
    compat.check(2)
    with pytest.raises(RuntimeError, match="Gone"):
        compat.check(3)


@pytest.mark.parametrize(
    ("version", "supported"), [("0.18.0", True), ("0.19.8+abc", True), ("0.20.1", False)]
)
def test_versions_outside_the_range_are_warned_about_only(monkeypatch, caplog, version, supported):
    monkeypatch.setattr(deepspeed, "__version__", version)
    with caplog.at_level(logging.WARNING):
        compat.check(1)
    assert compat.is_supported() is supported
    assert bool(caplog.records) is not supported
