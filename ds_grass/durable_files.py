"""Files that are whole or not there: checksums while writing, syncs, replacement by rename.

Contract: what these functions return after is on the disk as far as the kernel can promise (`fsync` of the file and of
its folder). Nothing here knows what is inside a file. Errors are `OSError`.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What identifies the contents of a file."""

    nbytes: int
    sha256: str
    """64 hex digits. SHA-256 because `sha256sum` is everywhere, and CPUs have instructions for it (1.7 GB/s a core)."""


class ChecksumWriter:
    """A binary file that is summed up while it is written. `write` never raises: see `close`.

    PyTorch's archive writer, interrupted by an exception, raises another one from its destructor. So the first error
    is kept, the rest of the bytes is swallowed, and `close` raises what happened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checksum_seconds = 0.0
        self._nbytes = 0
        self._sum = hashlib.sha256()
        self._file: BinaryIO = open(path, "wb", buffering=0)
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`."""
        rest = memoryview(data).cast("B")
        started = time.perf_counter()
        self._sum.update(rest)
        self.checksum_seconds += time.perf_counter() - started
        self._nbytes += len(rest)
        try:
            while rest and self._error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        return len(data)

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> FileRecord:
        """Sync, close, and say what was written; raise the first error of any write."""
        try:
            if self._error is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        if self._error is not None:
            raise self._error
        return FileRecord(self._nbytes, self._sum.hexdigest())


def read_record(path: Path) -> FileRecord:
    """Length and checksum of a file as it is on the disk."""
    digest, nbytes = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            nbytes += len(chunk)
    return FileRecord(nbytes, digest.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Replace the file by one with `text`; a reader, or a crash, finds the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: what was created, renamed or removed there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
