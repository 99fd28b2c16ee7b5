"""Removes finished jobs: their run folders and their rows in the Store."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import HybridError
from .pool import default_store
from .spec import JobState
from .storage import RunFolder
from .store import JobRow

FINAL = tuple(state for state in JobState if state.final)


@dataclass(frozen=True)
class Removable:
    """A finished job, and the bytes that its run folder takes."""

    row: JobRow
    size: int


def find(
    ids: Sequence[str] = (),
    *,
    older_than: float = 0.0,
    states: Iterable[JobState] = FINAL,
    tell: Callable[[str], object] | None = None,
) -> list[Removable]:
    """Return the finished jobs that can be removed, oldest first.

    Parameters
    ----------
    ids : sequence of str
        Only these jobs; all jobs if empty.
    older_than : float
        Only jobs that ended so many seconds ago or earlier.
    states : iterable of JobState
        Only jobs that ended so.
    tell : callable, optional
        Called with a few words while sizes are added up.

    Raises
    ------
    HybridError
        One of `ids` has not ended, or an unfinished job waits for it.
    """
    store = default_store()
    wanted = [state for state in states if state.final]
    if not wanted:
        raise HybridError(f"only finished jobs can be removed: {', '.join(state.value for state in FINAL)}")
    needed = _needed()
    if ids:
        rows = [store.job(job_id) for job_id in dict.fromkeys(ids)]
        for row in rows:
            if not row.state.final:
                raise HybridError(f"job {row.id} is {row.state}; only finished jobs can be removed (cancel ends it)")
            if row.id in needed:
                raise HybridError(f"job {row.id} cannot be removed: unfinished job {needed[row.id]} waits for it")
    else:
        rows = [row for row in store.jobs(states=wanted) if row.id not in needed]
    before = time.time() - older_than
    rows = [row for row in reversed(rows) if row.state in wanted and (row.ended or row.created) <= before]
    found = []
    for number, row in enumerate(rows):
        if tell is not None:
            tell(f"adding up sizes: {number} of {len(rows)} jobs")
        found.append(Removable(row, size(Path(row.folder))))
    return found


def _needed() -> dict[str, str]:
    """Return the jobs that unfinished ones wait for, each with one that does."""
    unfinished = tuple(state for state in JobState if not state.final)
    needed = {}
    for row in default_store().jobs(states=unfinished):
        with contextlib.suppress(HybridError):
            needed.update(dict.fromkeys(RunFolder(Path(row.folder)).spec.after, row.id))
    return needed


def size(folder: Path) -> int:
    """Return the bytes that removing a folder frees; a result file that a later job shares stays."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(os.path.join(path, name))
                total += status.st_size if status.st_nlink == 1 else 0
    return total


def remove(row: JobRow) -> bool:
    """Remove a finished job; return ``False`` if it has been retried in the meantime, or is at this moment.

    The folder goes first: what is left of an interrupted removal is a row, which the next one finds. Without its
    ``spec.json`` it is no job any more; the rest goes when the lock is free, since NFS keeps a file that is open.

    Raises
    ------
    HybridError
        The folder cannot be removed.
    """
    store = default_store()
    if not store.job(row.id).state.final:
        return False
    folder = RunFolder(Path(row.folder))
    with contextlib.suppress(OSError):  # told below
        if folder.path.exists():
            with folder.submitting() as lock:
                if lock is None or not store.job(row.id).state.final:
                    return False
                (folder / "spec.json").unlink(missing_ok=True)
        folder.remove()
    if folder.path.exists():
        raise HybridError(f"job {row.id}: {folder.path} cannot be removed; remove it, then clean again")
    store.remove_job(row.id)
    return True
