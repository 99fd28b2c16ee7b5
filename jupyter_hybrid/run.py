"""Run: one job as a process follows it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from .progress import Progress, Verdict
from .storage import RunFolder
from .store import BatchRow, JobRow

FASTEST, SLOWEST = 0.005, 1.0
"""Bounds, in seconds, of the time between two looks at the run folder of a job."""


class Run:
    """One job as a process follows it: its folder, what its workers wrote, and its row in the Store."""

    def __init__(self, folder: RunFolder, row: JobRow) -> None:
        self.folder = folder
        self.spec = folder.spec
        self._row = row
        self.progress = Progress(folder)
        self.lock = threading.RLock()
        self.listeners: list[Callable[[Run], None]] = []
        self.news = time.monotonic()
        self.cost = 0.0
        self.batches: dict[int, BatchRow] = {}
        self.verdict: Verdict | None = None
        self.cancel_sent: set[str] = set()
        self.cancel_asked = False  # by this process, which tells the scheduler itself
        self.absent: dict[int, float] = {}  # for how long the scheduler has said, when asked, that it has no such batch
        self.left: set[int] = set()  # batches that the scheduler no longer has, or has ended
        self.handle: object = None  # the one Job or ArrayJob of this process
        self._first_seen: dict[tuple[str, int | str], float] = {}
        self.written = 0.0
        self.broken = False  # said once
        self.pid = os.getpid()

    @property
    def row(self) -> JobRow:
        """Its row in the Store, as last seen here."""
        return self._row

    @row.setter
    def row(self, row: JobRow) -> None:
        with self.lock:
            known = self._row
            # Several threads read the Store: what one has read before a retry, or before the end, comes too late.
            late = row.attempt == known.attempt and known.state.final and not row.state.final
            if row.attempt >= known.attempt and not late:
                self._row = row

    def refresh(self) -> bool:
        """Read what the workers wrote; return whether it was anything."""
        with self.lock:
            start = time.thread_time()
            changed = self.progress.refresh()
            self.cost = time.thread_time() - start
            if changed:
                self.news = time.monotonic()
            return changed

    @property
    def planned(self) -> bool:
        """Whether the plan of the round that the Store has is seen here."""
        return len(self.progress.attempts) >= self.row.attempt

    @property
    def settled(self) -> bool:
        """Whether the job's end is known here: all tasks have ended, or the Store says so."""
        known = bool(self.progress.attempts) and self.planned
        return self.row.state.final or (known and self.progress.complete)

    def since(self, what: str, number: int | str, holds: bool) -> float:
        """Return for how many seconds something has held, as this process has seen it."""
        if not holds:
            self._first_seen.pop((what, number), None)
            return 0.0
        now = time.monotonic()
        return now - self._first_seen.setdefault((what, number), now)

    def tell(self) -> None:
        """Call whoever listens."""
        for listener in list(self.listeners):
            listener(self)

    def pause(self) -> float:
        """Return how long to wait before the next look: 2 % of the time without news, within bounds."""
        quiet = 0.02 * (time.monotonic() - self.news)
        return max(FASTEST, min(SLOWEST, quiet), 10 * self.cost)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to cancel this round."""
        return (self.folder / f"cancelled-{self.row.attempt}").exists()


_runs: weakref.WeakValueDictionary[str, Run] = weakref.WeakValueDictionary()
_runs_lock = threading.Lock()


def run_of(row: JobRow) -> Run:
    """Return what this process knows of a job: one object, whoever asks, so that news reaches all who wait for it."""
    with _runs_lock:
        run = _runs.get(row.folder)
        if run is None:
            run = _runs[row.folder] = Run(RunFolder(Path(row.folder)), row)
        else:
            run.row = row
        return run


def remember(run: Run) -> None:
    """Make a run the one that this process knows of its job, unless there is one."""
    with _runs_lock:
        _runs.setdefault(str(run.folder.path), run)


def forget_all() -> None:
    """Begin anew in a forked child, where the lock may be held for ever."""
    global _runs_lock  # noqa: PLW0603
    _runs_lock = threading.Lock()
    _runs.clear()
