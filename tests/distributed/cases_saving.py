"""Saving is all or nothing on all ranks, and what is not what was saved is never loaded."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.harness import Context
from tests.distributed.registry import case

MANIFEST = "grass_manifest.json"


def fingerprint(engine: Any) -> tuple:
    """Everything a load could change, in a form that `==` compares."""
    weights, masters = (_digest(tensors) for tensors in (jobs.weights(engine), jobs.masters(engine)))
    grass = jobs.controller(engine)
    flags = tuple(param.requires_grad for param in engine.module.parameters())
    steps = (engine.global_steps, engine.skipped_steps, engine.global_samples)
    rates = tuple(group["lr"] for group in engine.optimizer.param_groups)
    schedule = repr(engine.lr_scheduler.state_dict()) if engine.lr_scheduler is not None else ""
    return (
        weights,
        masters,
        schedule,
        float(engine.optimizer.loss_scale),
        grass.phase,
        tuple(grass.active),
        tuple(grass.counters.items()),
        flags,
        steps,
        rates,
    )


def _digest(tensors: dict) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


@contextlib.contextmanager
def small_files_only(nbytes: int) -> Iterator[None]:
    """No file of this process may grow beyond: to the writer this looks like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@case(ranks=(1, 2), strength=1, stage=(1, 2, 3), again=(True, False))
def a_full_disk_on_one_rank_fails_the_save_on_all_and_spoils_nothing(
    ctx: Context, stage: int, again: bool
) -> str:
    """The older checkpoint of that name, or none, is there as before; training goes on with the same bits."""
    folder, job = ctx.folder / "saved", jobs.Job(stage=stage, model_options={"hidden": 64})
    kept = []
    for fails in (False, True):
        with jobs.engine_of(job) as engine:
            for number in range(4):
                jobs.train_step(engine, job, ctx, number)
                if fails and number == 1 and again:
                    engine.save_checkpoint(str(folder), tag="same")
            if fails:
                with contextlib.ExitStack() as limits:
                    if ctx.rank == ctx.world_size - 1:
                        limits.enter_context(small_files_only(100_000))
                    with pytest.raises(RuntimeError, match="was not saved") as error:
                        engine.save_checkpoint(str(folder), tag="same")
                barrier()
                assert sorted(p.name for p in folder.glob("*same*")) == (["same"] if again else [])
                assert (folder / "latest").exists() == again
            kept.append((jobs.train_step(engine, job, ctx, 4), jobs.masters(engine)))
            if fails:
                engine.save_checkpoint(str(folder), tag="same")
                path, _ = engine.load_checkpoint(str(folder))
                assert path is not None
                jobs.assert_identical(jobs.masters(engine), kept[1][1], "masters")
    assert kept[0][0] == kept[1][0]
    jobs.assert_identical(kept[0][1], kept[1][1], "masters")
    assert "\n" not in str(error.value)
    assert f"rank {ctx.world_size - 1}" in str(error.value) or ctx.world_size == 1
    return str(error.value)


class _Stubborn:
    def __getstate__(self) -> dict:
        raise KeyError("the script's own error")


@case(ranks=(1, 2), strength=1, stage=(1, 3))
def what_cannot_be_pickled_on_rank_0_fails_the_save_on_all(ctx: Context, stage: int) -> None:
    """Only rank 0 writes the client state; the others must not wait for it."""
    job = jobs.Job(stage=stage)
    with jobs.engine_of(job) as engine:
        for note in (lambda: None, _Stubborn()):
            with pytest.raises(RuntimeError, match="was not saved"):
                engine.save_checkpoint(str(ctx.folder / "saved"), client_state={"note": note})
        engine.save_checkpoint(str(ctx.folder / "saved"), client_state={"note": 1})


@case(ranks=(2,), stage=(2,))
def ranks_that_name_different_tags_are_told_before_anything_is_written(ctx: Context, stage: int) -> None:
    with jobs.engine_of(jobs.Job(stage=stage)) as engine:
        with pytest.raises(ValueError, match=r"rank\(s\) \[1\] use another tag"):
            engine.save_checkpoint(str(ctx.folder / "saved"), tag=f"rank{ctx.rank}")
        engine.save_checkpoint(str(ctx.folder / "saved"), tag="one")
        with pytest.raises(ValueError, match="different tags"):
            engine.load_checkpoint(str(ctx.folder / "saved"), tag="one" if ctx.rank else "other")


