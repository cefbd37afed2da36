"""Saving and loading in the ways that scripts really do it, and what goes wrong on one rank only."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from tests.distributed import jobs
from tests.distributed.cases_faults import no_more_pages
from tests.distributed.cases_saving import barrier, fingerprint
from tests.distributed.cases_universal import UNIVERSAL, all_states, convert_together
from tests.distributed.harness import Context
from tests.distributed.registry import case


def train(engine: Any, job: jobs.Job, ctx: Context, first: int, last: int) -> list[jobs.Step]:
    return [jobs.train_step(engine, job, ctx, number) for number in range(first, last)]


@contextlib.contextmanager
def refused(match: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """One line that says so."""
    with pytest.raises(kind, match=match) as error:
        yield
    assert "\n" not in str(error.value)


@case(ranks=(1, 2), strength=1, stage=(1, 3))
def what_others_put_into_the_folder_stays(ctx: Context, stage: int) -> None:
    """A tokenizer beside the states survives the next save of that tag; a link of that name makes room."""
    folder, job = ctx.folder / "saved", jobs.Job(stage=stage)
    with jobs.engine_of(job) as engine:
        engine.save_checkpoint(str(folder), tag="best")
        engine.save_checkpoint(str(folder), tag="best/inner")
        if ctx.rank == 0:
            (folder / "best" / "tokenizer.json").write_text("mine")
            os.symlink("best", folder / "link")
        barrier()
        engine.save_checkpoint(str(folder), tag="best")
        engine.save_checkpoint(str(folder), tag="link")
        for tag in ("best", "best/inner", "link"):
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
            assert path is not None, tag
        assert (folder / "best" / "tokenizer.json").read_text() == "mine"
        assert not (folder / "link").is_symlink()
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["best", "link"]


@case(ranks=(2,), stage=(2,))
def storage_that_ranks_do_not_share_is_noticed_while_saving(ctx: Context, stage: int) -> None:
    with (
        jobs.engine_of(jobs.Job(stage=stage)) as engine,
        refused("rank 0 does not see .* rank 1", RuntimeError),
    ):
        engine.save_checkpoint(str(ctx.folder / f"node{ctx.rank}"), tag="t")
    assert not [path for path in (ctx.folder / f"node{ctx.rank}").iterdir() if path.is_dir()]


@case(most_quick=2, ranks=(1,), stage=(2,), tag=("", ".", "..", "../out", "/absolute"))
def a_tag_that_names_no_folder_is_refused_before_anything_is_written(
    ctx: Context, stage: int, tag: str
) -> None:
    with jobs.engine_of(jobs.Job(stage=stage)) as engine, refused("cannot name a checkpoint"):
        engine.save_checkpoint(str(ctx.folder / "saved"), tag=tag)
    assert not (ctx.folder / "saved").exists()


@case(ranks=(1, 2), strength=1, stage=(1, 3))
def a_rename_that_fails_gives_the_older_checkpoint_its_name_back(ctx: Context, stage: int) -> None:
    """So does it say; and what could not be named in `latest` is said to be saved."""
    folder, job = ctx.folder / "saved", jobs.Job(stage=stage)
    from ds_grass.zero import saving

    with jobs.engine_of(job) as engine:
        engine.save_checkpoint(str(folder), tag="same [1]")
        saved = fingerprint(engine)
        train(engine, job, ctx, 0, 3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving, "sync_folder", _raise)
            patch.setattr(os, "rename", _failing_second(os.rename))
            with refused("was not saved", RuntimeError):
                engine.save_checkpoint(str(folder), tag="same [1]")
        barrier()
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["same [1]"]
        barrier()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving.Place, "name_latest", _raise)
            with refused("other was saved, but .*latest was not updated", RuntimeError):
                engine.save_checkpoint(str(folder), tag="other")
        engine.load_checkpoint(str(folder))
        assert fingerprint(engine) == saved


def _raise(*args: object) -> None:
    raise OSError(5, "Input/output error")


def _failing_second(rename: Any) -> Any:
    calls = []

    def failing(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            _raise()
        rename(source, target)

    return failing


class _Pair(nn.Module):
    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.randn(8, 8) * 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.first) @ self.second


class _Pairs(nn.Module):
    def __init__(self, names: tuple[str, str] = ("first", "second")) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Pair(names) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@case(ranks=(1, 2), strength=1, stage=(1, 3))
def a_model_that_differs_only_in_the_order_of_parameters_is_refused(ctx: Context, stage: int) -> None:
    """As many elements in each block, so nothing but names tells them apart."""
    job = jobs.Job(stage=stage, grass={"probe_steps": 0, "active_layers": 1})
    with jobs.engine_of(job, model=_Pairs()) as engine:
        engine.save_checkpoint(str(ctx.folder / "saved"), tag="t")
    with (
        jobs.engine_of(job, model=_Pairs(("second", "first"))) as engine,
        refused("of another model: in blocks.0"),
    ):
        engine.load_checkpoint(str(ctx.folder / "saved"), tag="t")


@case(most_quick=2, ranks=(1, 2), strength=1, stage=(1, 2, 3))
def loaded_in_the_middle_of_a_step_that_step_begins_anew(ctx: Context, stage: int) -> None:
    """Micro-batches made before the load do not count after it; a step without gradients is a sentence."""
    job, kept = jobs.Job(stage=stage, accumulation=2), []
    with jobs.engine_of(job) as engine:
        train(engine, job, ctx, 0, 4)
        engine.save_checkpoint(str(ctx.folder / "saved"), tag="t")
        for half_a_step in (False, True):
            if half_a_step:
                engine.backward(models.loss(engine, job.data(9, ctx)[ctx.rank][0]))
                engine.step()
            engine.load_checkpoint(str(ctx.folder / "saved"), tag="t")
            kept.append((train(engine, job, ctx, 4, 7), jobs.masters(engine)))
    assert kept[0][0] == kept[1][0]
    jobs.assert_identical(kept[0][1], kept[1][1], "masters")
    with jobs.engine_of(jobs.replace(job, accumulation=1)) as engine:
        with refused("without gradients", RuntimeError):
            engine.step()


@case(ranks=(1, 2), strength=1, stage=(1, 3))
def leaving_out_frozen_parameters_leaves_out_no_block_that_rests(ctx: Context, stage: int) -> None:
    job = jobs.Job(stage=stage, zero={"stage3_gather_16bit_weights_on_model_save": True})
    with jobs.engine_of(job) as engine:
        train(engine, job, ctx, 0, 3)
        assert {param.requires_grad for param in engine.module.parameters()} == {True, False}
        flags = [param.requires_grad for param in engine.module.parameters()]
        engine.save_16bit_model(str(ctx.folder), "model.bin", exclude_frozen_parameters=True)
        names = {name for name, _ in engine.module.named_parameters()}
        assert [param.requires_grad for param in engine.module.parameters()] == flags
    barrier()
    assert names <= set(torch.load(ctx.folder / "model.bin", weights_only=True))


@case(ranks=(1, 2), strength=1, stage=(1, 3), when=("saving", "loading"))
def memory_that_runs_out_on_one_rank_fails_all_and_changes_nothing(
    ctx: Context, stage: int, when: str
) -> None:
    """Neither leaves the other rank waiting; the running job is as it was."""
    job = jobs.Job(stage=stage, dtype="bf16", grass={"active_layers": 1})
    folder = str(ctx.folder / "saved")
    with jobs.engine_of(job) as engine:
        train(engine, job, ctx, 0, 4)
        if when == "loading":
            engine.save_checkpoint(folder, tag="t")
    with jobs.engine_of(job) as engine, contextlib.ExitStack() as stack:
        train(engine, job, ctx, 0, 1)
        before = fingerprint(engine)
        if ctx.rank == ctx.world_size - 1:
            stack.enter_context(no_more_pages())
        with refused("cannot allocate", RuntimeError):
            engine.save_checkpoint(folder, tag="u") if when == "saving" else engine.load_checkpoint(
                folder, tag="t"
            )
        stack.close()
        assert fingerprint(engine) == before
        if when == "saving":
            engine.save_checkpoint(folder, tag="u")
        else:
            engine.load_checkpoint(folder, tag="t")


@case(ranks=(1, 2), strength=1, stage=(1, 3))
def weights_that_are_not_all_there_are_refused_before_any_is_copied(ctx: Context, stage: int) -> None:
    job, folder = jobs.Job(stage=stage), ctx.folder / "saved"
    with jobs.engine_of(job) as engine:
        engine.save_checkpoint(str(folder), tag="t")
        state = engine.module.state_dict

        def with_another(*args: Any, **kwargs: Any) -> dict:
            return {**state(*args, **kwargs), "another": torch.ones(2)}

        before = fingerprint(engine)
        engine.module.state_dict = with_another
        with refused(r"lacks 1 weights of this model.*load_module_strict=False"):
            engine.load_checkpoint(str(folder), tag="t")
        del engine.module.state_dict
        assert fingerprint(engine) == before


@case(ranks=(1, 2), strength=1, stage=(1, 3), states=(True, False))
def a_checkpoint_of_other_ranks_is_refused_on_all(ctx: Context, stage: int, states: bool) -> None:
    """States, and at stage 3 weights alone too, which DeepSpeed would look for file by file."""
    from ds_grass import manifest
    from ds_grass.durable_files import write_text

    folder = ctx.folder / "saved"
    with jobs.engine_of(jobs.Job(stage=stage)) as engine:
        engine.save_checkpoint(str(folder), tag="t")
        barrier()
        if ctx.rank == 0:
            found = dataclasses.replace(manifest.read(folder / "t"), world_size=3)
            write_text(folder / "t" / manifest.NAME, found.to_json())
        barrier()
        if stage == 1 and not states:
            assert engine.load_checkpoint(str(folder), tag="t", load_optimizer_states=False)[0] is not None
            return
        with refused("saved by 3 rank.*ds_to_universal"):
            engine.load_checkpoint(str(folder), tag="t", load_optimizer_states=states)


@case(ranks=(1, 2), strength=1, source=(1, 3), stage=(1, 3))
def a_universal_checkpoint_brings_what_is_frozen_too(ctx: Context, source: int, stage: int) -> None:
    """Frozen by the user or by `outer: never`, from either kind of stage; weights alone as well."""
    plain, folder = jobs.Job(stage=source, grass=None), ctx.folder / "saved"
    model = plain.build()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    with jobs.engine_of(plain, model=model, model_parameters=_trainable(model)) as engine:
        train(engine, plain, ctx, 0, 3)
        wanted = jobs.weights(engine)
        engine.save_checkpoint(str(folder))
    convert_together(ctx, folder / "global_step3")
    for how in ({}, {"load_module_only": True}, {"load_optimizer_states": False}):
        job = jobs.Job(stage=stage, grass={"outer": "never"}, extra=UNIVERSAL, model_options={"seed": 99})
        with jobs.engine_of(job) as engine:
            engine.load_checkpoint(str(folder), **how)
            jobs.assert_identical(jobs.weights(engine), wanted, f"weights {how}")
            steps = set(engine.optimizer.core.store.steps.values())
            assert steps == ({0} if how else {3}), steps
            train(engine, job, ctx, 3, 6)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


@case(ranks=(1,), stage=(2, 3))
def a_flipped_bit_in_the_model_file_of_a_universal_checkpoint_is_noticed(ctx: Context, stage: int) -> None:
    job, folder = jobs.Job(stage=stage), ctx.folder / "saved"
    with jobs.engine_of(job) as engine:
        train(engine, job, ctx, 0, 3)
        engine.save_checkpoint(str(folder), tag="t")
    convert_together(ctx, folder / "t")
    victim = next(Path(folder / "t_universal").glob("*model_states.pt"))
    for damage in ("flip", "truncate"):
        data = bytearray(victim.read_bytes())
        with jobs.engine_of(jobs.replace(job, extra=UNIVERSAL)) as engine:
            if damage == "flip":
                victim.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
            else:
                os.truncate(victim, len(data) // 2)
            before = all_states(engine)
            with refused("_model_states.pt is damaged"):
                engine.load_checkpoint(str(folder))
            jobs.assert_identical(all_states(engine)["masters"], before["masters"], "masters")
        victim.write_bytes(data)
