"""`engine.load_checkpoint`, made safe: everything is verified on all ranks before anything is unpickled or changed.

DeepSpeed loads weights, schedule and counters before optimizer states, and each rank by itself: a damaged file of one
rank leaves a job of which half is new. Here the ranks agree on the tag, share the work of summing up the manifest's
files, then each looks whether its states belong to this job, and only when all are content does DeepSpeed load.

Not covered: reading the states (`checkpoint.py`, `universal.py`) and putting them back (`host.py`).
"""

from __future__ import annotations

import glob
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from ds_grass import manifest
from ds_grass.telemetry.human import human_bytes
from ds_grass.zero import universal
from ds_grass.zero.saving import Place
from ds_grass.zero.together import rank, together, world_size

logger = logging.getLogger("ds_grass")


def guard_loading(engine: Any, module: ModuleType) -> None:
    """Replace `load_checkpoint` on this one engine. `module`: deepspeed.runtime.engine."""
    stock = module.DeepSpeedEngine.load_checkpoint
    signature = inspect.signature(stock)

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(engine, *args, **kwargs)
        call.apply_defaults()
        asked = call.arguments
        if not hasattr(engine.optimizer, "core"):  # DeepSpeed built no optimizer after all
            return stock(*call.args, **call.kwargs)
        if asked["load_module_only"]:
            asked["load_optimizer_states"] = (
                False  # else DeepSpeed loads nothing at stage 3, and says nothing
            )
        try:
            asked["tag"] = _examined_tag(
                engine, Path(asked["load_dir"]), asked["tag"], asked["load_optimizer_states"]
            )
            with _weights_of(module, asked["tag"]):
                result = stock(*call.args, **call.kwargs)
            if result[0] is not None and engine.load_universal_checkpoint():
                _restore_unmanaged(engine, Path(asked["load_dir"]) / asked["tag"])
            return result
        finally:
            engine.optimizer.freeze_again()  # DeepSpeed calls no epilogue when a load raises

    object.__setattr__(engine, "load_checkpoint", load_checkpoint)
    object.__setattr__(engine, "_get_all_ckpt_names", partial(_model_files, engine, module))


def _examined_tag(engine: Any, load_dir: Path, tag: str | None, wants_states: bool) -> str | None:
    """The tag to load, verified on all ranks; None when there is none, which DeepSpeed answers by itself."""
    tag, error = _attempt(lambda: str(tag) if tag is not None else _latest(engine, load_dir))
    tags = together(tag, error)
    if any(other != tags[0] for other in tags):
        raise ValueError(f"load_checkpoint: ranks would load different tags {tags}; all must load the same")
    if tag is None:
        return None
    if engine.load_universal_checkpoint():
        _, error = _attempt(lambda: _check_universal(engine, load_dir / tag, wants_states))
        together(None, error)
        return tag
    if rank() == 0:
        _, error = _attempt(Place(load_dir, tag).recover)
    together(None, error)
    _, error = _attempt(lambda: _verify(engine, load_dir / tag, wants_states))
    together(None, error)
    if wants_states:
        own_file = engine._get_zero_ckpt_name(str(load_dir), tag)
        _, error = _attempt(lambda: engine.optimizer.check_checkpoint(own_file))
        together(None, error)
    return tag


def _check_universal(engine: Any, folder: Path, wants_states: bool) -> None:
    if engine.mp_world_size > 1:
        raise ValueError(
            f"checkpoint {folder} is universal, which grass cannot load into {engine.mp_world_size} tensor-parallel "
            "ranks yet; set checkpoint.load_universal to false and load the checkpoint itself"
        )
    engine.optimizer.check_universal(folder, wants_states)


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What `work` returns, or the error of a checkpoint that cannot be used."""
    try:
        return work(), None
    except (ValueError, OSError) as error:
        return None, error if isinstance(error, ValueError) else ValueError(str(error))


def _latest(engine: Any, load_dir: Path) -> str | None:
    """The tag that `latest` names; None when there is no such file."""
    path = load_dir / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
    if not path.is_file():
        return None
    try:
        tag = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        tag = ""
    if not tag or not (Place(load_dir, tag).final.is_dir() or Place(load_dir, tag).replaced.is_dir()):
        raise ValueError(
            f"{path} names {tag!r}, which is no folder there; pass a tag{_offer(load_dir, without=tag)}"
        )
    return tag


def _verify(engine: Any, folder: Path, wants_states: bool) -> None:
    """This rank's share of the files is what was saved, for as many ranks and the same kind of stage."""
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} does not exist{_offer(folder.parent)}")
    if (folder / "zero").is_dir():
        raise ValueError(
            f"checkpoint {folder} is a universal one; set checkpoint.load_universal to true in ds_config to load it"
        )
    found = manifest.read(folder)
    if found is None:
        _without_manifest(folder, wants_states)
        return
    if wants_states:
        _check_shape_of_job(engine, folder, found)
    started = time.perf_counter()
    for name in sorted(found.files)[rank() :: world_size()]:
        manifest.verify_file(folder, name, found.files[name])
    if rank() == 0:
        logger.info("GRASS: checkpoint %s, %s, verified in %.2f s",
                    folder, human_bytes(found.nbytes), time.perf_counter() - started)  # fmt: skip


