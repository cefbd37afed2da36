"""Contracts of the seam to Megatron-core: it is put in once, and without a block in a config it does nothing."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import textwrap
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import megatron_ext
from megatron_ext import deepspeed_engine, hooks, job
from megatron_ext.config import MemoryConfig
from megatron_ext.locate import Located
from megatron_ext.rank_memory import RankMemory, bytes_by_parameter
from megatron_ext.sequence_parallel import switch
from megatron_ext.sequence_parallel.micro_batch import MicroBatch, running

QUIET = {"megatron_ext": {"log": {"enabled": False}}}


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    """A process that has not looked for a config, and that none names."""
    monkeypatch.setattr(job, "_job", None)
    monkeypatch.setattr(job, "_looked", False)
    monkeypatch.delenv("MEGATRON_EXT_CONFIG", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def a_module() -> SimpleNamespace:
    """Stands for the three modules that are hooked."""

    class TransformerBlock(nn.Module):
        def __init__(self, config=None, layers=()):
            """As Megatron has it."""
            super().__init__()
            self.config, self.layers = config, nn.ModuleList(layers)

    class GPTModel(nn.Module):
        def __init__(self, decoder, vocab_size=32, post_process=True):
            super().__init__()
            self.decoder, self.vocab_size, self.post_process = decoder, vocab_size, post_process

    class DeepSpeedEngine:
        def __init__(self, module=None, config_class=None):
            self.module = module

    return SimpleNamespace(**{cls.__name__: cls for cls in (TransformerBlock, GPTModel, DeepSpeedEngine)})


INSTALLS = {
    "TransformerBlock": hooks.install_block,
    "GPTModel": hooks.install_gpt,
    "DeepSpeedEngine": hooks.install_engine,
}


class Told:
    """A job that notes what it is told."""

    def __init__(self):
        self.adopted, self.vocabularies = [], []
        self.memory = RankMemory(MemoryConfig(limit="1GB"), 1)

    def adopt(self, block):
        self.adopted.append(block)

    def set_vocabulary(self, block, size):
        self.vocabularies.append((block, size))


@pytest.mark.parametrize("name", INSTALLS)
def test_hook_is_put_in_once_and_looks_like_the_original(name):
    module = a_module()
    owner = getattr(module, name)
    original = owner.__init__
    INSTALLS[name](module)
    hooked = owner.__init__
    INSTALLS[name](module)
    assert owner.__init__ is hooked
    assert hooked is not original
    assert hooked.__wrapped__ is original
    assert hooked.__doc__ == original.__doc__


def test_hook_is_put_in_again_where_another_tool_took_it_out():
    module = a_module()
    original = module.TransformerBlock.__init__
    hooks.install_block(module)
    module.TransformerBlock.__init__ = original
    hooks.install_block(module)
    assert module.TransformerBlock.__init__.__wrapped__ is original


def test_blocks_are_adopted_once_when_they_are_complete_also_by_a_derived_class(monkeypatch):
    module, told = a_module(), Told()
    hooks.install_block(module)
    hooks.install_block(module)
    monkeypatch.setattr(job, "current", lambda: told)
    blocks = [module.TransformerBlock(layers=[nn.Linear(1, 1)])]
    derived = type("Derived", (module.TransformerBlock,), {})
    blocks.append(derived())
    assert told.adopted == blocks
    assert len(told.adopted[0].layers) == 1


def test_weights_and_vocabulary_are_told_by_the_model_whose_stage_has_logits(monkeypatch):
    module, told = a_module(), Told()
    hooks.install_gpt(module)
    monkeypatch.setattr(job, "current", lambda: told)
    block = module.TransformerBlock()
    model = module.GPTModel(block, 64)
    model.head = nn.Linear(2, 2, bias=False)
    module.GPTModel(block, 64, post_process=False)
    assert told.vocabularies == [(block, 64)]
    assert told.memory.static() == bytes_by_parameter(model.head.parameters())


def test_failure_of_the_original_is_not_followed_by_a_hook(monkeypatch):
    module, told = a_module(), Told()
    hooks.install_block(module)
    monkeypatch.setattr(job, "current", lambda: told)
    with pytest.raises(TypeError):
        module.TransformerBlock(nothing=1)
    assert told.adopted == []


def schedules() -> SimpleNamespace:
    """Stands for Megatron-core's module: steps find their parts among its names, as functions find globals."""
    module, ran = SimpleNamespace(), []

    def forward_step(number):
        """As Megatron has it."""
        ran.append(("forward", number))
        return number + 10

    def run(name):
        def forward_backward(*, forward_step_func=None, num_microbatches, forward_only=False, fail=False):
            ran.append((name, num_microbatches, forward_only))
            if fail:
                raise KeyError(name)
            return [module.forward_step(number) for number in range(num_microbatches)]

        return forward_backward

    for name in hooks.SCHEDULES:
        setattr(module, name, run(name))
    module.forward_step, module.ran = forward_step, ran
    return module


