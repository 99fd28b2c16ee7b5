"""Job, ArrayJob and Task: handles on jobs, for any process; jobs as futures."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

from . import launch, results
from .errors import HybridError, JobNotFound
from .pool import default_store
from .progress import DONE, FAILED, RUNNING, TaskResult
from .run import Run
from .spec import Cause, JobSpec, JobState
from .storage import RunFolder
from .store import JobRow
from .tracker import follow


class Handle:
    """What Job and ArrayJob share: one run, seen from this process."""

    run: Run
    bind: Callable[[Any], None] | None = None
    """Called with the values when somebody asks for the result: a cell magic binds the names of ``--out`` by it."""

    def _attach(self, run: Run) -> None:
        self.run = run
        run.handle = self

    def _here(self) -> None:
        """Have the job followed in this process, if it came here by a fork: no thread did."""
        if self.run.pid != os.getpid():
            self.run.pid, self.run.lock = os.getpid(), threading.RLock()  # the parent's may be held for ever
            self._renew()
            if not self.run.row.state.final:
                follow(self.run)

    def _renew(self) -> None:
        raise NotImplementedError

    def _late(self, timeout: float | None) -> str:
        """Return what to say to who has waited in vain."""
        row = self.row()
        reason = f" ({row.reason})" if row.reason else ""
        progress = self.run.progress
        ended = f", {progress.done + progress.failed} of its {row.tasks} tasks have ended" if row.array else ""
        return (
            f"job {row.id} ({row.name}) has not ended within {timeout:g} s: it is {row.state}{reason} on pool "
            f"{row.pool!r}{ended}; it goes on: ask again with more time, see its logs(), or cancel() it"
        )

    async def _settled(self) -> None:
        """Wait for the end; nothing is loaded, and whoever stops waiting cancels nothing."""
        import asyncio

        loop, settled = asyncio.get_running_loop(), asyncio.Event()

        def tell(run: Run) -> None:
            if run.settled:
                with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop was closed
                    loop.call_soon_threadsafe(settled.set)

        self._here()
        self.run.listeners.append(tell)
        try:
            tell(self.run)
            await settled.wait()
        finally:
            self.run.listeners.remove(tell)

    @property
    def id(self) -> str:
        """The job's own id."""
        return self.run.row.id

    @property
    def name(self) -> str:
        """Readable name."""
        return self.run.row.name

    @property
    def pool(self) -> str:
        """Name of its pool."""
        return self.run.row.pool

    @property
    def native_id(self) -> str:
        """The scheduler's id; empty until it is submitted."""
        return self.row().native_id

    @property
    def state(self) -> JobState:
        """State now."""
        return self.row().state

    @property
    def cause(self) -> Cause | None:
        """Why it ended badly, if it did."""
        return self.row().cause

    @property
    def reason(self) -> str:
        """Why it waits or how it ended, in words."""
        return self.row().reason

    @property
    def spec(self) -> JobSpec:
        """What was asked for."""
        return self.run.spec

    @property
    def script(self) -> str:
        """Exactly what the scheduler got; the first of several submissions, which differ in their first batch only."""
        attempts = self.run.folder.attempts()
        return (self.run.folder / f"script.{attempts[-1].first}.sh").read_text() if attempts else ""

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.run.folder.path

    def row(self) -> JobRow:
        """Return its row in the Store."""
        run = self.run
        if not run.row.state.final:
            with contextlib.suppress(JobNotFound):  # the Store was deleted: its tracker makes the row anew
                row = default_store().job(run.row.id)
                if not run.row.state.final:  # ended meanwhile: the tracker knows better
                    run.row = row
        return run.row

    def cancel(self) -> bool:
        """Cancel it, waiting or running; ``False`` if it had ended already."""
        return launch.cancel(self.run)

    def why(self) -> list[str]:
        """Return why a cached result was not used: what changed since the most similar earlier job."""
        return why(self.run)

    def _ipython_display_(self) -> None:
        from . import widgets

        widgets.show(cast("Job | ArrayJob", self))

    def efficiency(self) -> dict[str, float | None]:
        """Return the shares of the requested cpu time and memory that were used (0 to 1, or ``None`` if unknown)."""
        row, attempts = self.row(), self.run.progress.attempts
        known = self.run.progress.batches
        cpu = memory = None
        if row.cpu_seconds is not None:
            total = sum(
                (batch.ended - batch.started) * attempt.resources.total_cpus
                for attempt in attempts
                for number in range(attempt.first, attempt.first + attempt.batches)
                if (batch := known.get(number)) is not None and batch.started and batch.ended
            )
            # The worker's own start counts as cpu time, but not as time that the batch took.
            cpu = min(1.0, row.cpu_seconds / total) if total > 0 else None
        if row.peak_memory is not None and attempts and attempts[-1].resources.memory:
            memory = row.peak_memory / attempts[-1].resources.memory
        return {"cpu": cpu, "memory": memory}


