"""The hook on the Trainer: GRASS's numbers beside the Trainer's, in training logs of GRASS engines, nowhere else."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest

from ds_grass import trainer_hooks
from ds_grass.telemetry.own_time import OwnTime


class Core:
    """Stands for `ds_grass.zero.core.GrassCore`."""

    def __init__(self) -> None:
        line = {"phase": "train", "active": [1, 2], "draws": 3, "states": {"bytes_to_device": 5}}
        self.journal = SimpleNamespace(time=OwnTime(), describe=lambda: line)
        self.units = {0: SimpleNamespace(numel=30), 1: SimpleNamespace(numel=12)}


ADDED = {
    "grass_phase_probe": 0.0,
    "grass_active_layers": 2.0,
    "grass_draws": 3.0,
    "grass_bytes_to_device": 5.0,
}


def engine(core: object) -> SimpleNamespace:
    return SimpleNamespace(optimizer=SimpleNamespace(core=core))


@pytest.fixture(params=["4.45", "4.46 and newer"])
def module(request, monkeypatch) -> ModuleType:
    """A stand-in for transformers.trainer, hooked, with the signature of one of its ages."""

    class Trainer:
        if request.param == "4.45":

            def log(self, logs):
                logs["epoch"] = 1.0
                self.seen = (logs, None)
        else:

            def log(self, logs, start_time=None):
                logs["epoch"] = 1.0
                self.seen = (logs, start_time)

    module = ModuleType("transformers.trainer")
    module.Trainer, module.age = Trainer, request.param
    module.get_model_param_count = lambda model, trainable_only=False: ("theirs", trainable_only)
    known = ModuleType("ds_grass.zero.core")
    known.GrassCore = Core
    monkeypatch.setitem(sys.modules, "ds_grass.zero.core", known)
    trainer_hooks.install(module)
    return module


def trainer_of(module: ModuleType, **attributes: object) -> object:
    trainer = module.Trainer()
    vars(trainer).update(attributes)
    return trainer


@pytest.mark.parametrize("attribute", ["deepspeed", "model_wrapped"])
def test_training_log_is_added_to_in_place(module, attribute):
    trainer, logs = trainer_of(module, **{attribute: engine(Core())}), {"loss": 1.0}
    trainer.log(logs)
    assert trainer.seen[0] is logs
    assert logs == {"loss": 1.0, "epoch": 1.0, **ADDED}


def test_arguments_of_every_age_pass_through(module):
    trainer = trainer_of(module, deepspeed=engine(Core()))
    trainer.log(logs={"loss": 1.0})
    assert set(trainer.seen[0]) == {"loss", "epoch", *ADDED}
    if module.age != "4.45":
        trainer.log({"loss": 1.0}, 7.0)
        assert trainer.seen[1] == 7.0
        trainer.log({"loss": 1.0}, start_time=8.0)
        assert trainer.seen[1] == 8.0
    parameters = inspect.signature(module.Trainer.log).parameters
    assert list(parameters) == ["self", "logs", *(["start_time"] if module.age != "4.45" else [])]


@pytest.mark.parametrize("logs", [{"eval_loss": 1.0}, {"train_loss": 2.0, "train_runtime": 3.0}])
def test_other_logs_are_left_as_they_are(module, logs):
    trainer = trainer_of(module, deepspeed=engine(Core()))
    trainer.log(dict(logs))
    assert trainer.seen[0] == {**logs, "epoch": 1.0}


@pytest.mark.parametrize(
    "other", [None, object(), engine(None), engine(object()), SimpleNamespace(optimizer=None)]
)
def test_engine_without_grass_is_left_as_it_is(module, other):
    trainer = trainer_of(module, deepspeed=other)
    trainer.log({"loss": 1.0})
    assert trainer.seen[0] == {"loss": 1.0, "epoch": 1.0}
    assert module.get_model_param_count(other, trainable_only=True) == ("theirs", True)


def test_process_without_any_grass_engine_is_left_as_it_is(module, monkeypatch):
    monkeypatch.delitem(sys.modules, "ds_grass.zero.core")
    trainer = trainer_of(module, deepspeed=engine(Core()))
    trainer.log({"loss": 1.0})
    assert trainer.seen[0] == {"loss": 1.0, "epoch": 1.0}


def test_count_of_trainable_parameters_is_that_of_the_whole_run(module):
    model = engine(Core())
    assert module.get_model_param_count(model, trainable_only=True) == 42
    assert module.get_model_param_count(model, True) == 42
    assert module.get_model_param_count(model) == ("theirs", False)


def test_hook_is_put_on_once(module):
    log, count = module.Trainer.log, module.get_model_param_count
    trainer_hooks.install(module)
    assert (module.Trainer.log, module.get_model_param_count) == (log, count)


def test_time_of_the_hook_is_counted_as_telling(module):
    core = Core()
    trainer_of(module, deepspeed=engine(core)).log({"loss": 1.0})
    assert core.journal.time.calls == 1


def test_trainer_without_a_log_is_refused_for_the_activation_to_warn():
    module = ModuleType("transformers.trainer")
    module.Trainer = type("Trainer", (), {})
    with pytest.raises(AttributeError, match="log"):
        trainer_hooks.install(module)
