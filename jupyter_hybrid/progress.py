"""How far a job is: reads what its workers write, and decides the state of the job from that and the scheduler's word.

:class:`Progress` follows the status files of a run folder; :func:`judge` is pure.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .frames import VALUE, Entry, FrameMissing, read_entry, verify_entry
from .spec import Cause, JobState
from .storage import Attempt, RunFolder
from .store import BatchRow
from .worker import CRASHES

log = logging.getLogger(__name__)

WAITING, RUNNING, DONE, FAILED = 0, 1, 2, 3
"""Marks of a task in :attr:`Progress.marks`."""


class TaskResult(NamedTuple):
    """Where the result of a task is and what is known of its run; `death` is the cause if it ended its process."""

    batch: int
    entry: Entry
    seconds: float
    ended: float
    error: str
    log: tuple[int, int] | None
    file: str | None = None
    death: Cause | None = None

    @property
    def cause(self) -> Cause | None:
        """Why it failed, if it did."""
        return None if self.entry.kind == VALUE else self.death or Cause.USER_ERROR


@dataclass
class BatchProgress:
    """What the worker of one batch has written. `why` is empty while it runs; `news` is monotonic time here."""

    started: float | None = None
    starts: int = 0
    ended: float | None = None
    why: str = ""
    error: str = ""
    host: str = ""
    task: int | None = None
    beat: float | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    news: float = field(default_factory=time.monotonic)
    claims: list[tuple[int, int]] = field(default_factory=list)
    read: int = 0
    settled: bool = False


class Progress:
    """What the workers of a job have written so far; :meth:`refresh` reads on.

    Attributes
    ----------
    marks : bytearray
        WAITING, RUNNING, DONE or FAILED for each task.
    results : dict of int to TaskResult
        By task, once it has ended.
    batches : dict of int to BatchProgress
        By batch, once its worker has started.
    attempts : list of Attempt
        Rounds of the job so far.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.total = folder.spec.tasks
        self.marks = bytearray(self.total)
        self.results: dict[int, TaskResult] = {}
        self.batches: dict[int, BatchProgress] = {}
        self.attempts: list[Attempt] = []
        self._valid_from: list[int] = [0] * self.total
        self._order: list[int] = []
        self._load_reused()

    def _load_reused(self) -> None:
        if not self.folder.spec.keys or not (self.folder / "reused.json").exists():
            return
        for task, (file, source, offset, length, checksum, seconds) in self.folder.read_json("reused.json").items():
            entry = Entry(int(source), VALUE, offset, length, checksum)
            self._end(int(task), TaskResult(-1, entry, seconds, self.folder.spec.created, "", None, file))

    def _end(self, task: int, result: TaskResult) -> None:
        self.marks[task] = DONE if result.entry.kind == VALUE else FAILED
        self.results[task] = result
        self._order.append(task)

    def refresh(self) -> bool:
        """Read what is new; return whether anything was."""
        changed = self._new_attempts()
        status = self.folder.path / "status"
        try:
            entries = list(os.scandir(status))
        except FileNotFoundError:
            return changed
        for entry in entries:
            name, _, ending = entry.name.partition(".")
            if ending != "jsonl" or not name.isdecimal():
                continue
            batch = self.batches.get(int(name))
            if batch is None:
                batch = self.batches[int(name)] = BatchProgress()
            if not batch.settled and entry.stat().st_size > batch.read:
                changed |= self._read(int(name), batch, entry.path)
        return changed

    def look(self, number: int) -> None:
        """Read on in the status file of one batch whatever its size is said to be: opening it makes NFS look again."""
        with contextlib.suppress(FileNotFoundError):
            path = os.path.join(self.folder.path, "status", f"{number}.jsonl")
            self._read(number, self.batches.get(number) or self.batches.setdefault(number, BatchProgress()), path)

    def _new_attempts(self) -> bool:
        changed = False
        while (self.folder.path / f"attempt-{len(self.attempts) + 1}.json").exists():
            attempt = self.folder.attempt(len(self.attempts) + 1)
            self.attempts.append(attempt)
            for start, stop in attempt.tasks:
                for task in range(start, stop):
                    self._valid_from[task] = attempt.first
                    self.marks[task] = WAITING
                    self.results.pop(task, None)
            changed = True
        return changed

    def _read(self, number: int, batch: BatchProgress, path: str) -> bool:
        with open(path, "rb") as file:
            file.seek(batch.read)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        batch.read += whole
        for line in data[:whole].splitlines():
            try:
                self._event(number, batch, json.loads(line))
            except (ValueError, KeyError, TypeError, IndexError):  # noqa: PERF203  cut by a full disk or a killed node
                log.warning("%s: a line cannot be read: %r", path, line[:200])
        if whole:
            batch.news = time.monotonic()
        return whole > 0

    def _event(self, number: int, batch: BatchProgress, event: dict[str, Any]) -> None:
        kind = event["e"]
        if kind == "done":
            task = event["task"]
            batch.task = None
            if number >= self._valid_from[task]:
                log = tuple(event["log"]) if "log" in event else None
                error = event.get("err", "")
                entry = Entry(task, 1 if error else VALUE, event["o"], event["l"], event["c"])
                death = Cause(event["cause"]) if "cause" in event else None
                self._end(task, TaskResult(number, entry, event["s"], event["t"], error, log, death=death))
        elif kind == "start":
            batch.started, batch.ended, batch.why, batch.host = event["t"], None, "", event["host"]
            batch.starts += 1
        elif kind == "claim":
            batch.claims.append((event["a"], event["b"]))
        elif kind == "run":
            batch.task = event["task"]
            if number >= self._valid_from[event["task"]] and self.marks[event["task"]] == WAITING:
                self.marks[event["task"]] = RUNNING
        elif kind == "beat":
            batch.beat, batch.peak_memory = event["t"], event["rss"]
        elif kind == "end":
            batch.ended, batch.why, batch.error = event["t"], event["why"], event.get("err", "")
            batch.cpu_seconds, batch.peak_memory = event.get("cpu"), event.get("rss", batch.peak_memory)
            batch.settled = batch.why == "done"

    @property
    def done(self) -> int:
        """Number of tasks with a result."""
        return self.marks.count(DONE)

    @property
    def failed(self) -> int:
        """Number of tasks whose code raised or ended its process."""
        return self.marks.count(FAILED)

    @property
    def complete(self) -> bool:
        """Whether every task has ended by itself."""
        return self.marks.count(WAITING) == 0 and self.marks.count(RUNNING) == 0

    def ended_since(self, position: int) -> list[int]:
        """Return the tasks that ended after the first `position` ones, in the order of their ends."""
        return self._order[position:]

    def result_path(self, result: TaskResult) -> str:
        """Return the file that holds the result of a task now."""
        results = self.folder.path / "results"
        if result.file is not None:
            return str(results / result.file)
        finished = results / f"{result.batch}.bin"
        return str(finished if finished.exists() else results / f"{result.batch}.part")

    def load(self, task: int) -> Any:
        """Return the record of an ended task: its value, or (exception, line, traceback text) of a failed one.

        Raises
        ------
        jupyter_hybrid.frames.FrameError
            The file is missing, cut or altered.
        """
        return self._from_file(task, read_entry)

    def verify(self, task: int) -> str:
        """Check the record of an ended task without unpickling it; return the file that holds it.

        Raises
        ------
        jupyter_hybrid.frames.FrameError
            The file is missing, cut or altered.
        """
        self._from_file(task, verify_entry)
        return self.result_path(self.results[task])

    def _from_file(self, task: int, read: Callable[[str, Entry], Any]) -> Any:
        result = self.results[task]
        try:
            return read(self.result_path(result), result.entry)
        except FrameMissing:
            # Renamed from .part to .bin between the look and the reading.
            return read(self.result_path(result), result.entry)

    def batch_of(self, task: int) -> int | None:
        """Return the batch that runs or ran a task, as far as it is decided."""
        if task in self.results:
            return self.results[task].batch
        for attempt in reversed(self.attempts):
            position = 0
            for start, stop in attempt.tasks:
                if start <= task < stop:
                    position += task - start
                    if not attempt.pull:
                        return attempt.first + position // attempt.size
                    return self._claimed(attempt, position)
                position += stop - start
        return None

    def _claimed(self, attempt: Attempt, position: int) -> int | None:
        for number in range(attempt.first, attempt.first + attempt.batches):
            batch = self.batches.get(number)
            if batch is not None and any(start <= position < stop for start, stop in batch.claims):
                return number
        return None


