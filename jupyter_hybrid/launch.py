"""From an intent to a run: writes the run folder, then the Store, then wakes the Tracker. Nothing here waits."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import frames
from .backends.base import Submission
from .errors import ConfigError, HybridError, JobNotFound, StoreError
from .index import index_job
from .pool import Pool, default_store, get_pool
from .progress import DONE, Progress
from .run import Run, run_of
from .script import render
from .spec import JobSpec, JobState, Resources, new_id
from .storage import Attempt, RunFolder, ranges, sync_folder
from .tracker import follow

log = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide whether a pickle can be read."""
    found = {"python": "{}.{}.{}".format(*sys.version_info)}
    for name in ("cloudpickle", "numpy", "pandas"):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(getattr(module, "__version__", ""))
    return found


def launch(
    pool: Pool,
    *,
    kind: str,
    name: str,
    payload: Sequence[Any] | bytes,
    items: Sequence[Sequence[Any]] | None,
    resources: Resources,
    batch: int = 1,
    after: Sequence[str] = (),
    out: Sequence[str] = (),
    origin: Mapping[str, Any] | None = None,
    keys: Mapping[str, str] | None = None,
    task_keys: Sequence[str] = (),
    arguments: Sequence[str] = (),
    directory: str | None = None,
) -> Run:
    """Write down a job and have it submitted.

    Parameters
    ----------
    pool : Pool
        Where it runs.
    kind : {"function", "cell", "script"}
        What the payload is.
    name : str
        What a person reads.
    payload : list of bytes-like, or bytes
        Frames of the function or cell, or the script's text.
    items : list of frames, optional
        Each task's own arguments; ``None`` for a plain job.
    resources : Resources
        What each batch asks for.
    batch : int
        Tasks in a batch; 0 for automatic batches.
    after : sequence of str
        Ids of jobs that must complete first.
    out : sequence of str
        Names that a cell gives back.
    origin, keys : mapping, optional
        See :class:`JobSpec`.
    task_keys : sequence of str
        Cache key of each task; with keys, tasks that have run before are not run again.
    arguments : sequence of str
        A script's command-line arguments.
    directory : str, optional
        Working directory on the node; the current one if not given.

    Raises
    ------
    StoreError
        Storage or Store cannot be written; nothing was submitted.
    """
    store = default_store()
    for job_id in after:
        store.job(job_id)
    tasks = 1 if items is None else len(items)
    spec = make_spec(
        pool, kind=kind, name=name, tasks=tasks, array=items is not None, resources=resources, batch=batch,
        after=after, out=out, origin=origin, keys=keys, arguments=arguments, directory=directory,
    )  # fmt: skip
    with pool.storage.create(spec) as folder:
        if isinstance(payload, bytes):
            folder.write("payload.sh", payload, 0o700)
        else:
            frames.write_file(folder / "payload.bin", [(0, frames.PAYLOAD, payload)], portable=True)
        if items is not None:
            records = ((task, frames.VALUE, item) for task, item in enumerate(items))
            frames.write_file(folder / "items.bin", records, portable=True)
        reused: dict[int, Any] = {}
        if task_keys:
            folder.write("keys.json", json.dumps(list(task_keys)).encode())
            reused = _reuse(folder, task_keys)
            folder.write("reused.json", json.dumps(reused).encode())
        to_run = [task for task in range(tasks) if task not in reused]
        attempt = pool.plan(store, 1, 0, ranges(to_run), batch, resources) if to_run else None
        if attempt is not None:
            _draft_attempt(pool, folder, spec, attempt)
    try:
        # Reused results, too: from now on this job keeps them, whatever becomes of the earlier one.
        store.add_job(spec, folder.path, attempt, len(reused), {key: task for task, key in enumerate(task_keys)})
    except BaseException:
        folder.remove()
        raise
    if attempt is not None:
        folder.adopt(attempt.number)
    run = run_of(store.job(spec.id))
    run.refresh()
    if attempt is not None:
        follow(run, pool)
    return run


def make_spec(
    pool: Pool,
    *,
    kind: str,
    name: str,
    tasks: int,
    array: bool,
    resources: Resources,
    batch: int = 1,
    after: Sequence[str] = (),
    out: Sequence[str] = (),
    origin: Mapping[str, Any] | None = None,
    keys: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    directory: str | None = None,
) -> JobSpec:
    """Return the specification of a new job; see :func:`launch`."""
    return JobSpec(
        id=new_id(),
        name=name.encode(errors="replace").decode(),  # schedulers and databases take UTF-8 only
        pool=pool.name,
        kind=kind,
        tasks=tasks,
        array=array,
        batch=batch,
        resources=resources,
        created=time.time(),
        after=tuple(after),
        out=tuple(out),
        origin={
            "directory": os.getcwd(),
            "user": _user(),
            "host": os.uname().nodename,
            **notebook_cell(),
            **(origin or {}),
        },
        keys=dict(keys or {}),
        versions=versions(),
        settings=pool.settings(directory or os.getcwd(), tuple(arguments)),
    )