def _without_manifest(folder: Path, wants_states: bool) -> None:
    if not wants_states:
        if rank() == 0:
            logger.warning("grass: %s has no %s; its weights are loaded unverified", folder, manifest.NAME)
        return
    raise ValueError(
        f"checkpoint {folder} was not saved by a grass job, or not to its end: it has no {manifest.NAME}; one of "
        f"DeepSpeed's AdamW is taken over, states and all, by converting it ({universal.command(folder)}) and setting "
        "checkpoint.load_universal to true; its weights alone load with load_module_only=True"
        f"{_offer(folder.parent, without=folder.name)}"
    )


def _check_shape_of_job(engine: Any, folder: Path, found: manifest.Manifest) -> None:
    stage, ranks = engine.zero_optimization_stage(), world_size()
    if found.world_size == ranks and (found.zero_stage == 3) == (stage == 3):
        return
    raise ValueError(
        f"checkpoint {folder} was saved by {found.world_size} rank(s) at ZeRO stage {found.zero_stage} and this job "
        f"has {ranks} at stage {stage}; use as many ranks and that stage, or convert it "
        f"({universal.command(folder)}) and set checkpoint.load_universal to true"
    )


def _offer(load_dir: Path, without: str = "") -> str:
    others = [name for name in manifest.complete_ones(load_dir) if name != without]
    return f"; complete ones there: {', '.join(others[:5])}" if others else ""


@contextmanager
def _weights_of(module: ModuleType, tag: str | None) -> Iterator[None]:
    """At stage 3 DeepSpeed takes the weights, where they are loaded alone, from `latest` and not from the tag asked."""
    stock = module.get_fp32_state_dict_from_zero_checkpoint
    module.get_fp32_state_dict_from_zero_checkpoint = partial(stock, tag=tag)
    try:
        yield
    finally:
        module.get_fp32_state_dict_from_zero_checkpoint = stock


def _model_files(engine: Any, module: ModuleType, load_dir: str, tag: str) -> list[str]:
    """The files of weights; a universal checkpoint of another stage names them in that stage's way."""
    found = module.DeepSpeedEngine._get_all_ckpt_names(engine, load_dir, tag)
    if found or not engine.load_universal_checkpoint():
        return found
    patterns = ("mp_rank_*_model_states.pt", "zero_pp_rank_0_mp_rank_*_model_states.pt")
    return sorted(path for name in patterns for path in glob.glob(os.path.join(load_dir, tag, name)))


def _restore_unmanaged(engine: Any, folder: Path) -> None:
    """Buffers and frozen parameters: DeepSpeed's universal load leaves them as the script made them."""
    paths = engine._get_all_ckpt_names(str(folder.parent), folder.name)
    saved = torch.load(paths[0], map_location="cpu", weights_only=False, mmap=True)["module"]
    for name, buffer in engine.module.named_buffers():
        if name in saved and saved[name].shape == buffer.shape:
            buffer.copy_(saved[name])
    managed = {id(param) for unit in engine.optimizer.units for param in unit.params}
    kept = [
        name
        for name, param in engine.module.named_parameters()
        if id(param) not in managed and not _copied(param, saved.get(name))
    ]
    if kept and rank() == 0:
        logger.warning("grass: %d frozen parameters are not in %s and stay as the script loaded them, %s first",
                       len(kept), folder, kept[0])  # fmt: skip


def _copied(param: torch.nn.Parameter, saved: torch.Tensor | None) -> bool:
    shape = getattr(param, "ds_shape", param.shape)
    if saved is None or saved.shape != shape:
        return False
    with GatheredParameters([param], modifier_rank=0, enabled=hasattr(param, "ds_id")), torch.no_grad():
        if param.numel():
            param.copy_(saved)
    return True