class Job(Handle, concurrent.futures.Future):  # type: ignore[type-arg]
    """One job: a :class:`concurrent.futures.Future` that outlives the process, and can be awaited.

    ``result()`` waits, then loads the value from the run folder, or raises what the job raised, with the node's
    traceback as its cause.

    Attributes
    ----------
    id, native_id : str
        Its own id, and the scheduler's once it is submitted.
    state : JobState
        State now.
    cause : Cause or None
        Why it ended badly.
    """

    def __init__(self, run: Run) -> None:
        concurrent.futures.Future.__init__(self)
        self._attach(run)
        self._loaded: tuple[bool, Any] | None = None
        run.listeners.append(self._settle)
        self._settle(run)

    def _settle(self, run: Run) -> None:
        """Resolve the future once the end is known; the value is loaded when somebody asks for it."""
        if not run.settled:
            return
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if run.row.state is JobState.CANCELLED and not run.progress.complete:
                if concurrent.futures.Future.cancel(self):
                    with self._condition:  # told by several threads, or several times
                        if self._state == "CANCELLED":
                            self.set_running_or_notify_cancel()
            elif not concurrent.futures.Future.done(self):
                self.set_result(None)

    def _renew(self) -> None:
        self._condition = threading.Condition()

    def done(self) -> bool:
        """Return whether it has ended."""
        self._settle(self.run)
        return concurrent.futures.Future.done(self)

    def running(self) -> bool:
        """Return whether it runs now."""
        return self.state is JobState.RUNNING

    def result(self, timeout: float | None = None) -> Any:
        """Return the value, waiting up to `timeout` seconds for it.

        A cell's value is that of its single ``--out`` name, or a mapping of several names to values.

        Raises
        ------
        TimeoutError
            It has not ended in time.
        concurrent.futures.CancelledError
            It was cancelled.
        JobFailed, ResultLost
            It ended without a result; the message says why and what to do.
        Exception
            What the job raised, with the node's traceback as ``__cause__``.
        """
        self._wait(timeout)
        value = self._load()
        if self.bind is not None:
            self.bind(value)
        return value

    def _wait(self, timeout: float | None) -> None:
        self._here()
        self._settle(self.run)  # the state may be known a moment before the tracker says so
        try:
            concurrent.futures.Future.result(self, timeout)
        except concurrent.futures.TimeoutError:
            raise concurrent.futures.TimeoutError(self._late(timeout)) from None
        except concurrent.futures.CancelledError:
            text = f"job {self.id} ({self.name}) was cancelled; retry() runs it again"
            raise concurrent.futures.CancelledError(text) from None

    def _load(self) -> Any:
        if self._loaded is None:
            self._loaded = (True, results.load_task(self.run, 0))
        return self._loaded[1]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what :meth:`result` would raise, or ``None``."""
        self._wait(timeout)
        try:
            self._load()
        except Exception as error:  # noqa: BLE001  handed on as a value
            return error
        return None

    def logs(self) -> str:
        """Return its log so far."""
        return _log(self.run, self.run.progress.batch_of(0))

    def outputs(self) -> Outputs:
        """Return what the cell has displayed so far, as nbformat outputs."""
        return outputs(self.run)

    def retry(self, **resources: Any) -> Job:
        """Run it again if it has no intact result, with other resources if given (``memory="16G"``)."""
        launch.retry(self.run, **resources)
        with self._condition:
            self._state = "PENDING"
        self._loaded = None
        self._settle(self.run)
        return self

    def __await__(self) -> Generator[Any, None, Any]:
        return self._awaited().__await__()

    async def _awaited(self) -> Any:
        import asyncio

        await self._settled()
        return await asyncio.to_thread(self.result)  # loading may take long

    def __repr__(self) -> str:
        return _repr(self)


class Task:
    """One task of an ArrayJob."""

    def __init__(self, array: ArrayJob, index: int) -> None:
        self.array, self.index = array, index

    @property
    def state(self) -> JobState:
        """State now."""
        return self._end()[0]

    @property
    def cause(self) -> Cause | None:
        """Why it ended badly, if it did."""
        return self._end()[1]

    @property
    def reason(self) -> str:
        """How it ended, in words; the last line of the traceback of one that raised."""
        return self._end()[2]

    @property
    def seconds(self) -> float | None:
        """How long it ran."""
        result = self._result()
        return result.seconds if result else None

    def _result(self) -> TaskResult | None:
        return self.array.run.progress.results.get(self.index)

    def _end(self) -> tuple[JobState, Cause | None, str]:
        return results.end_of(self.array.run, self.index)

    def done(self) -> bool:
        """Return whether it has ended."""
        return self.state.final

    def result(self, timeout: float | None = None) -> Any:
        """Return its value, waiting up to `timeout` seconds; raises as :meth:`Job.result` does."""
        self.array.wait_for(self.done, timeout)
        return results.load_task(self.array.run, self.index)

    def logs(self) -> str:
        """Return what it wrote to the log of its batch."""
        run = self.array.run
        result = self._result()
        text = _log(run, run.progress.batch_of(self.index), result.log if result else None)
        return text if result is None or result.log else ""

    def outputs(self) -> Outputs:
        """Return what the cell displayed for this task, as nbformat outputs."""
        return outputs(self.array.run, self.index)

    def __repr__(self) -> str:
        return f"<Task {self.index} of job {self.array.id}: {self.state}>"


class ArrayJob(Handle, Sequence[Task]):
    """One submission of many tasks. ``arr[i]`` is a :class:`Task`; it can be awaited for all results."""

    def __init__(self, run: Run) -> None:
        self._attach(run)
        self._news = threading.Condition()
        run.listeners.append(self._notify)

    def _renew(self) -> None:
        self._news = threading.Condition()

    def _notify(self, run: Run) -> None:
        with self._news:
            self._news.notify_all()

    def wait_for(self, ready: Callable[[], bool], timeout: float | None) -> None:
        """Wait until something holds, looking whenever there is news of the job."""
        self._here()
        with self._news:
            if not self._news.wait_for(ready, timeout):
                raise TimeoutError(self._late(timeout))

    def __len__(self) -> int:
        return self.run.spec.tasks

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [Task(self, i) for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"job {self.id} has tasks 0 to {len(self) - 1}, not {index}")
        return Task(self, position)

    def done(self) -> bool:
        """Return whether every task has ended."""
        return self.run.settled

    @property
    def states(self) -> Counter[JobState]:
        """Number of tasks in each state."""
        run = self.run
        run.refresh()
        row = self.row()
        marks = run.progress.marks
        counts = Counter({JobState.COMPLETED: marks.count(DONE), JobState.FAILED: marks.count(FAILED)})
        if row.state.final:
            lost = results.lost(run)
            counts.update(loss.state for loss in lost.values())
            counts[row.state] += len(marks) - counts.total()
        else:
            counts[JobState.RUNNING] = marks.count(RUNNING)
            counts[JobState.PENDING if row.state is JobState.RUNNING else row.state] += len(marks) - counts.total()
        return +counts

    @property
    def failed(self) -> list[Task]:
        """The tasks that ended without a result."""
        lost = results.lost(self.run)
        marks = self.run.progress.marks
        final = self.row().state.final
        return [
            Task(self, i) for i, mark in enumerate(marks) if mark == FAILED or (final and (i in lost or mark != DONE))
        ]

    def wait(self, timeout: float | None = None) -> ArrayJob:
        """Wait until every task has ended, up to `timeout` seconds."""
        self.wait_for(self.done, timeout)
        return self

    def results(self, timeout: float | None = None, errors: str = "raise") -> list[Any]:
        """Return the values of all tasks in order, waiting up to `timeout` seconds.

        Parameters
        ----------
        timeout : float, optional
            Seconds.
        errors : {"raise", "skip", "return"}
            Raise the first failed task's exception, leave failed tasks out, or return exceptions in their places.
        """
        if errors not in ("raise", "skip", "return"):
            raise ValueError(f"errors={errors!r} is none of 'raise', 'skip', 'return'")
        self.wait(timeout)
        values: dict[int, Any] = {}
        for task, good, value in results.load_all(self.run):
            if not good and errors == "raise":
                results.load_task(self.run, min(t.index for t in self.failed) if self.failed else task)
                raise value
            if good or errors == "return":
                values[task] = value
        found = [values[task] for task in sorted(values)]
        if self.bind is not None and errors == "raise":
            self.bind(found)
        return found

    result = results

    def as_completed(self, timeout: float | None = None) -> Iterator[Task]:
        """Yield tasks as they end, those that have ended already first."""
        deadline = None if timeout is None else time.monotonic() + timeout
        progress = self.run.progress
        position, given = 0, set[int]()
        while len(given) < len(self):
            for task in progress.ended_since(position):
                position += 1
                if task not in given and progress.marks[task] in (DONE, FAILED):  # not one that runs again
                    given.add(task)
                    yield Task(self, task)
            if len(given) == len(self) or self.run.row.state.final:
                break
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            start = position
            self.wait_for(lambda: bool(progress.ended_since(start)) or self.run.row.state.final, left)  # noqa: B023
        for task in range(len(self)):
            if task not in given:
                yield Task(self, task)

    def logs(self) -> str:
        """Return the logs of all its batches."""
        batches = {b for each in self.run.folder.attempts() for b in range(each.first, each.first + each.batches)}
        texts = ((batch, _log(self.run, batch)) for batch in sorted(batches))
        return "\n".join(f"--- batch {batch}\n{text}" for batch, text in texts if text)

    def outputs(self) -> Outputs:
        """Return what its cells have displayed so far, as nbformat outputs."""
        return outputs(self.run)

    def retry(self, **resources: Any) -> ArrayJob:
        """Run again only what has no intact result, with other resources if given (``memory="16G"``)."""
        launch.retry(self.run, **resources)
        return self

    def to_delayed(self, errors: str = "raise") -> list[Any]:
        """Return a :class:`dask.delayed.Delayed` of each task's value; see :mod:`jupyter_hybrid.aggregate`."""
        from . import aggregate

        delayed: list[Any] = aggregate.to_delayed(self, errors)
        return delayed

    def to_bag(self, errors: str = "raise") -> Any:
        """Return a :class:`dask.bag.Bag` of the values, a partition for each result file."""
        from . import aggregate

        return aggregate.to_bag(self, errors)

    def to_dataframe(self, errors: str = "raise") -> Any:
        """Return a :class:`dask.dataframe.DataFrame`: a row for each task, or the tasks' own data frames in a row."""
        from . import aggregate

        return aggregate.to_dataframe(self, errors)

    def to_dask_array(self, errors: str = "raise") -> Any:
        """Return a :class:`dask.array.Array`: the tasks' arrays or numbers, stacked along a new first axis."""
        from . import aggregate

        return aggregate.to_dask_array(self, errors)

    def reduce(self, fn: Callable[[Any, Any], Any], initial: Any = ..., errors: str = "raise") -> Any:
        """Return all values reduced by `fn` in a tree, where they lie."""
        from . import aggregate

        return aggregate.reduce(self, fn, initial, errors)

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self._all().__await__()

    async def _all(self) -> list[Any]:
        import asyncio

        await self._settled()
        return await asyncio.to_thread(self.results)

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {state}" for state, number in self.states.items())
        return f"<ArrayJob {self.id} {self.name!r} on {self.pool!r}: {counts}>"


