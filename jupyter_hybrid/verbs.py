"""The verbs of ``jupyter hybrid`` that look at jobs and act on them; they call the package and show its answer."""

from __future__ import annotations

import concurrent.futures
import json
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import config, launch, listing
from .cli import RESOURCES
from .errors import HybridError, PoolUnreachable, RemoteError
from .handles import ArrayJob, Job, job
from .listing import JOB_COLUMNS, Table, duration, job_line, parse_states
from .pool import default_store, get_pool
from .progress import RUNNING
from .run import Run
from .spec import JobState, parse_time
from .store import JobRow
from .terminal import job_json, line, note, print_json, print_text, when
from .tracker import tracker, watch_all

_ANSWER = 5.0
"""Seconds that a scheduler is given to answer before the list of jobs is shown as it is known."""
_DELIVER = 30.0
"""Seconds that a scheduler is given to take a job or to end one."""


def jobs(arguments: Namespace) -> int:
    """List jobs, brought up to date as far as their schedulers answer."""
    states = parse_states(arguments.state)
    if arguments.pool is not None:
        config.load().pool(arguments.pool)
    line.show("asking the pools …")
    unanswered = bring_up_to_date()
    store = default_store()
    chosen = {"states": states, "pool": arguments.pool, "name": arguments.name}
    rows = store.jobs(**chosen, limit=-1 if arguments.all else arguments.limit)
    if arguments.json:
        since = {name: store.pool(name).unreachable_since for name in {row.pool for row in rows}}
        print_json([{**job_json(row), "pool_unreachable_since": since[row.pool]} for row in rows])
    else:
        print_text(repr(Table(map(job_line, rows), JOB_COLUMNS, "no jobs")))
        total = sum(store.count(**chosen).values())
        if total > len(rows):
            note(f"{len(rows)} of {total} jobs; --all shows all")
    for name in unanswered:
        row = store.pool(name)
        note(f"pool {name!r} is unreachable since {when(row.unreachable_since or 0)}: {row.error}")
    return 0


def bring_up_to_date() -> list[str]:
    """Bring states up to date, for a bounded time; return the pools with unfinished jobs that do not answer."""
    asked = time.time()
    watch_all(_ANSWER)
    store, unanswered = default_store(), []
    for name in config.load().pools:
        if not store.active(name):
            continue
        if not tracker.pool(get_pool(name)).stepped.is_set() and store.pool(name).unreachable_since is None:
            # Its commands take longer than this process lives; the next answer that anybody gets takes it back.
            store.set_pool(name, unreachable_since=asked, error=f"no answer within {_ANSWER:g} s")
        if store.pool(name).unreachable_since is not None:
            unanswered.append(name)
    return unanswered


def pools(arguments: Namespace) -> int:
    """List pools."""
    line.show("asking the pools …")
    table = listing.pools()
    if not arguments.json:
        print_text(repr(table))
        return 0
    store, loaded = default_store(), config.load()
    found = []
    for row in table:
        name, shared = row["name"], store.pool(row["name"])
        found.append(
            {
                "name": name,
                "kind": row["kind"],
                "source": loaded.pools[name].source,
                "price": row["price"],
                "reachable": shared.unreachable_since is None,
                "unreachable_since": shared.unreachable_since,
                "error": shared.error,
                "snapshot": shared.snapshot,
            }
        )
    print_json(found)
    return 0


def script(arguments: Namespace) -> int:
    """Show the script of a job."""
    handle = job(arguments.id)
    text = handle.script
    if arguments.json:
        print_json({"id": handle.id, "script": text})
    elif text:
        print_text(text)
    else:
        note(f"job {handle.id} had nothing to submit: all its results were reused")
    return 0


def why(arguments: Namespace) -> int:
    """Tell why a cached result was not used."""
    handle = job(arguments.id)
    reasons = handle.why()
    if arguments.json:
        print_json({"id": handle.id, "why": reasons})
    else:
        print_text("\n".join(reasons))
    return 0


# --- logs -----------------------------------------------------------------------------------------------------------


def _task(handle: Job | ArrayJob, number: int | None) -> int | None:
    if number is None:
        return None
    if not 0 <= number < handle.spec.tasks:
        raise HybridError(f"job {handle.id} has tasks 0 to {handle.spec.tasks - 1}, not {number}")
    return number


def logs(arguments: Namespace) -> int:
    """Show the log of a job or a task, or follow it."""
    handle = job(arguments.id)
    task = _task(handle, arguments.task)
    if arguments.follow and not arguments.json:
        for text in _follow(handle, task):
            sys.stdout.write(text)
            sys.stdout.flush()
        return 0
    text = handle[task].logs() if isinstance(handle, ArrayJob) and task is not None else handle.logs()
    if arguments.json:
        print_json({"id": handle.id, "task": task, "log": text})
    else:
        sys.stdout.write(text)
    return 0