class Lost(NamedTuple):
    """Why a task ended without saying so itself."""

    state: JobState
    cause: Cause
    reason: str


class Verdict(NamedTuple):
    """State of a job. `lost` names the tasks of the round that ended without a word of their own."""

    state: JobState
    cause: Cause | None
    reason: str
    running: int
    lost: Mapping[int, Lost]


_STATE_OF = {Cause.TIMEOUT: JobState.TIMEOUT, Cause.CANCELLED: JobState.CANCELLED}


def judge(
    progress: Progress,
    observed: Mapping[int, BatchRow],
    over: Mapping[int, Lost | None],
    submitted: bool,
    cancelled: bool,
) -> Verdict:
    """Return the state of a job.

    Parameters
    ----------
    progress : Progress
        What the workers wrote.
    observed : mapping of int to BatchRow
        What the scheduler last said of each batch of the round.
    over : mapping of int to Lost or None
        The batches of the round that surely run no more, with what became of their unfinished tasks; see
        :func:`ending`.
    submitted : bool
        Whether the scheduler has the whole round.
    cancelled : bool
        Whether somebody asked to cancel the job.
    """
    attempt = progress.attempts[-1] if progress.attempts else None
    if attempt is None or progress.complete:
        return _final(progress, {}, cancelled)
    every = range(attempt.first, attempt.first + attempt.batches)
    lost = dict(_lost(progress, attempt, over)) if over else {}
    unfinished = progress.marks.count(WAITING) + progress.marks.count(RUNNING) - len(lost)
    if unfinished <= 0 or all(number in over for number in every):
        return _final(progress, lost, cancelled)
    live = [number for number in every if number not in over]
    states = {observed[number].state for number in live if number in observed}
    begun = [n for n in every if n in progress.batches and not _requeued(progress.batches[n], observed.get(n))]
    working = [number for number in begun if number not in over and not progress.batches[number].why]
    running = max(len(working), sum(1 for n in live if n in observed and observed[n].state is JobState.RUNNING))
    waiting = next((observed[n].reason for n in live if n in observed and observed[n].state is JobState.PENDING), "")
    if states == {JobState.UNKNOWN}:
        reason = next(observed[n].reason for n in live if n in observed)
        return Verdict(JobState.UNKNOWN, None, reason, 0, lost)
    if running or begun:
        return Verdict(JobState.RUNNING, None, waiting if not running else "", running, lost)
    return Verdict(JobState.PENDING if submitted else JobState.NEW, None, waiting, 0, lost)


