"""Loads results and turns bad ends into errors that say what happened and what to do."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from . import frames
from .errors import JobFailed, RemoteError, ResultLost
from .progress import DONE, FAILED, Lost, ending, judge
from .run import Run
from .spec import Cause, JobState
from .store import network_file_system

_VISIBLE = 30.0
"""Seconds within which what a node has written must be visible here on a network file system."""

ADVICE = {
    Cause.OUT_OF_MEMORY: "ask for more: retry(memory=...)",
    Cause.TIMEOUT: "ask for more time: retry(time=...)",
    Cause.NODE_FAILURE: "the node failed, not the job: retry()",
    Cause.PREEMPTED: "a job with higher priority took the node: retry()",
    Cause.CANCELLED: "retry() runs what is not done",
    Cause.DEPENDENCY_FAILED: "a job it depends on did not complete: retry that one, then this",
    Cause.SUBMIT_REJECTED: "change what it asks for: retry(partition=..., time=...), or submit it anew",
    Cause.RESULT_LOST: "retry() runs only what is lost",
    Cause.INFRASTRUCTURE: "jupyter hybrid doctor checks the pool; then retry()",
}
"""What to do about each cause."""


def load_task(run: Run, task: int) -> Any:
    """Return the value of an ended task, or raise what it raised.

    Raises
    ------
    ResultLost
        Its file is missing, cut or altered.
    JobFailed
        It ended without a word of its own.
    """
    if run.progress.marks[task] not in (DONE, FAILED):
        _look(run, task)
    mark = run.progress.marks[task]
    if mark not in (DONE, FAILED):
        raise failure(run, task)
    try:
        value = _load(run, task)
    except frames.FrameError as error:
        name = f"task {task} of job" if run.spec.array else "job"
        raise ResultLost(f"the result of {name} {run.row.id} is lost: {error}", Cause.RESULT_LOST) from error
    if mark == FAILED:
        problem, line, text = value
        if run.spec.array and hasattr(problem, "add_note"):  # from Python 3.11 on
            problem.add_note(f"in task {task} of job {run.row.id}")
        # SystemExit and the like would end whoever asks for the result; StopIteration would end a loop over results.
        if not isinstance(problem, Exception) or isinstance(problem, (StopIteration, StopAsyncIteration)):
            problem = JobFailed(line, Cause.USER_ERROR)
        raise problem from RemoteError(text)
    return _unpack(run, value)


def _look(run: Run, task: int) -> None:
    """Read on in what the workers wrote; of a completed job, until the task's end can be seen here."""
    run.refresh()
    deadline = time.monotonic() + _VISIBLE
    while run.row.state is JobState.COMPLETED and run.progress.marks[task] not in (DONE, FAILED):
        if time.monotonic() >= deadline or not network_file_system(run.folder.path):
            return
        os.listdir(run.folder.path / "status")  # makes NFS look again
        with run.lock:
            for batch in list(run.progress.batches):
                run.progress.look(batch)
        time.sleep(0.2)
        run.refresh()


def _load(run: Run, task: int) -> Any:
    try:
        return run.progress.load(task)
    except frames.FrameError as error:
        if isinstance(error, frames.FrameUnreadable) or not network_file_system(run.folder.path):
            raise
    # What a node has written becomes visible here a little later.
    deadline = time.monotonic() + _VISIBLE
    while True:
        os.listdir(run.folder.path / "results")  # makes NFS look again
        try:
            return run.progress.load(task)
        except frames.FrameError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def _unpack(run: Run, value: Any) -> Any:
    """Return what a user sees of a cell's values: the value of a single name, or the mapping."""
    if run.spec.kind == "cell" and len(run.spec.out) == 1 and isinstance(value, dict):
        return value.get(run.spec.out[0])
    return value


def load_all(run: Run) -> Iterator[tuple[int, bool, Any]]:
    """Yield (task, whether it has a value, value or exception) of all tasks, file by file."""
    progress = run.progress
    if not progress.complete:
        run.refresh()
    by_file: dict[str, list[int]] = {}
    for task, result in list(progress.results.items()):
        by_file.setdefault(progress.result_path(result), []).append(task)
    for path, tasks in by_file.items():
        found: dict[int, Any] = {}
        if path.endswith(".bin") and progress.results[tasks[0]].file is None:
            try:
                found = {task: value for task, kind, value in frames.Reader(path).load_all() if kind == frames.VALUE}
            except frames.FrameError:
                found = {}  # one by one, so that only what is damaged is lost
        for task in tasks:
            if progress.marks[task] == DONE and task in found:
                yield task, True, _unpack(run, found[task])
            else:
                yield _one(run, task)
    losses = lost(run)
    for task, mark in enumerate(progress.marks):
        if mark not in (DONE, FAILED):
            yield task, False, failure(run, task, losses)


def _one(run: Run, task: int) -> tuple[int, bool, Any]:
    try:
        return task, True, load_task(run, task)
    except Exception as error:  # noqa: BLE001  a task's own exception is handed on as a value
        return task, False, error


def lost(run: Run) -> dict[int, Lost]:
    """Return why tasks of an ended job have no result."""
    if not run.row.state.final or not run.progress.attempts:
        return {}
    attempt = run.progress.attempts[-1]
    batches = range(attempt.first, attempt.first + attempt.batches)
    over = {batch: ending(run.progress.batches.get(batch), run.batches.get(batch)) for batch in batches}
    return dict(judge(run.progress, run.batches, over, True, run.cancelled).lost)


def end_of(run: Run, task: int, losses: Mapping[int, Lost] | None = None) -> tuple[JobState, Cause | None, str]:
    """Return state, cause and reason of one task; `losses` are those of the job, from :func:`lost`, if known."""
    mark = run.progress.marks[task]
    if mark == DONE:
        return JobState.COMPLETED, None, ""
    if mark == FAILED:
        return JobState.FAILED, Cause.USER_ERROR, run.progress.results[task].error
    if run.row.state.final:
        row = run.row
        if row.cause in (Cause.SUBMIT_REJECTED, Cause.DEPENDENCY_FAILED) or row.cause is Cause.CANCELLED:
            return row.state, row.cause, row.reason
        loss = (lost(run) if losses is None else losses).get(task)
        return (loss.state, loss.cause, loss.reason) if loss else (row.state, row.cause, row.reason)
    if mark:
        return JobState.RUNNING, None, ""
    return (JobState.PENDING if run.row.state is JobState.RUNNING else run.row.state), None, run.row.reason


def failure(run: Run, task: int, losses: Mapping[int, Lost] | None = None) -> JobFailed:
    """Return the error of a task that ended without a word of its own: what, why, what next, and the log's tail."""
    state, cause, reason = end_of(run, task, losses)
    what = f"task {task} of job {run.row.id}" if run.spec.array else f"job {run.row.id}"
    text = f"{what} ({run.row.name}) on pool {run.row.pool!r}: {state}"
    text += f", {cause}" if cause else ""
    text += f": {reason}" if reason else ""
    if cause in ADVICE:
        text += f"\n→ {ADVICE[cause]}"
    batch = run.progress.batch_of(task)
    if batch is None and run.progress.attempts:  # never claimed: no batch of its round got so far
        attempt = run.progress.attempts[-1]
        logs = (
            number for number in range(attempt.first, attempt.first + attempt.batches) if run.folder.log_tail(number)
        )
        batch = next(logs, None)
    tail = "" if batch is None else run.folder.log_tail(batch)
    return JobFailed(text + (f"\nEnd of the log:\n{tail}" if tail else ""), cause)
