"""`engine.save_checkpoint`, made atomic: a checkpoint is complete under its name, or it is not there.

DeepSpeed writes into the folder of the tag and names it in `latest` before its ranks have met. Here it writes into a
hidden folder beside it. Each rank syncs and sums up its own files; ranks meet; rank 0 writes the manifest, gives the
folder its name (an older checkpoint of that name goes only then) and replaces `latest` by a rename. A rank that fails,
on a full disk say, fails the save on all ranks with its reason, and what was there before is untouched.

    .<tag>.saving     being written; a crash leaves it, the next save under this tag removes it
    .<tag>.replaced   the older checkpoint of the same name, from before the new one's until `latest` is written

Not covered: asynchronous checkpoint engines (refused in `conflicts`) and storage local to a node (refused as well).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch

import ds_grass
from ds_grass import manifest
from ds_grass.durable_files import ChecksumWriter, FileRecord, sync_folder, write_text
from ds_grass.telemetry.human import human_bytes
from ds_grass.zero.together import attempt, rank, together

logger = logging.getLogger("ds_grass")

UNIVERSAL_INFO = "universal_checkpoint_info"
"""What `ds_to_universal` asks of stage 1 and 2 checkpoints; empty says: no tensor parallelism to describe."""


class RecordingEngine:
    """DeepSpeed's checkpoint engine, but `save` writes durably, keeps records, and never raises: see `failure`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.records: dict[Path, FileRecord] = {}
        self.checksum_seconds = 0.0
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: Mapping, path: str) -> None:
        """Write one file; the first failure is kept, and later files are not written."""
        self.guard(lambda: self._write(state_dict, Path(path)))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.guard(lambda: self._inner.makedirs(path, exist_ok=exist_ok))

    def guard(self, effect: Callable[[], Any]) -> Any:
        """Run `effect` unless something failed before; keep what it raises."""
        if self.failure is not None:
            return None
        value, self.failure = attempt(effect)
        return value

    def _write(self, state_dict: Mapping, path: Path) -> None:
        writer, as_archive = ChecksumWriter(path), getattr(self._inner, "zipfile_serialization", True)
        try:
            torch.save(state_dict, writer, _use_new_zipfile_serialization=as_archive)
        finally:
            self.records[path] = writer.close()
            self.checksum_seconds += writer.checksum_seconds


