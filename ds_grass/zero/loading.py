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
from collections.abc import Callable, Iterator, Mapping
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
from ds_grass.zero.checkpoint import load_mapped
from ds_grass.zero.saving import Place
from ds_grass.zero.together import attempt, rank, together, world_size
from ds_grass.zero.universal import UniversalFolder

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
        wants_states = asked["load_optimizer_states"] and not asked["load_module_only"]
        try:
            asked["tag"] = _examined_tag(engine, Path(asked["load_dir"]), asked["tag"], wants_states, asked)
            with _as_asked(engine, module, asked, wants_states):
                result = stock(*call.args, **call.kwargs)
            if result[0] is not None:
                _begin_step_anew(engine)
                if engine.load_universal_checkpoint():
                    _restore_unmanaged(engine, UniversalFolder(Path(asked["load_dir"]) / asked["tag"]))
            return result
        finally:
            engine.optimizer.release_reserved()
            engine.optimizer.freeze_again()  # DeepSpeed calls no epilogue when a load raises

    object.__setattr__(engine, "load_checkpoint", load_checkpoint)
    object.__setattr__(engine, "_get_all_ckpt_names", partial(_model_files, engine, module))


def _examined_tag(
    engine: Any, load_dir: Path, tag: str | None, wants_states: bool, asked: Mapping[str, Any]
) -> str | None:
    """The tag to load, verified on all ranks; None when there is none, which DeepSpeed answers by itself."""
    tag, error = attempt(lambda: _readable(engine, load_dir, tag))
    tags = together(tag, _as_users(error))
    if any(other != tags[0] for other in tags):
        raise ValueError(f"load_checkpoint: ranks would load different tags {tags}; all must load the same")
    if tag is None:
        return None
    folder = load_dir / tag
    checks: list[Callable[[], None]]
    if engine.load_universal_checkpoint():
        found = UniversalFolder(folder)
        checks = [
            lambda: _check_universal(engine, found),
            lambda: engine.optimizer.check_universal(folder, wants_states),
        ]
    else:
        checks = [lambda: _verify(engine, folder, wants_states)]
        if wants_states:
            own_file = engine._get_zero_ckpt_name(str(load_dir), tag)
            checks.append(lambda: engine.optimizer.check_checkpoint(own_file))
        if asked["load_module_strict"] and asked["custom_load_fn"] is None:
            checks.append(lambda: _check_weights(engine, load_dir, tag))
    for check in checks:  # each only after the one before it has passed on all ranks
        together(None, _as_users(attempt(check)[1]))
    if wants_states:
        together(None, attempt(engine.optimizer.reserve)[1])
    return tag


def _as_users(error: Exception | None) -> Exception | None:
    """A checkpoint that cannot be used is a ValueError, whatever was found out about it."""
    if error is None or isinstance(error, ValueError):
        return error
    return ValueError(f"the checkpoint cannot be read: {str(error) or type(error).__name__}")


def _readable(engine: Any, load_dir: Path, tag: str | None) -> str | None:
    """The folder below `load_dir` to read; loading never renames, for another job may be saving there."""
    tag = str(tag) if tag is not None else _latest(engine, load_dir)
    return None if tag is None else Place(load_dir, tag).readable_tag


def _check_universal(engine: Any, found: UniversalFolder) -> None:
    if engine.mp_world_size > 1:
        raise ValueError(
            f"checkpoint {found.folder} is universal, which grass cannot load into {engine.mp_world_size} "
            "tensor-parallel ranks yet; set checkpoint.load_universal to false and load the checkpoint itself"
        )
    found.check_files(engine.optimizer.units, (rank(), world_size()))


def _check_weights(engine: Any, load_dir: Path, tag: str) -> None:
    """A strict load will find every weight; torch would say so only after it had copied some."""
    paths = engine._get_all_ckpt_names(str(load_dir), tag)
    if not paths:
        return
    saved = load_mapped(paths[0])["module"]
    own = engine.module.state_dict()
    lacking = [name for name in own if name not in saved]
    unknown = [name for name in saved if name not in own]
    if lacking or unknown:
        raise ValueError(
            f"checkpoint {load_dir / tag} lacks {len(lacking)} weights of this model and has {len(unknown)} others, "
            f"{(lacking or unknown)[0]} first; use the model that saved it, or pass load_module_strict=False"
        )
    if engine.zero_optimization_stage() < 3:
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and value.shape != saved[name].shape:
                raise ValueError(
                    f"checkpoint {load_dir / tag} is of another model: {name} has shape {tuple(saved[name].shape)} "
                    f"there and {tuple(value.shape)} here; use the model that saved it"
                )


def _latest(engine: Any, load_dir: Path) -> str | None:
    """The tag that `latest` names; None when there is no such file."""
    path = load_dir / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
    if not path.is_file():
        return None
    try:
        tag = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        tag = ""
    if not tag or not (load_dir / Place(load_dir, tag).readable_tag).is_dir():
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
        _without_manifest(engine, folder, wants_states)
        return
    _check_shape_of_job(engine, folder, found, wants_states)
    started = time.perf_counter()
    for name in sorted(found.files)[rank() :: world_size()]:
        manifest.verify_file(folder, name, found.files[name])
    if rank() == 0:
        logger.info("GRASS: checkpoint %s, %s, verified in %.2f s",
                    folder, human_bytes(found.nbytes), time.perf_counter() - started)  # fmt: skip


