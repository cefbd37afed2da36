"""DeepSpeed's universal checkpoints: one folder a parameter, for any number of ranks and any ZeRO stage.

    zero/optimizer_state.pt         what belongs to no parameter; in a checkpoint of ours with the key "grass"
    zero/<name>/fp32.pt             master weight; exp_avg.pt, exp_avg_sq.pt; step.pt (stages 1 and 2)

`python -m deepspeed.checkpoint.ds_to_universal` makes them of any checkpoint, so they are also how a job of plain
DeepSpeed AdamW becomes a GRASS job: masters and moments are taken over exactly, every block counts as drawn, and
sampling begins anew.

Contract: `check` changes nothing and raises `ValueError` in one line; after it, `shard` reads only what this rank owns.
The files have no manifest of ours; they are archives whose entries carry CRCs, which `check` verifies, each file on
one rank. Not covered: tensor-parallel checkpoints.
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
        """Adam steps, by key, of the units that plain DeepSpeed trained; those that it never stepped are not there."""
        stepped = [unit for unit in units if all(self.has(name, MOMENTS[0]) for name in unit.names)]
        steps = {unit.key: max(self._step(name) for name in unit.names) for unit in stepped}
        return {key: step for key, step in steps.items() if step > 0}

    def _step(self, name: str) -> int:
        """Of its own, or at stage 3 of the first sub-group, since that has no files of steps."""
        if self.has(name, "step"):
            return int(self._load(self._path(name, "step")))
        states = self.shared.get("optimizer_state_dict", {}).get("state", {})
        return int(states[0]["step"]) if states else 0

    def check(self, units: Sequence[Unit], share: tuple[int, int]) -> None:
        """Everything the units need is there, of the right size and undamaged. `share`: (index, of how many)."""
        if not self.zero.is_dir():
            raise ValueError(
                f"checkpoint {self.folder} is not a universal one, but checkpoint.load_universal is true; set that "
                f"to false, or convert it: {command(self.folder)}"
            )
        paths = [self.zero / "optimizer_state.pt"]
        for unit in units:
            for name, size in zip(unit.names, unit.sizes, strict=True):
                self._check_sizes(name, size)
                paths += [self._path(name, key) for key in (MASTER, *MOMENTS, "step") if self.has(name, key)]
        index, count = share
        for path in paths[index::count]:
            self._check_archive(path)

    def shard(self, unit: Unit, layout: ShardLayout, key: str) -> Tensor:
        """This rank's shard of the unit's state `key`: (layout.shard_numel,) fp32 on the host, padding zero."""
        shard = host_zeros(layout.shard_numel, torch.float32)
        for index, name in enumerate(unit.names):
            start, stop = layout.owned(index)
            if start < stop:
                first = layout.source(index)
                shard[start:stop].copy_(self.tensor(name, key)[first : first + stop - start])
        return shard

    def _check_sizes(self, name: str, size: int) -> None:
        for key in (MASTER, *MOMENTS):
            if not self.has(name, key):
                if key == MASTER or self.has(name, MOMENTS[0]) or self.has(name, MOMENTS[1]):
                    raise ValueError(
                        f"checkpoint {self.folder} has no {key} of parameter {name}: it is of another model, or not "
                        "whole; use the model that saved it, or convert it again"
                    )
                continue
            found = self.tensor(name, key).numel()
            if found < size or (key == MASTER and found > size):
                raise ValueError(
                    f"checkpoint {self.folder}: {key} of parameter {name} has {found} elements but the model's has "
                    f"{size}; use the model that saved it"
                )

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