def guard_saving(engine: Any, engine_class: type) -> None:
    """Replace `save_checkpoint` on this one engine."""
    stock = engine_class.save_checkpoint

    def save_checkpoint(save_dir: str, tag: str | None = None, client_state: Mapping | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:  # fmt: skip
        if not hasattr(engine.optimizer, "core"):  # DeepSpeed built no optimizer after all
            return stock(engine, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        tag = str(tag) if tag is not None else f"global_step{engine.global_steps}"
        started = time.perf_counter()
        place = Place(Path(save_dir), tag)
        _warn_within_step(engine)
        _meet_to_begin(place)
        client_state = {UNIVERSAL_INFO: {}, **(client_state or {})}
        try:
            with _recorded(engine) as recording:
                stock(engine, save_dir, place.staging_tag, client_state, False, exclude_frozen_parameters)
        finally:
            engine.optimizer.freeze_again()  # DeepSpeed calls no epilogue when a save raises
        _meet_to_finish(place, recording, engine.zero_optimization_stage(), save_latest)
        _tell(engine, place, recording, time.perf_counter() - started)
        return True

    object.__setattr__(engine, "save_checkpoint", save_checkpoint)


class Place:
    """The folders of one tag. A tag may name a folder below another, "a/b"."""

    def __init__(self, save_dir: Path, tag: str) -> None:
        parts = Path(tag).parts
        if not parts or ".." in parts or os.path.isabs(tag):
            raise ValueError(
                f"tag {tag!r} cannot name a checkpoint; use the name of a folder, such as global_step500"
            )
        self.save_dir, self.tag = save_dir, str(Path(tag))
        parent, name = os.path.split(self.tag)
        self.staging_tag = os.path.join(parent, f".{name}.saving")
        self.replaced_tag = os.path.join(parent, f".{name}.replaced")
        self.final, self.staging, self.replaced = (
            save_dir / place for place in (self.tag, self.staging_tag, self.replaced_tag)
        )

    @property
    def readable_tag(self) -> str:
        """Where the checkpoint of this tag is: aside, between two renames or after a crash there."""
        return self.replaced_tag if self.replaced.is_dir() and not self.final.is_dir() else self.tag

    def begin(self) -> None:
        """An empty folder to write into; what a crash left is put right first. One rank calls it."""
        if os.path.lexists(self.replaced):
            if os.path.lexists(self.final):
                self.clear()
            else:
                os.rename(self.replaced, self.final)
        if self.staging.exists():
            shutil.rmtree(self.staging)
        self.staging.mkdir(parents=True)

    def put_aside(self) -> None:
        """An older checkpoint of that name gives it up."""
        if os.path.lexists(self.final):
            os.rename(self.final, self.replaced)

    def take_the_name(self) -> None:
        """The new one has it; if that fails, the older one has it back."""
        try:
            os.rename(self.staging, self.final)
        except OSError:
            if os.path.lexists(self.replaced):
                os.rename(self.replaced, self.final)
            raise
        for folder in {self.final.parent, self.save_dir, self.save_dir.absolute().parent}:
            sync_folder(folder)

    def name_latest(self) -> None:
        write_text(self.save_dir / "latest", self.tag)

    def clear(self) -> None:
        """Remove the older one, but for what others have put into its folder: that moves on."""
        if self.replaced.is_symlink():
            self.replaced.unlink()
        elif self.replaced.is_dir():
            for entry in _foreign(self.replaced):
                if not os.path.lexists(self.final / entry.name):
                    os.rename(entry, self.final / entry.name)
            shutil.rmtree(self.replaced)

    def give_up(self) -> None:
        """Remove what was written; what cannot be removed is left for the next save."""
        shutil.rmtree(self.staging, ignore_errors=True)


def _foreign(folder: Path) -> list[Path]:
    """What is in a checkpoint's folder and was not saved by DeepSpeed: a tokenizer, say."""
    found, _ = attempt(lambda: manifest.read(folder))  # a damaged one tells as little as none
    ours = {manifest.NAME} | (set(found.files) if found is not None else set())
    return [p for p in folder.iterdir() if p.name not in ours and not p.name.endswith("_states.pt")]


@contextmanager
def _recorded(engine: Any) -> Iterator[RecordingEngine]:
    """While DeepSpeed saves, its effects on the file system are ours, and no rank leaves it early."""
    recording = RecordingEngine(engine.checkpoint_engine)
    copy_script = engine._copy_recovery_script
    engine.checkpoint_engine = recording
    copies = partial(recording.guard, engine.optimizer.state_dict)  # may find no memory for what it copies
    object.__setattr__(
        engine, "_copy_recovery_script", lambda path: recording.guard(lambda: copy_script(path))
    )
    object.__setattr__(engine.optimizer, "state_dict", lambda: copies() or {})
    try:
        yield recording
    finally:
        engine.checkpoint_engine = recording._inner
        object.__delattr__(engine, "_copy_recovery_script")
        object.__delattr__(engine.optimizer, "state_dict")


def _meet_to_begin(place: Place) -> None:
    """All ranks save under one tag, or none does; rank 0 makes the folder."""
    failure: Exception | None = None
    if rank() == 0:
        failure = _explained(place, attempt(place.begin)[1])
    tags = together(place.tag, failure)
    different = [number for number, tag in enumerate(tags) if tag != tags[0]]
    if different:
        raise ValueError(
            f"save_checkpoint: rank(s) {different} use another tag than rank 0 ({tags[0]!r}; this rank: "
            f"{place.tag!r}); all ranks must save under the same tag"
        )


def _meet_to_finish(place: Place, recording: RecordingEngine, stage: int, save_latest: bool) -> None:
    """Every rank's files are on the disk, or the save fails everywhere; then rank 0 makes it valid."""
    mine = {str(path.relative_to(place.staging)): record for path, record in recording.records.items()}
    try:
        everyone = together(mine, _explained(place, recording.failure))
        together(None, _explained(place, _made_valid(place, stage, everyone) if rank() == 0 else None))
    except RuntimeError:
        place.give_up()
        raise
    together(None, _made_latest(place, save_latest) if rank() == 0 else None)


def _made_valid(place: Place, stage: int, everyone: list[Mapping[str, FileRecord]]) -> Exception | None:
    """Manifest, then the name. Rank 0."""

    def work() -> None:
        for number, records in enumerate(everyone):
            for name, record in records.items():
                path = place.staging / name
                if not path.is_file() or path.stat().st_size != record.nbytes:
                    raise RuntimeError(
                        f"rank 0 does not see {name}, which rank {number} wrote: all ranks must save to storage that "
                        "they share"
                    )
        write_text(place.staging / manifest.NAME, _manifest(place.tag, stage, everyone).to_json())
        place.put_aside()
        place.take_the_name()

    return attempt(work)[1]


def _made_latest(place: Place, save_latest: bool) -> Exception | None:
    """From here on the checkpoint is there; what fails now takes nothing away. Rank 0."""
    _, error = attempt(place.name_latest if save_latest else lambda: None)
    _, left = attempt(place.clear)
    if left is not None:
        logger.warning(
            "grass: %s is replaced, but %s could not be removed (%s)", place.final, place.replaced, left
        )
    if error is None:
        return None
    return RuntimeError(
        f"checkpoint {place.final} was saved, but {place.save_dir / 'latest'} was not updated ({error})"
    )


def _explained(place: Place, error: Exception | None) -> Exception | None:
    if error is None:
        return None
    return RuntimeError(
        f"checkpoint {place.final} was not saved ({error}); older checkpoints are untouched; free some space, "
        "or save elsewhere"
    )


def _manifest(tag: str, stage: int, everyone: list[Mapping[str, FileRecord]]) -> manifest.Manifest:
    versions = {
        "ds_grass": ds_grass.__version__,
        "deepspeed": deepspeed.__version__,
        "torch": torch.__version__,
    }
    files = {name: record for records in everyone for name, record in records.items()}
    return manifest.Manifest(tag, len(everyone), stage, versions, files)


def _warn_within_step(engine: Any) -> None:
    if engine.optimizer.core.is_within_step and rank() == 0:
        logger.warning(
            "grass: saving in the middle of a step; DeepSpeed's checkpoints hold no gradients, so a resumed run begins "
            "that step anew; save after engine.step() at a boundary"
        )


def _tell(engine: Any, place: Place, recording: RecordingEngine, seconds: float) -> None:
    core = engine.optimizer.core
    nbytes = sum(record.nbytes for record in recording.records.values())
    core.journal.saved(
        tag=place.tag,
        rank_bytes=nbytes,
        seconds=round(seconds, 6),
        checksum_seconds=round(recording.checksum_seconds, 6),
    )
    if rank() == 0:
        logger.info("GRASS: saved %s, %s of this rank in %.2f s, of which checksums %.2f s",
                    place.final, human_bytes(nbytes), seconds, recording.checksum_seconds)  # fmt: skip