class Stepping:
    """A job that notes its steps among what the schedule does."""

    def __init__(self, ran):
        self.ran = ran

    @contextmanager
    def step(self, micro_batches):
        self.ran.append(("begins", micro_batches))
        try:
            yield
        finally:
            self.ran.append(("ends", micro_batches))

    @contextmanager
    def evaluation(self):
        self.ran.append(("evaluation",))
        yield

    def forward_begins(self):
        self.ran.append(("forward begins",))

    def forward_ended(self):
        self.ran.append(("forward ended",))


@pytest.mark.parametrize("name", [*hooks.SCHEDULES, "forward_step"])
def test_schedule_is_wrapped_once_and_again_where_another_tool_took_it_out(name):
    module = schedules()
    original = getattr(module, name)
    hooks.install_schedules(module)
    hooked = getattr(module, name)
    hooks.install_schedules(module)
    assert getattr(module, name) is hooked is not original
    assert (hooked.__wrapped__, hooked.__name__, hooked.__doc__) == (
        original,
        original.__name__,
        original.__doc__,
    )
    assert inspect.signature(hooked) == inspect.signature(original)
    setattr(module, name, original)
    hooks.install_schedules(module)
    assert getattr(module, name).__wrapped__ is original


@pytest.mark.parametrize("name", hooks.SCHEDULES)
def test_step_is_told_around_the_schedule_and_each_forward_around_itself(monkeypatch, name):
    module = schedules()
    hooks.install_schedules(module)
    hooks.install_schedules(module)
    monkeypatch.setattr(job, "_job", Stepping(module.ran))
    assert getattr(module, name)(num_microbatches=2) == [10, 11]
    assert module.ran == [
        ("begins", 2),
        (name, 2, False),
        *(
            row
            for number in range(2)
            for row in (("forward begins",), ("forward", number), ("forward ended",))
        ),
        ("ends", 2),
    ]


@pytest.mark.parametrize("name", hooks.SCHEDULES)
def test_evaluation_is_no_step(monkeypatch, name):
    module = schedules()
    hooks.install_schedules(module)
    monkeypatch.setattr(job, "_job", Stepping(module.ran))
    assert getattr(module, name)(num_microbatches=1, forward_only=True) == [10]
    assert module.ran == [
        ("evaluation",),
        (name, 1, True),
        ("forward begins",),
        ("forward", 0),
        ("forward ended",),
    ]


@pytest.mark.parametrize("name", hooks.SCHEDULES)
def test_step_without_a_job_is_as_ever_and_looks_for_no_config(monkeypatch, name):
    module = schedules()
    hooks.install_schedules(module)
    monkeypatch.setattr(job, "locate", lambda: pytest.fail("looked"))
    assert getattr(module, name)(num_microbatches=2) == [10, 11]
    assert module.ran == [(name, 2, False), ("forward", 0), ("forward", 1)]


def test_schedule_that_is_called_wrongly_says_so_itself(monkeypatch):
    module = schedules()
    hooks.install_schedules(module)
    monkeypatch.setattr(job, "_job", Stepping(module.ran))
    with pytest.raises(TypeError, match="num_microbatches"):
        module.forward_backward_no_pipelining()
    assert module.ran == []