def _requeued(batch: BatchProgress, row: BatchRow | None) -> bool:
    """Return whether a batch that has begun waits for the scheduler to start it anew (preempted, node failed)."""
    return row is not None and row.state is JobState.PENDING and batch.starts <= row.restarts


def _final(progress: Progress, lost: Mapping[int, Lost], cancelled: bool) -> Verdict:
    if progress.done == progress.total:
        return Verdict(JobState.COMPLETED, None, "", 0, {})
    failed = [progress.results[task] for task, mark in enumerate(progress.marks) if mark == FAILED]
    causes = Counter([loss.cause for loss in lost.values()] + [result.cause for result in failed if result.cause])
    if not causes:
        return Verdict(JobState.FAILED, Cause.RESULT_LOST, "its run folder has lost the plan of its tasks", 0, {})
    cause = Cause.CANCELLED if cancelled and not progress.complete else causes.most_common(1)[0][0]
    said = [result.error for result in failed if result.cause is cause]
    said += [loss.reason for loss in lost.values() if loss.cause is cause]
    reason = said[0] if said else ""
    return Verdict(_STATE_OF.get(cause, JobState.FAILED), cause, reason, 0, lost)


def _lost(progress: Progress, attempt: Attempt, over: Mapping[int, Lost | None]) -> Iterator[tuple[int, Lost]]:
    """Yield the tasks of a round that no batch will end any more."""
    tasks = [task for start, stop in attempt.tasks for task in range(start, stop)]
    unended = (WAITING, RUNNING)
    nothing = Lost(JobState.FAILED, Cause.INFRASTRUCTURE, "the batch ended without running this task")
    if not attempt.pull:
        for number, loss in over.items():
            position = (number - attempt.first) * attempt.size
            for task in tasks[position : position + attempt.size]:
                if progress.marks[task] in unended:
                    yield task, loss or nothing
        return
    all_over = all(number in over for number in range(attempt.first, attempt.first + attempt.batches))
    claimed: set[int] = set()
    for number, loss in over.items():
        batch = progress.batches.get(number)
        for start, stop in batch.claims if batch is not None else ():
            for task in tasks[start:stop]:
                claimed.add(task)
                if progress.marks[task] in unended:
                    yield task, loss or nothing
    if all_over:
        worst = next((loss for loss in over.values() if loss is not None), nothing)
        for task in tasks:
            if task not in claimed and progress.marks[task] in unended:
                yield task, worst


