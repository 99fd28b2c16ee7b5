"""Loads results and turns bad ends into errors that say what happened and what to do."""

from __future__ import annotations

import functools
import os
import reprlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import frames
from .errors import JobFailed, RemoteError, ResultLost
from .progress import DONE, FAILED, Lost, ending, judge
from .run import Run
from .spec import Cause, JobState
from .store import network_file_system

VISIBLE = 30.0
"""Seconds within which what a node has written must be visible here on a network file system."""
_LARGE = 1 << 20
"""Bytes of a result from which several are loaded at a time: its checksum takes longer than its unpickling."""
_SHOWN = 200
"""Most characters of a task's arguments in an error."""

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
    if mark not in (DONE, FAILED) or run.progress.results[task].death:
        raise failure(run, task)
    try:
        value = _load(run, task)
    except frames.FrameError as error:
        name = f"task {task} of job" if run.spec.array else "job"
        raise ResultLost(f"the result of {name} {run.row.id} is lost: {error}", Cause.RESULT_LOST) from error
    if mark == FAILED:
        raise error_of(value, _where(run, task) if run.spec.array else "")
    return _unpack(run, value)


def _where(run: Run, task: int) -> str:
    return f"task {task} of job {run.row.id}" + given_to(str(run.folder / "items.bin"), task, run.spec.kind)


def error_of(record: tuple[BaseException | None, str, str], where: str) -> Exception:
    """Return what a task raised, from its record; it says where that was, if this is not empty."""
    problem, line, text = record
    # SystemExit and the like would end whoever asks for the result; StopIteration would end a loop over results.
    if not isinstance(problem, Exception) or isinstance(problem, (StopIteration, StopAsyncIteration)):
        problem = JobFailed(line, Cause.USER_ERROR)
    if where and hasattr(problem, "add_note"):  # from Python 3.11 on; a note comes back from other processes, too
        problem.add_note("in " + where)
    elif where:
        text += "in " + where
    problem.__cause__ = RemoteError(text)
    return problem


def given_to(items: str, task: int, kind: str) -> str:
    """Return `` with arguments (…)``, of a task's own, cut if they are long; empty if it has none that can be shown.

    Parameters
    ----------
    items : str
        The job's ``items.bin``.
    task : int
        The task.
    kind : {"function", "cell", "script"}
        What the job runs.
    """
    try:
        item = frames.read_entry(items, _entries(items)[task])
        if kind == "function":
            text = "(" + ", ".join(map(_short, item)) + ("," if len(item) == 1 else "") + ")"
        else:
            variables = item if kind == "cell" else item[1]
            text = ", ".join(f"{name}={_short(value)}" for name, value in variables.items())
    except Exception:  # noqa: BLE001  damaged, or of a class that cannot be loaded or shown here
        return ""
    if not item or not text:
        return ""
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return f" with arguments {text}" if kind == "function" else f" with {text}"


@functools.lru_cache(4)
def _entries(items: str) -> dict[int, frames.Entry]:
    return frames.Reader(items).entries


def _short(value: object) -> str:
    return " ".join(_REPR.repr(value).split())


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def _look(run: Run, task: int) -> None:
    """Read on in what the workers wrote; of a completed job, until the task's end can be seen here."""
    run.refresh()
    deadline = time.monotonic() + VISIBLE
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
    deadline = time.monotonic() + VISIBLE
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
    singly: list[int] = []
    for path, tasks in by_file.items():
        found: dict[int, Any] = {}
        size = sum(progress.results[task].entry.length for task in tasks)
        if path.endswith(".bin") and progress.results[tasks[0]].file is None and size < _LARGE * len(tasks):
            try:
                found = {task: value for task, kind, value in frames.Reader(path).load_all() if kind == frames.VALUE}
            except frames.FrameError:
                found = {}  # one by one, so that only what is damaged is lost
        for task in tasks:
            if progress.marks[task] == DONE and task in found:
                yield task, True, _unpack(run, found[task])
            else:
                singly.append(task)
    if singly:  # checksums are computed without the GIL
        with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
            yield from pool.map(functools.partial(_one, run), singly)
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
        return JobState.FAILED, run.progress.results[task].cause, run.progress.results[task].error
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
    text = _where(run, task) if run.spec.array else f"job {run.row.id}"
    text += f" ({run.row.name}) on pool {run.row.pool!r}: {state}"
    text += f", {cause}" if cause else ""
    text += f": {reason}" if reason else ""
    if cause in ADVICE:
        text += f"\n→ {ADVICE[cause]}"
    tail = _log_tail(run, task)
    return JobFailed(text + (f"\nEnd of the log:\n{tail}" if tail else ""), cause)


def _log_tail(run: Run, task: int) -> str:
    result = run.progress.results.get(task)
    if result is not None:  # other tasks may have written to the log since
        start, stop = result.log or (0, 0)
        try:
            with open(run.folder.log(result.batch), "rb") as file:
                file.seek(max(start, stop - 8192))
                return "\n".join(file.read(stop - file.tell()).decode(errors="replace").splitlines()[-15:])
        except OSError:
            return ""
    batch = run.progress.batch_of(task)
    if batch is None and run.progress.attempts:  # never claimed: no batch of its round got so far
        attempt = run.progress.attempts[-1]
        logs = (
            number for number in range(attempt.first, attempt.first + attempt.batches) if run.folder.log_tail(number)
        )
        batch = next(logs, None)
    return "" if batch is None else run.folder.log_tail(batch)