def _repr(job: Job) -> str:
    cause = f" ({job.cause})" if job.cause else ""
    return f"<Job {job.id} {job.name!r} on {job.pool!r}: {job.state}{cause}>"


def _log(run: Run, batch: int | None, span: tuple[int, int] | None = None) -> str:
    if batch is None:
        return ""
    try:
        with open(run.folder.log(batch), "rb") as file:
            if span is not None:
                file.seek(span[0])
            return file.read(-1 if span is None else span[1] - span[0]).decode(errors="replace")
    except FileNotFoundError:
        return ""


class Outputs(list[dict[str, Any]]):
    """Outputs in nbformat's form; a notebook shows them as they were shown on the node."""

    def _ipython_display_(self) -> None:
        from . import widgets

        widgets.replay(self)


def outputs(run: Run, task: int | None = None) -> Outputs:
    """Return the nbformat outputs that a cell has displayed so far, in order (of one task, or of all)."""
    found = Outputs()
    for path in sorted((run.folder.path / "outputs").glob("*.jsonl"), key=lambda path: int(path.stem)):
        data = path.read_bytes()
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            with contextlib.suppress(ValueError):  # a line that a full disk has cut short
                event = json.loads(line)
                if task is None or event["task"] == task:
                    found.append(event["output"])
    return found


