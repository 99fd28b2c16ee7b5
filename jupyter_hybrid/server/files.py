"""Reads files of run folders, and nothing else: no link is followed, nothing but plain files is opened."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import JobNotFound
from ..store import JobRow

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe that was put there does not block
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECTORY


@contextlib.contextmanager
def opened(folder: Path, *parts: str) -> Iterator[int]:
    """Open a plain file below a run folder for reading; yields its descriptor.

    Raises
    ------
    FileNotFoundError
        It is not there, or it, or a folder on the way, is not what it says: a link, a pipe, a device.
    """
    if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
        raise FileNotFoundError("/".join(parts))
    descriptors: list[int] = []
    try:
        try:
            descriptors.append(os.open(folder, _FOLDER))
            for part in parts[:-1]:
                descriptors.append(os.open(part, _FOLDER, dir_fd=descriptors[-1]))
            descriptors.append(os.open(parts[-1], _FILE, dir_fd=descriptors[-1]))
        except OSError as error:
            raise FileNotFoundError(error.errno, "no such plain file", "/".join(parts)) from error
        if not stat.S_ISREG(os.fstat(descriptors[-1]).st_mode):
            raise FileNotFoundError("/".join(parts))
        yield descriptors[-1]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def read(folder: Path, *parts: str, limit: int = 1 << 20) -> bytes:
    """Return the beginning of a plain file below a run folder."""
    with opened(folder, *parts) as descriptor:
        return os.pread(descriptor, limit, 0)


def folder_of(row: JobRow) -> Path:
    """Return the run folder of a job, if that is what is there.

    Raises
    ------
    JobNotFound
        It was removed, or something else is in its place.
    """
    folder = Path(row.folder)
    try:
        mode = os.lstat(folder).st_mode
        with opened(folder, "spec.json"):
            good = folder.name == row.id and stat.S_ISDIR(mode)
    except OSError:
        good = False
    if not good:
        raise JobNotFound(f"job {row.id}: its run folder {folder} was removed")
    return folder


def tree(folder: Path, name: str, most: int = 1000) -> list[tuple[str, int, float]]:
    """Return (path below it, size, time of change) of the plain files of a folder of a run folder; no link followed."""
    top = folder / name
    found: list[tuple[str, int, float]] = []
    if top.is_symlink():
        return found
    for path, _, names in os.walk(top):
        for each in sorted(names):
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(path, each))
                if stat.S_ISREG(status.st_mode):
                    found.append((os.path.relpath(os.path.join(path, each), top), status.st_size, status.st_mtime))
            if len(found) >= most:
                return found
    return found