@case(ranks=(2,), stage=(2,))
def a_replacement_cut_in_two_is_mended_by_the_next_load(ctx: Context, stage: int) -> None:
    """Killed between the renames, the older checkpoint has another name for a moment; it gets its own back."""
    folder, job = ctx.folder / "saved", jobs.Job(stage=stage)
    with jobs.engine_of(job) as engine:
        for number in range(3):
            jobs.train_step(engine, job, ctx, number)
        engine.save_checkpoint(str(folder), tag="same")
        saved = fingerprint(engine)
        barrier()
        if ctx.rank == 0:
            shutil.copytree(folder / "same", folder / ".same.saving")
            (folder / "same").rename(folder / ".same.replaced")
        jobs.train_step(engine, job, ctx, 3)
        engine.load_checkpoint(str(folder))
        assert fingerprint(engine) == saved
        engine.save_checkpoint(str(folder), tag="same")
        barrier()
        assert sorted(p.name for p in folder.glob("*same*")) == ["same"]


@case(ranks=(1, 2), strength=1, stage=(1, 3))
def weights_alone_come_from_the_tag_that_was_asked(ctx: Context, stage: int) -> None:
    """At stage 3 DeepSpeed by itself takes them from `latest`."""
    folder, job = ctx.folder / "saved", jobs.Job(stage=stage, grass={"probe_steps": 0})
    with jobs.engine_of(job) as engine:
        for number in range(2):
            jobs.train_step(engine, job, ctx, number)
            engine.save_checkpoint(str(folder), tag=f"after{number + 1}")
            if number == 0:
                wanted = jobs.weights(engine)
        path, _ = engine.load_checkpoint(str(folder), tag="after1", load_module_only=True)
        assert path is not None
        jobs.assert_identical(jobs.weights(engine), wanted, "weights")


CORRUPTIONS_EACH = 34
"""Times 6 cells: 204 in all."""


@case(ranks=(1, 2), strength=1, stage=(1, 2, 3), timeout_seconds=200)
def a_checkpoint_that_is_not_what_was_saved_is_never_loaded(ctx: Context, stage: int) -> dict:
    """Truncated, flipped, swapped, removed: each is one line that names the file, and changes nothing."""
    folder, job = ctx.folder / "saved", jobs.Job(stage=stage)
    dice, kinds = random.Random(100 * stage + ctx.world_size), {}
    with jobs.engine_of(job) as engine:
        for number in range(6):
            jobs.train_step(engine, job, ctx, number)
            if number in (2, 5):
                engine.save_checkpoint(str(folder), tag=f"step{number}")
        saved = fingerprint(engine)
        jobs.train_step(engine, job, ctx, 6)
        running = fingerprint(engine)
        files = sorted(p.relative_to(folder) for p in [*(folder / "step5").iterdir(), folder / "latest"])
        barrier()  # all have seen all files before the first is removed, so that their dice fall alike
        for _ in range(CORRUPTIONS_EACH):
            victim, how = dice.choice(files), random.Random(dice.random())
            kind = dice.choice([kind for kind in DAMAGE if (kind, victim.name) != ("swap", "latest")])
            kinds[kind] = kinds.get(kind, 0) + 1
            backup = folder / "backup"
            if ctx.rank == 0:
                shutil.copyfile(folder / victim, backup)
                DAMAGE[kind](folder / victim, how)
            barrier()
            _assert_refused_or_as_asked(engine, folder, victim, running)
            barrier()
            if ctx.rank == 0:
                shutil.move(backup, folder / victim)
            barrier()
        engine.load_checkpoint(str(folder))
        assert fingerprint(engine) == saved
    return kinds


def _assert_refused_or_as_asked(engine: Any, folder: Path, victim: Path, running: tuple) -> None:
    try:
        path, _ = engine.load_checkpoint(str(folder))
    except ValueError as error:
        message = str(error)
    else:
        assert path is None, (
            f"{victim} was damaged and loaded"
        )  # no `latest`: DeepSpeed's answer, with its warning
        assert victim.name == "latest"
        message = ""
    sys.stdout.write(f"{victim}: {message}\n")
    assert "\n" not in message
    assert victim.parts[0] in message or not message, (victim, message)
    assert fingerprint(engine) == running


def _flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randrange(path.stat().st_size))


def _swap(path: Path, dice: random.Random) -> None:
    """Another file of the same kind takes its place: of another rank, or of another step."""
    others = [
        p for p in path.parent.parent.rglob("*") if p.is_file() and p != path and p.suffix == path.suffix
    ]
    shutil.copyfile(dice.choice([p for p in others if p.read_bytes() != path.read_bytes()]), path)


def _remove(path: Path, dice: random.Random) -> None:
    path.unlink()


DAMAGE = {"flip": _flip, "truncate": _truncate, "swap": _swap, "remove": _remove}