def test_step_that_fails_ends_and_the_error_is_the_schedules(monkeypatch):
    module = schedules()
    hooks.install_schedules(module)
    monkeypatch.setattr(job, "_job", Stepping(module.ran))
    with pytest.raises(KeyError):
        module.forward_backward_no_pipelining(num_microbatches=1, fail=True)
    assert module.ran[-1] == ("ends", 1)


def test_job_without_recomputation_lets_steps_pass():
    running_job = a_job()
    with running_job.step(4):
        running_job.forward_begins()
        running_job.forward_ended()


@pytest.mark.parametrize("parsed", [None, {}, {"grass": {}}])
def test_engine_without_a_block_in_its_config_is_left_alone(monkeypatch, parsed):
    module = a_module()
    hooks.install_engine(module)
    monkeypatch.setattr(job, "current", lambda: pytest.fail("looked for a job"))
    module.DeepSpeedEngine(config_class=SimpleNamespace(_param_dict=parsed))
    module.DeepSpeedEngine()


def test_engine_with_a_block_in_its_config_is_joined(monkeypatch):
    from megatron_ext import deepspeed_engine

    module, joined = a_module(), []
    hooks.install_engine(module)
    monkeypatch.setattr(deepspeed_engine, "join", lambda *given: joined.append(given))
    engine = module.DeepSpeedEngine(config_class=SimpleNamespace(_param_dict=QUIET))
    assert joined == [(engine, QUIET)]


def test_without_a_block_models_are_built_as_ever_and_nothing_of_megatron_is_imported(tmp_path):
    """In a process of its own: a config that is named and has no block, and none at all."""
    (tmp_path / "ds_config.json").write_text('{"train_batch_size": 1}')
    source = """
        import os, sys
        from types import SimpleNamespace
        import megatron_ext
        from megatron_ext import hooks

        class TransformerBlock:
            def __init__(self, config):
                self.config = config

        class GPTModel:
            def __init__(self):
                self.post_process, self.decoder, self.vocab_size = True, None, 1

        for named in (None, sys.argv[1]):
            if named:
                os.environ["MEGATRON_EXT_CONFIG"] = named
            module = SimpleNamespace(TransformerBlock=TransformerBlock, GPTModel=GPTModel)
            hooks.install_block(module)
            hooks.install_gpt(module)
            assert vars(TransformerBlock(3)) == {"config": 3}
            GPTModel()
            assert megatron_ext.counters() == {}
            megatron_ext.job._looked = False
        heavy = ("megatron", "deepspeed", "sklearn", "matplotlib", "transformer_engine")
        print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), str(tmp_path / "ds_config.json")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[]", done.stderr


# The job


def test_config_is_looked_for_once(monkeypatch):
    looks = []
    monkeypatch.setattr(job, "locate", lambda: looks.append(1))
    assert job.current() is None
    assert job.current() is None
    assert looks == [1]


def test_apply_starts_a_job_ends_the_one_before_and_remove_ends_it(monkeypatch):
    closed = []
    monkeypatch.setattr(job.Job, "close", lambda self: closed.append(self))
    megatron_ext.apply(QUIET)
    first = job.current()
    megatron_ext.apply(QUIET)
    second = job.current()
    assert closed == [first]
    assert second is not first
    megatron_ext.remove()
    megatron_ext.remove()
    assert closed == [first, second]
    assert job.current() is None
    assert megatron_ext.counters() == {}


def test_asking_for_counters_or_removing_looks_for_no_config(monkeypatch):
    monkeypatch.setattr(job, "locate", lambda: pytest.fail("looked"))
    assert megatron_ext.counters() == {}
    megatron_ext.remove()
    assert job.current() is None


def test_summed_gradients_go_with_the_job():
    """An engine's hooks on gradients, and what marks them."""
    running_job, model = a_job(), nn.LayerNorm(2)
    model.weight.sequence_parallel = True
    group = SimpleNamespace(size=lambda: 1)
    for _ in range(2):
        deepspeed_engine._sum_gradients(model, group, running_job.on_close)
    assert len(model.weight._backward_hooks) == 1
    assert not model.bias._backward_hooks
    running_job.close()
    assert not model.weight._backward_hooks
    assert set(vars(model.weight)) == {"sequence_parallel"}