def _without_manifest(engine: Any, folder: Path, wants_states: bool) -> None:
    if wants_states:
        raise ValueError(
            f"checkpoint {folder} was not saved by a grass job, or not to its end: it has no {manifest.NAME}; one of "
            f"DeepSpeed's AdamW is taken over, states and all, by converting it ({universal.command(folder)}) and "
            "setting checkpoint.load_universal to true; its weights alone load with load_module_only=True"
            f"{_offer(folder.parent, without=folder.name)}"
        )
    if not engine._get_all_ckpt_names(str(folder.parent), folder.name):
        raise ValueError(f"checkpoint {folder} has no weights for {world_size()} rank(s) at this ZeRO stage")
    if rank() == 0:
        logger.warning("grass: %s has no %s; its weights are loaded unverified", folder, manifest.NAME)


def _check_shape_of_job(engine: Any, folder: Path, found: manifest.Manifest, wants_states: bool) -> None:
    """As many ranks, the same kind of stage, the same precision; weights alone of stages 1 and 2 go anywhere."""
    stage, ranks = engine.zero_optimization_stage(), world_size()
    way_out = (
        f"or convert it ({universal.command(folder)}) and set checkpoint.load_universal to true in ds_config until "
        "the job has saved again"
    )
    both_whole = max(stage, found.zero_stage) < 3
    if (found.world_size != ranks or (found.zero_stage == 3) != (stage == 3)) and (
        wants_states or not both_whole
    ):
        raise ValueError(
            f"checkpoint {folder} was saved by {found.world_size} rank(s) at ZeRO stage {found.zero_stage} and this "
            f"job has {ranks} at stage {stage}; use as many ranks and that stage, {way_out}"
        )
    own = os.path.basename(engine._get_zero_ckpt_name(str(folder.parent), folder.name))
    if wants_states and own not in found.files:
        raise ValueError(
            f"checkpoint {folder} has no {own}: it was saved in another precision (bf16.enabled); use the precision "
            f"that saved it, {way_out}"
        )


def _offer(load_dir: Path, without: str = "") -> str:
    others = [name for name in manifest.complete_ones(load_dir) if name != without]
    return f"; complete ones there: {', '.join(others[:5])}" if others else ""


@contextmanager
def _as_asked(engine: Any, module: ModuleType, asked: dict[str, Any], wants_states: bool) -> Iterator[None]:
    """While DeepSpeed loads: three things that it does not do by itself.

    At stage 3 it takes weights, where they are loaded alone, from `latest` and not from the tag asked. Asked for a
    universal checkpoint's weights alone it looks for files that those do not have. And it reads whole files at once.
    """
    stock_weights, stock_engine = module.get_fp32_state_dict_from_zero_checkpoint, engine.checkpoint_engine
    module.get_fp32_state_dict_from_zero_checkpoint = partial(stock_weights, tag=asked["tag"])
    engine.checkpoint_engine = _MappingEngine(stock_engine)
    if engine.load_universal_checkpoint():
        asked["load_optimizer_states"] = True
        engine.optimizer.loads_states = wants_states
    elif asked["load_module_only"]:
        asked["load_optimizer_states"] = False  # else nothing is loaded at stage 3, and nothing said
    try:
        yield
    finally:
        module.get_fp32_state_dict_from_zero_checkpoint = stock_weights
        engine.checkpoint_engine = stock_engine
        engine.optimizer.loads_states = True


class _MappingEngine:
    """DeepSpeed's checkpoint engine, but `load` maps the file: pages come when they are copied from, and go again."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_mapped(path)


def _begin_step_anew(engine: Any) -> None:
    """Gradients of an unfinished step are gone, so its micro-batches must not count any more."""
    engine.micro_steps -= engine.micro_steps % engine.gradient_accumulation_steps()


def _model_files(engine: Any, module: ModuleType, load_dir: str, tag: str) -> list[str]:
    """The files of weights; a universal checkpoint of another stage names them in that stage's way."""
    found = module.DeepSpeedEngine._get_all_ckpt_names(engine, glob.escape(load_dir), glob.escape(tag))
    if found or not engine.load_universal_checkpoint():
        return found
    patterns = ("mp_rank_*_model_states.pt", "zero_pp_rank_0_mp_rank_*_model_states.pt")
    folder = glob.escape(os.path.join(load_dir, tag))
    return sorted(path for name in patterns for path in glob.glob(os.path.join(folder, name)))


def _restore_unmanaged(engine: Any, found: UniversalFolder) -> None:
    """Buffers and frozen parameters: DeepSpeed's universal load leaves them as the script made them."""
    for name, buffer in engine.module.named_buffers():
        saved = found.buffer(name)
        if saved is not None and saved.shape == buffer.shape:
            buffer.copy_(saved)
    managed = {id(param) for unit in engine.optimizer.units for param in unit.params}
    kept = [
        name
        for name, param in engine.module.named_parameters()
        if id(param) not in managed and not _copied(param, found.weight(name))
    ]
    if kept and rank() == 0:
        logger.warning("grass: %d frozen parameters are not in %s and stay as the script loaded them, %s first",
                       len(kept), found.folder, kept[0])  # fmt: skip


def _copied(param: torch.nn.Parameter, saved: torch.Tensor | None) -> bool:
    """Whether `saved`, flat, is of that size and now is the parameter's value."""
    shape = getattr(param, "ds_shape", param.shape)
    if saved is None or saved.numel() != shape.numel():
        return False
    with GatheredParameters([param], modifier_rank=0, enabled=hasattr(param, "ds_id")), torch.no_grad():
        if param.numel():
            param.copy_(saved.view(shape))
    return True