def wrap(run: Run) -> Job | ArrayJob:
    """Return the handle of a run, the same one for all who ask in this process."""
    if isinstance(run.handle, (Job, ArrayJob)):
        return run.handle
    return ArrayJob(run) if run.spec.array else Job(run)


def job(job_id: str) -> Job | ArrayJob:
    """Return any job by its id, or by the beginning of it, from any kernel, server or shell.

    Raises
    ------
    JobNotFound
        None, or more than one, has this id.
    """
    return wrap(launch.load_run(job_id))


def why(run: Run) -> list[str]:
    """Return why a cached result was not used, one sentence for each thing that changed."""
    from . import fingerprint

    row = run.row
    if not run.spec.keys:
        return [f"job {row.id} was not submitted with cache=True (--cache)"]
    reused = launch.reused_tasks(run)
    if reused == row.tasks:
        return ["nothing changed: all results were reused"]
    found = []
    for other in default_store().jobs(function=row.function, limit=50):
        if other.created < row.created and other.id != row.id:
            with contextlib.suppress(HybridError):
                spec = RunFolder(Path(other.folder)).spec
                if spec.keys:
                    found.append((fingerprint.explain(spec.keys, run.spec.keys), other))
    if not found:
        return ["no earlier job ran this function with cache=True"]
    changes, other = min(found, key=lambda pair: len(pair[0]))
    text = f"{reused} of {row.tasks} results were reused" if reused else f"compared with job {other.id}"
    if not changes:
        new = row.tasks - reused
        return [f"{text}: nothing but the arguments changed, {new} of them had no result yet"]
    return [f"{text}: {change}" for change in changes]