def test_gradients_of_what_rests_now_are_summed_once_it_trains(monkeypatch):
    """Blocks may rest when an engine is built, and train later."""
    running_job, model, summed = a_job(), nn.LayerNorm(2), []
    monkeypatch.setattr(deepspeed_engine, "_summed", lambda grad, group: summed.append(group) or grad)
    for parameter in model.parameters():
        parameter.sequence_parallel = True
    model.weight.requires_grad_(False)
    group = SimpleNamespace(size=lambda: 1)
    deepspeed_engine._sum_gradients(model, group, running_job.on_close)
    assert not model.weight.requires_grad
    model.weight.requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    assert summed == [group] * 2
    running_job.close()


def test_apply_without_a_block_is_no_job_and_a_wrong_block_is_an_error():
    megatron_ext.apply({"train_batch_size": 1})
    assert job.current() is None
    with pytest.raises(ValueError, match="megatron_ext"):
        megatron_ext.apply({"megatron_ext": {"no_such_key": 1}})
    assert job.current() is None


def a_job(**block) -> job.Job:
    return job.Job(Located("megatron_ext.apply", None, {"megatron_ext": {**QUIET["megatron_ext"], **block}}))


def a_block(size: int, *layers: nn.Module, **settings) -> nn.Module:
    config = SimpleNamespace(**{"sequence_parallel": True, "context_parallel_size": 1, **settings})
    block = a_module().TransformerBlock(config, layers or (nn.Linear(1, 1),))
    block.tp_group = SimpleNamespace(size=lambda: size)
    for number, layer in enumerate(block.layers, 2):
        layer.layer_number = number
    return block


@pytest.fixture
def _compatible(monkeypatch):
    monkeypatch.setattr(job.compat, "check", lambda: None)
    monkeypatch.setattr(switch, "attach", lambda *given: pytest.fail("attached"))


@pytest.mark.usefixtures("_compatible")
def test_block_with_nothing_to_switch_is_left_alone(caplog):
    """One rank in the group, no layers, or switched off: with an explanation where somebody may wonder."""
    caplog.set_level("INFO")
    running_job = a_job()
    running_job.adopt(a_block(1, sequence_parallel=False))
    assert "tensor_model_parallel_size is 1" in caplog.text
    empty = a_block(4)
    empty.layers = nn.ModuleList()
    running_job.adopt(empty)
    a_job(sequence_parallel={"enabled": False}).adopt(a_block(4, sequence_parallel=False))
    assert running_job.blocks == []


@pytest.mark.usefixtures("_compatible")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sequence_parallel": False},
            "sequence_parallel is False with tensor_model_parallel_size 4; allowed: True",
        ),
        ({"context_parallel_size": 2}, "context_parallel_size is 2; allowed: 1; use those ranks"),
    ],
)
def test_settings_of_the_script_that_cannot_be_worked_with_are_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        a_job().adopt(a_block(4, **settings))


def test_micro_batch_that_ran_is_counted_once_and_freed_without_a_garbage_collection():
    """Masks and tables of angles hang on it; Megatron's scripts may switch automatic collection off."""
    running_job = a_job()
    gc.disable()
    try:
        batch = MicroBatch(None, ("ring", "ring", "metp"), 1, 64)
        gone = weakref.ref(batch)
        x = torch.ones(2, requires_grad=True) * 1
        running_job._begun(batch, x)
        with running(batch):
            batch.calls.update({("forward", "ring"): 2, ("forward", "metp"): 1})
            y = x * 2
        running_job._finished(batch, x, y)
        batch.calls["recomputed", "metp"] += 1
        y.sum().backward()
        del batch, x, y
        assert running_job.counters() == {
            "ring": {64: {"forward": 2, "backward": 2, "recomputed": 0}},
            "metp": {64: {"forward": 1, "backward": 1, "recomputed": 1}},
        }
        assert gone() is None
    finally:
        gc.enable()