def notebook_cell() -> dict[str, str]:
    """Return the notebook and the id of the cell that run now, as far as the front end tells."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return {}
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    notebook = shell.user_ns.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME") or ""
    return {"notebook": str(notebook), "cell": str((parent.get("metadata") or {}).get("cellId") or "")}


def preview(pool: Pool, spec: JobSpec) -> list[tuple[Submission, str]]:
    """Return what launch would have submitted for a job: each submission with its script.

    No job is written down. The number of batches comes from the pool's capacity, which is asked for and shared if the
    last answer is old; the worker that the scripts start is put on the storage if it is not there.
    """
    attempt = pool.plan(default_store(), 1, 0, ((0, spec.tasks),), spec.batch, spec.resources)
    folder = pool.storage.root / spec.id
    return [
        (
            Submission(
                tag=f"{spec.id}.1.{chunk}",
                name=spec.name,
                script=folder / f"script.{first}.sh",
                logs=folder / "logs",
                first=first,
                count=attempt.chunks[chunk],
                array=attempt.batches > 1,
                resources=spec.resources,
            ),
            text,
        )
        for chunk, (first, text) in enumerate(_scripts(pool, folder, spec, attempt))
    ]


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _draft_attempt(pool: Pool, folder: RunFolder, spec: JobSpec, attempt: Attempt) -> None:
    for first, text in _scripts(pool, folder.path, spec, attempt):
        folder.write(f"script.{first}.sh", os.fsencode(text), 0o700)
    folder.draft(attempt)


def _scripts(pool: Pool, folder: Path, spec: JobSpec, attempt: Attempt) -> Iterator[tuple[int, str]]:
    for chunk in range(len(attempt.chunks)):
        first = attempt.chunk_first(chunk)
        variable, array = pool.backend.index_variable, attempt.batches > 1
        worker = pool.storage.worker
        yield first, render(spec, folder, worker, attempt.number, first, variable, array, attempt.pull)


def _reuse(folder: RunFolder, task_keys: Sequence[str]) -> dict[int, Any]:
    """Link the result files of tasks that have run before into a new run folder; return where each result is.

    A hard link keeps the result though the earlier job is cleaned up; a copy is made where links cannot be.
    """
    store = default_store()
    earlier: dict[str, Progress | None] = {}
    linked: dict[str, str] = {}
    reused: dict[int, Any] = {}
    found = store.cached(task_keys)
    for task, key in enumerate(task_keys):
        if key not in found:
            continue
        job_id, source = found[key]
        if job_id not in earlier:
            earlier[job_id] = _progress_of(job_id)
        progress = earlier[job_id]
        if progress is None or progress.marks[source] != DONE:
            continue
        result = progress.results[source]
        try:
            path = progress.verify(source)
            if path not in linked:
                name = f"reused-{len(linked)}.bin"
                _link(path, folder.path / "results" / name)
                linked[path] = name
        except (frames.FrameError, OSError):
            continue  # lost since: it runs again
        entry = result.entry
        reused[task] = (linked[path], entry.task, entry.offset, entry.length, entry.checksum, result.seconds)
    return reused


def _link(source: str, target: Path) -> None:
    if not source.endswith(".bin"):
        try:
            shutil.copyfile(source, target)  # still being written
            return
        except FileNotFoundError:
            source = f"{os.path.splitext(source)[0]}.bin"  # has just been renamed
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _progress_of(job_id: str) -> Progress | None:
    try:
        progress = Progress(RunFolder(Path(default_store().job(job_id).folder)))
        progress.refresh()
    except (HybridError, OSError):
        return None
    return progress


def missing_tasks(run: Run) -> list[int]:
    """Return the tasks of a job without an intact result: not run, failed, or with a damaged or missing file."""
    run.refresh()
    progress = run.progress
    missing = []
    for task in range(progress.total):
        if progress.marks[task] == DONE:
            try:
                progress.verify(task)
            except frames.FrameError:
                missing.append(task)
        else:
            missing.append(task)
    return missing


def retry(run: Run, *, everything: bool = False, **resources: Any) -> int:
    """Run again what has no intact result, with other resources if given; return the number of those tasks.

    With `everything` all tasks run again.

    Raises
    ------
    HybridError
        The job has not ended yet.
    """
    store = default_store()
    run.row = store.job(run.row.id)
    if not run.row.state.final:
        raise HybridError(
            f"job {run.row.id} is {run.row.state}; retry() is for jobs that have ended (cancel() ends it)"
        )
    missing = list(range(run.progress.total)) if everything else missing_tasks(run)
    if not missing:
        return 0
    pool = _pool_of(run)
    with run.folder.submitting() as lock:
        if lock is None or store.job(run.row.id).attempt != run.row.attempt:
            raise HybridError(f"job {run.row.id} is being retried by another process")
        if not (run.folder / "spec.json").exists():
            raise JobNotFound(f"job {run.row.id}: its run folder {run.folder.path} was removed")
        attempts = run.folder.attempts()
        number = len(attempts) + 1
        first = attempts[-1].first + attempts[-1].batches if attempts else 0
        base = attempts[-1].resources if attempts else run.spec.resources
        asked = Resources.parse(base, **resources)
        attempt = pool.plan(store, number, first, ranges(missing), run.spec.batch, asked)
        _draft_attempt(pool, run.folder, run.spec, attempt)
        sync_folder(run.folder.path)
        store.add_attempt(run.row.id, run.row.pool, attempt)
        run.folder.adopt(number)
    run.refresh()
    run.verdict, run.batches = None, {}
    run.row = store.job(run.row.id)  # last: until then the tracker takes the round before for ended
    follow(run, pool)
    return len(missing)


def cancel(run: Run) -> bool:
    """Ask that a job be cancelled; return ``False`` if it had ended already."""
    store = default_store()
    run.row = store.job(run.row.id)
    if run.row.state.final:
        return False
    pool = _pool_of(run)
    try:
        run.folder.write(f"cancelled-{run.row.attempt}", b"")
    except OSError as error:
        raise StoreError(f"job {run.row.id} cannot be cancelled: {run.folder.path}: {error.strerror}") from error
    store.update_job(run.row.id, run.row.attempt, reason="being cancelled")
    run.cancel_asked = True
    follow(run, pool)
    return True


def _pool_of(run: Run) -> Pool:
    row = run.row
    try:
        return get_pool(row.pool)
    except ConfigError as error:
        hand = f", or cancel {row.native_id} at its scheduler by hand" if row.native_id and not row.state.final else ""
        raise ConfigError(
            f"job {row.id} is {row.state}, and its pool {row.pool!r} is not in the configuration any more: "
            f"put it back{hand} ({error})"
        ) from error


def hold(run: Run, held: bool = True) -> None:
    """Keep a job that waits at its scheduler from starting, or let it start again.

    Raises
    ------
    HybridError
        It does not wait there.
    PoolUnreachable
        The scheduler does not answer.
    """
    store = default_store()
    run.row = row = store.job(run.row.id)
    if row.state is not JobState.PENDING:
        said = "has not been handed to its scheduler yet" if row.state is JobState.NEW else f"is {row.state}"
        raise HybridError(f"job {row.id} {said}; only jobs that wait in the queue can be held and released")
    backend = _pool_of(run).backend
    for submission in store.submissions(row.id, row.attempt):
        if submission.state == "submitted":
            (backend.hold if held else backend.release)(submission.native_id)
    # At once for all who look; the scheduler's own words come with its next answer.
    store.update_job(row.id, row.attempt, reason="held by its user" if held else "")
    follow(run)


def load_run(job_id: str) -> Run:
    """Return the run of any job, from any process; an unfinished one is followed from now on."""
    row = default_store().job(job_id)
    folder = RunFolder(Path(row.folder))
    if not (folder / "spec.json").exists():
        raise JobNotFound(f"job {row.id}: its run folder {folder.path} was removed")
    run = run_of(row)
    run.refresh()
    run.batches = run.batches or default_store().batches(row.id)
    if not row.state.final:
        follow(run, _pool_of(run))
    return run


def reindex() -> int:
    """Build the Store anew from the run folders of all pools; return the number of jobs found.

    A job counts from the moment its row is in the Store; until then its first round is a draft. Who was killed before
    that never got an answer from ``submit()`` (or ``retry()``), and what it left never runs.
    """
    from .config import load

    store, found = default_store(), 0
    for name in load().pools:
        pool = get_pool(name)
        folders = []
        for folder in pool.storage.folders():
            try:
                if folder.spec.pool == name:
                    folders.append(folder)
            except HybridError as error:  # noqa: PERF203  one by one is the point
                log.warning("%s is no run folder that can be read: %s", folder.path, error)
        for folder in sorted(folders, key=lambda folder: folder.spec.created):  # the newest has the last word on a key
            try:
                found += index_job(store, folder)
            except (HybridError, KeyError, TypeError, ValueError) as error:  # noqa: PERF203
                log.warning("%s is no run folder that can be read: %s", folder.path, error)
    store.close()
    return found


def reused_tasks(run: Run) -> int:
    """Return how many tasks of a job have taken their results from earlier jobs."""
    path = run.folder / "reused.json"
    return len(run.folder.read_json("reused.json")) if path.exists() else 0