def _follow(handle: Job | ArrayJob, task: int | None) -> Iterator[str]:
    """Yield what a job, or one of its tasks, writes, until it has ended; a headline where the batch changes."""
    run = handle.run
    positions: dict[int, int] = {}
    last = None
    while True:
        run.refresh()  # before the look at the state: what came before the end is not missed
        ended = handle.state.final
        for batch, begin, end in _spans(run, task):
            start = max(begin, positions.get(batch, 0))
            text, positions[batch] = _read(run.folder.log(batch), start, end)
            if text and isinstance(handle, ArrayJob) and task is None and batch != last:
                yield f"==> batch {batch} <==\n"
            if text:
                last = batch
                yield text
        if ended or (task is not None and task in run.progress.results):
            return
        time.sleep(run.pause())


def _spans(run: Run, task: int | None) -> list[tuple[int, int, int | None]]:
    """Return batch, first byte and end of what is to be shown of each log; no end where it is still written."""
    progress = run.progress
    if task is None and run.spec.array:
        return [(batch, 0, None) for batch in sorted(progress.batches)]
    batch = progress.batch_of(task or 0)
    if batch is None or batch < 0:
        return []
    if task is None or not run.spec.array:
        return [(batch, 0, None)]
    result = progress.results.get(task)
    if result is not None:
        return [(batch, *result.log)] if result.log else []
    if progress.marks[task] != RUNNING:
        return []
    before = [other.log[1] for other in progress.results.values() if other.batch == batch and other.log]
    return [(batch, max(before, default=0), None)]


