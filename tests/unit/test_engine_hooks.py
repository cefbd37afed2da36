"""The wrap around the engine: invisible without a block, once, and clear about what it refuses."""

import logging
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ds_grass import engine_hooks


def stub_module():
    """A stand-in for deepspeed.runtime.engine whose engine records what it was built with."""

    class DeepSpeedEngine:
        def __init__(self, args, model, optimizer=None, model_parameters=None, config_class=None):
            self.given = (args, model, optimizer, model_parameters)

    module = ModuleType("deepspeed.runtime.engine")
    module.DeepSpeedEngine = DeepSpeedEngine
    return module


def config(block=None, optimizer_name=None, **values):
    parsed = {} if block is None else {"grass": block}
    return SimpleNamespace(
        _param_dict=parsed | values, optimizer_name=optimizer_name, zero_optimization_stage=2
    )


def test_install_wraps_once_and_marks():
    module = stub_module()
    engine_hooks.install(module)
    wrapped = module.DeepSpeedEngine.__init__
    engine_hooks.install(module)
    assert module.DeepSpeedEngine.__init__ is wrapped
    assert hasattr(wrapped, engine_hooks.MARK)
    assert wrapped.__wrapped__.__name__ == "__init__"


@pytest.mark.parametrize("config_class", [None, SimpleNamespace(), config()])
def test_without_a_block_the_arguments_pass_through_untouched(config_class):
    module = stub_module()
    engine_hooks.install(module)
    params = (p for p in [torch.nn.Parameter(torch.zeros(1))])
    engine = module.DeepSpeedEngine("args", "model", model_parameters=params, config_class=config_class)
    assert engine.given == ("args", "model", None, params)
    assert vars(engine) == {"given": engine.given}


def test_engine_without_an_optimizer_stands_aside_with_one_line(caplog):
    module = stub_module()
    engine_hooks.install(module)
    with caplog.at_level(logging.INFO):
        engine = module.DeepSpeedEngine("args", "model", config_class=config({"active_layers": 2}))
    assert vars(engine) == {"given": engine.given}
    assert [record.message for record in caplog.records] == [
        "grass stands aside: this engine has no optimizer"
    ]


def test_disabled_block_is_as_if_absent():
    module = stub_module()
    engine_hooks.install(module)
    engine = module.DeepSpeedEngine("args", "model", config_class=config({"enabled": False}, "adamw"))
    assert vars(engine) == {"given": engine.given}


@pytest.mark.parametrize(
    ("block", "key"),
    [({"active_layers": "two"}, "grass.active_layers"), ("yes", "grass"), ({"polcy": "lisa"}, "policy")],
)
def test_wrong_block_is_refused_before_the_engine_is_built(block, key):
    module = stub_module()
    engine_hooks.install(module)
    with pytest.raises(ValueError, match=key) as refused:
        module.DeepSpeedEngine("args", torch.nn.Linear(1, 1), config_class=config(block, "adamw"))
    assert "\n" not in str(refused.value)


def test_controller_of_an_engine_without_grass_is_refused():
    for engine in (SimpleNamespace(optimizer=None), SimpleNamespace(optimizer=object()), object()):
        with pytest.raises(ValueError, match="does not run grass"):
            engine_hooks.controller(engine)


def test_ids_read_lists_groups_and_named_pairs():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    assert engine_hooks._ids(None) is None
    assert engine_hooks._ids([a, b]) == {id(a), id(b)}
    assert engine_hooks._ids([{"params": [a]}, {"params": [b]}]) == {id(a), id(b)}
    assert engine_hooks._ids([("a", a)]) == {id(a)}


def test_accumulation_is_unknown_where_the_script_owns_the_boundary():
    values = config()
    values.gradient_accumulation_steps = 4
    assert engine_hooks._accumulation(values) == 4
    values._param_dict["managed_gradient_accumulation"] = False
    assert engine_hooks._accumulation(values) == 2


@pytest.mark.parametrize(
    ("ds_config", "expected"),
    [
        ({}, None),
        ({"scheduler": {"params": {"total_num_steps": 70}}}, 70),
        ({"scheduler": {"type": None}}, None),
    ],
)
def test_number_of_steps_is_read_where_a_scheduler_was_told(ds_config, expected):
    assert engine_hooks._num_steps(ds_config) == expected
