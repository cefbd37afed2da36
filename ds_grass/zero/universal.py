"""DeepSpeed's universal checkpoints: one folder a parameter, for any number of ranks and any ZeRO stage.

    zero/optimizer_state.pt         what belongs to no parameter; in a checkpoint of ours with the key "grass"
    zero/<name>/fp32.pt             master weight; exp_avg.pt, exp_avg_sq.pt; step.pt (stages 1 and 2)

`python -m deepspeed.checkpoint.ds_to_universal` makes them of any checkpoint, so they are also how a job of plain
DeepSpeed AdamW becomes a GRASS job: masters and moments are taken over exactly, every block counts as drawn, and
sampling begins anew.

Contract: the checks change nothing and raise `ValueError` in one line; after them, `shard` reads only what this rank
owns. The files have no manifest of ours; they are archives whose entries carry CRCs, which `check_files` verifies, each
file on one rank, before any is unpickled. Not covered: tensor-parallel checkpoints.
"""

from __future__ import annotations

import functools
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_grass.host_memory import host_zeros
from ds_grass.units import Unit
from ds_grass.zero.shards import ShardLayout

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    KeyError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def command(folder: Path | str) -> str:
    """The command line that converts the checkpoint in `folder`."""
    return (
        f"python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {folder} "
        f"--output_folder {folder}_universal"
    )


class UniversalFolder:
    """One universal checkpoint, read tensor by tensor."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.zero = self.folder / "zero"

    @functools.cached_property
    def shared(self) -> Mapping[str, Any]:
        """What belongs to no parameter; its tensors stay on the disk until they are read."""
        return self._load(self.zero / "optimizer_state.pt")

    def has(self, name: str, key: str) -> bool:
        return self._path(name, key).is_file()

    def tensor(self, name: str, key: str) -> Tensor:
        """State `key` of parameter `name`, flat; on the disk until it is read."""
        found = self._load(self._path(name, key))
        return (found["param"] if isinstance(found, Mapping) else found).detach().reshape(-1)

    def steps(self, units: Sequence[Unit]) -> dict[int, int]:
        """Adam steps, by key, of the units that plain DeepSpeed trained; those that it never stepped are not there.

        A parameter without moments in a unit that has some was frozen then; its moments are zero.
        """
        steps = {
            unit.key: max((self._step(name) for name in unit.names if self.has(name, MOMENTS[0])), default=0)
            for unit in units
        }
        return {key: step for key, step in steps.items() if step > 0}

    def _step(self, name: str) -> int:
        """Of its own, or at stage 3 of the first sub-group, since that has no files of steps."""
        if self.has(name, "step"):
            return int(self._load(self._path(name, "step")))
        states = self.shared.get("optimizer_state_dict", {}).get("state", {})
        return int(states[0]["step"]) if states else 0

    def weight(self, name: str) -> Tensor | None:
        """A parameter's saved value, flat: its master, or where it was frozen what the files of the model hold."""
        if self.has(name, MASTER):
            return self.tensor(name, MASTER)
        saved = self._models[0]["module"].get(name)
        pieces = [(model.get("frozen_param_fragments") or {}).get(name) for model in self._models]
        if all(piece is not None for piece in pieces):  # stage 3: one part a rank, the last one padded
            shape = self._models[0]["frozen_param_shapes"][name]
            return torch.cat([piece.reshape(-1) for piece in pieces])[: shape.numel()]
        return None if saved is None else saved.detach().reshape(-1)

    def buffer(self, name: str) -> Tensor | None:
        return self._models[0]["module"].get(name)

    @functools.cached_property
    def _models(self) -> list[Mapping[str, Any]]:
        return [self._load(path) for path in self.model_files()]

    def model_files(self) -> list[Path]:
        """Files of weights that were copied along: one at stages 1 and 2, at stage 3 one a rank, in order."""
        whole = sorted(self.folder.glob("mp_rank_*_model_states.pt"))
        parts = self.folder.glob("zero_pp_rank_*_mp_rank_00_model_states.pt")
        return whole[:1] or sorted(parts, key=lambda path: int(path.name.split("_")[3]))

    def check_files(self, units: Sequence[Unit], share: tuple[int, int]) -> None:
        """No file that the units need is damaged; nothing is unpickled. `share`: (index, of how many)."""
        if not self.zero.is_dir():
            raise ValueError(
                f"checkpoint {self.folder} is not a universal one, but checkpoint.load_universal is true; set that "
                f"to false, or convert it: {command(self.folder)}"
            )
        if not self.model_files():
            raise ValueError(f"checkpoint {self.folder} has no *_model_states.pt; convert it again")
        names = (name for unit in units for name in unit.names)
        states = [self._path(name, key) for name in names for key in (MASTER, *MOMENTS, "step")]
        paths = [self.zero / "optimizer_state.pt", *self.model_files(), *filter(Path.exists, states)]
        index, count = share
        for path in paths[index::count]:
            self._check_archive(path)

    def check_sizes(self, units: Sequence[Unit]) -> None:
        """What the units need is there, and of the right size."""
        for unit in units:
            for name, size in zip(unit.names, unit.sizes, strict=True):
                weight = self.weight(name)
                sizes = {} if weight is None else {MASTER: weight.numel()}
                sizes |= {key: self.tensor(name, key).numel() for key in MOMENTS if self.has(name, key)}
                lacking = [key for key in (MASTER, *MOMENTS) if key not in sizes]
                if MASTER in lacking or len(lacking) == 1:
                    raise ValueError(
                        f"checkpoint {self.folder} has no {lacking[0]} of parameter {name}: it is of another model, "
                        "or not whole; use the model that saved it, or convert it again"
                    )
                wrong = [key for key, found in sizes.items() if found != size]
                if wrong:
                    raise ValueError(
                        f"checkpoint {self.folder}: {wrong[0]} of parameter {name} has {sizes[wrong[0]]} elements but "
                        f"the model's has {size}; use the model that saved it"
                    )

    def shard(self, unit: Unit, layout: ShardLayout, key: str) -> Tensor:
        """This rank's shard of the unit's state `key`: (layout.shard_numel,) fp32 on the host, padding zero."""
        shard = host_zeros(layout.shard_numel, torch.float32)
        for index, name in enumerate(unit.names):
            start, stop = layout.owned(index)
            if start < stop and (key == MASTER or self.has(name, key)):
                first = layout.source(index)
                saved = self.weight(name) if key == MASTER else self.tensor(name, key)
                shard[start:stop].copy_(saved[first : first + stop - start])
        return shard

    def _check_archive(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except _UNREADABLE as error:
            raise self._damaged(path, error) from error
        if damaged is not None:
            raise self._damaged(path, f"the checksum of {damaged} differs")

    def _path(self, name: str, key: str) -> Path:
        return self.zero / name / f"{key}.pt"

    def _load(self, path: Path) -> Any:
        try:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        except FileNotFoundError:
            raise ValueError(
                f"checkpoint {self.folder}: {path.relative_to(self.folder)} is missing; convert it again"
            ) from None
        except _UNREADABLE as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, why: object) -> ValueError:
        return ValueError(
            f"checkpoint {self.folder}: {path.relative_to(self.folder)} is damaged ({str(why).splitlines()[0]}); "
            "convert it again"
        )