def _read(path: Path, start: int, end: int | None) -> tuple[str, int]:
    """Return the text between two positions, cut after a whole character, and where it ends."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(-1 if end is None else max(0, end - start))
    except FileNotFoundError:
        return "", start
    whole = len(data)
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] >= 0xC0:  # the first byte of a character that has more
            length = 2 if data[-back] < 0xE0 else 3 if data[-back] < 0xF0 else 4
            whole -= back if length > back and end is None else 0
            break
        if data[-back] < 0x80:
            break
    return data[:whole].decode(errors="replace"), start + whole


# --- acting ---------------------------------------------------------------------------------------------------------


def _until(done: Callable[[], bool], runs: Iterable[Run], timeout: float | None, text: Callable[[], str]) -> bool:
    """Wait until something holds, looking when there is news of a run; return whether it does within the time."""
    news = threading.Event()
    followed = list(runs)

    def tell(run: Run) -> None:
        news.set()

    for run in followed:
        run.listeners.append(tell)
    deadline = None if timeout is None else time.monotonic() + timeout
    while not done():
        left = float("inf") if deadline is None else deadline - time.monotonic()
        if left <= 0:
            return False
        line.show(text())
        news.wait(min(left, *(max(0.02, run.pause()) for run in followed)))
        news.clear()
    return True


def cancel(arguments: Namespace) -> int:
    """Cancel jobs; exit status 1 if a scheduler could not be told."""
    handles = {handle.id: handle for handle in map(job, arguments.ids)}  # all known before the first is cancelled
    store = default_store()
    answers: dict[str, str] = {}
    for handle in handles.values():
        if not handle.cancel():
            answers[handle.id] = f"had ended already: {handle.state}"
    asked = [handle for handle in handles.values() if handle.id not in answers]
    problems: dict[str, str] = {}
    for handle in asked:
        if handle.pool in problems:
            continue
        # The one that tracks the pool may be another process, which asks the scheduler only now and then.
        line.show(f"telling pool {handle.pool} …")
        try:
            for submission in store.submissions(handle.id, handle.row().attempt):
                if submission.state == "submitted":
                    get_pool(handle.pool).backend.cancel(submission.native_id)
        except PoolUnreachable as error:
            problems[handle.pool] = str(error)
    reached = [handle for handle in asked if handle.pool not in problems]
    if reached:
        _until(
            lambda: all(handle.state.final for handle in reached),
            [handle.run for handle in reached],
            _DELIVER,
            lambda: f"{sum(not handle.state.final for handle in reached)} being cancelled …",
        )
    for handle in asked:
        row = handle.row()
        if row.state.final:
            answers[handle.id] = str(row.state)
        elif handle.pool in problems:
            answers[handle.id] = (
                f"pool {handle.pool!r} cannot be reached ({problems[handle.pool]}); the next kernel, server or "
                "'jupyter hybrid track' that reaches it cancels the job"
            )
        else:
            answers[handle.id] = f"the scheduler was told; still {row.state}"
    if arguments.json:
        rows = [(handle.id, handle.row()) for handle in handles.values()]
        print_json([{"id": i, "state": row.state.value, "said": answers[i]} for i, row in rows])
    else:
        print_text("\n".join(f"{job_id}: {answers[job_id]}" for job_id in handles))
    return 1 if problems else 0


def retry(arguments: Namespace) -> int:
    """Run again what has no result; exit status 1 if that is refused."""
    run = launch.load_run(arguments.id)
    wanted = {name: getattr(arguments, name) for name in RESOURCES if getattr(arguments, name) is not None}
    count = launch.retry(run, **wanted)
    store = default_store()

    def row() -> JobRow:
        return store.job(run.row.id)

    if count:
        _until(lambda: row().state is not JobState.NEW, [run], _DELIVER, lambda: "handing it to the scheduler …")
    found = row()
    if arguments.json:
        print_json({**job_json(found), "tasks_run_again": count})
    elif not count:
        print_text(f"{found.id}: nothing to run again, all results are intact")
    elif found.state is JobState.NEW:
        reason = f" ({found.reason})" if found.reason else ""
        later = "the next kernel, server or 'jupyter hybrid track' that reaches the pool submits it"
        print_text(f"{found.id}: not submitted yet{reason}; {later}")
    else:
        what = f"{count} of {found.tasks} tasks" if found.array else "the job"
        native = f" as {found.native_id}" if found.native_id else ""
        reason = f": {found.reason}" if found.state.final and found.reason else ""
        print_text(f"{found.id}: {what} submitted again{native}, {found.state}{reason}")
    return 1 if found.state is JobState.FAILED and found.cause is not None and not found.native_id else 0


def wait(arguments: Namespace) -> int:
    """Wait for the end of jobs; exit status 0 if all have completed."""
    timeout = None if arguments.timeout is None else parse_time(arguments.timeout).total_seconds()
    handles = list({handle.id: handle for handle in map(job, arguments.ids)}.values())
    begun = time.monotonic()

    def progress() -> str:
        rows = [handle.row() for handle in handles]
        states = Counter(str(row.state) for row in rows)
        text = ", ".join(f"{number} {state}" for state, number in states.items())
        tasks = sum(row.tasks for row in rows)
        text += f"; {sum(row.done for row in rows)} of {tasks} tasks" if tasks > len(rows) else ""
        return f"{text}; {duration(time.monotonic() - begun)}"

    ended = _until(
        lambda: all(handle.state.final for handle in handles), [handle.run for handle in handles], timeout, progress
    )
    rows = [handle.row() for handle in handles]
    if arguments.json:
        print_json([job_json(row) for row in rows])
    else:
        for row in rows:
            cause = f", {row.cause}" if row.cause else ""
            reason = f": {row.reason}" if row.reason and row.state is not JobState.COMPLETED else ""
            print_text(f"{row.id} {row.name}: {row.state}{cause}{reason}")
    if not ended:
        note(f"jupyter hybrid: not all have ended within {arguments.timeout}")
    return 0 if all(row.state is JobState.COMPLETED for row in rows) else 1


def result(arguments: Namespace) -> int:
    """Show the result of a job or a task; as JSON also why there is none."""
    handle = job(arguments.id)
    task = _task(handle, arguments.task)
    try:
        text = _result_text(handle, task, arguments.json)
    except HybridError as error:
        if arguments.json:
            cause = handle[task].cause if isinstance(handle, ArrayJob) and task is not None else handle.cause
            print_json({"id": handle.id, "task": task, "error": str(error), "cause": cause})
        raise
    print_text(text)
    return 0


def _result_text(handle: Job | ArrayJob, task: int | None, as_json: bool) -> str:
    # Values may be of the user's own modules, which the job found in its folder.
    sys.path.insert(0, handle.spec.settings.get("directory") or "")
    part: Any = handle[task] if isinstance(handle, ArrayJob) and task is not None else handle
    if not part.done() and not handle.state.final:
        raise HybridError(f"job {handle.id} is {part.state}; jupyter hybrid wait {handle.id}")
    try:
        value = part.result(_DELIVER)
    except concurrent.futures.CancelledError:
        raise HybridError(f"job {handle.id} was cancelled; jupyter hybrid retry {handle.id}") from None
    except HybridError:
        raise
    except Exception as error:  # noqa: BLE001  the user's own, shown as it came
        words = error.__cause__ if isinstance(error.__cause__, RemoteError) else f"{type(error).__name__}: {error}"
        raise HybridError(f"the job raised an exception\n{str(words).strip()}") from None
    if not as_json:
        return repr(value)
    try:
        return json.dumps(value, default=_plain, allow_nan=False, indent=2, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise HybridError(f"JSON cannot hold the result of job {handle.id}: {error}") from None


def _plain(value: Any) -> Any:
    """Return numbers and arrays of numpy and its like as what JSON knows."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, (set, frozenset)):
        return list(value)
    raise TypeError(f"it has a {type(value).__module__}.{type(value).__qualname__}")