_EXITS = {
    73: "the run folder could not be entered on the node: is the storage there?",
    74: "the node could not write to the run folder: is its disk full, or a quota used up?",
}


def ending(batch: BatchProgress | None, row: BatchRow | None) -> Lost | None:
    """Return what became of the unfinished tasks of a batch that surely runs no more; ``None`` if it ended well.

    The worker's own word counts first; what it cannot know (who sent a signal, a kill without a word) the scheduler
    says.
    """
    if batch is not None and batch.why == "done":
        return None
    if batch is not None and batch.why == "walltime":
        return Lost(JobState.TIMEOUT, Cause.TIMEOUT, "not started: the walltime of the batch was nearly used up")
    if batch is not None and batch.why == "infrastructure":
        return Lost(JobState.FAILED, Cause.INFRASTRUCTURE, batch.error)
    if row is not None and row.cause is not None:
        return Lost(_STATE_OF.get(row.cause, JobState.FAILED), row.cause, row.reason or row.cause.value)
    if row is not None and row.exit_code in _EXITS:
        return Lost(JobState.FAILED, Cause.INFRASTRUCTURE, _EXITS[row.exit_code])
    if row is not None and row.exit_code == 127:
        return Lost(JobState.FAILED, Cause.INFRASTRUCTURE, "a command of the job script was not found: see the log")
    if row is not None and (row.exit_code or 0) > 128:
        number = (row.exit_code or 0) - 128
        hint = "; often the node's memory was used up" if number == signal.SIGKILL else ""
        cause = Cause.USER_ERROR if number in CRASHES else Cause.INFRASTRUCTURE
        return Lost(JobState.FAILED, cause, f"the worker was killed by signal {number}{hint}")
    if batch is None or batch.started is None:
        code = "" if row is None or row.exit_code is None else f" (exit status {row.exit_code})"
        return Lost(
            JobState.FAILED, Cause.INFRASTRUCTURE, f"the job script ended before its worker began{code}: see the log"
        )
    code = "" if row is None or row.exit_code is None else f", exit status {row.exit_code}"
    return Lost(JobState.FAILED, Cause.INFRASTRUCTURE, f"the worker ended without a word{code}: see the log")
