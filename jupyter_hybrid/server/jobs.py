"""One job in detail, read from its run folder: how it stands, its tasks, where its results are. No result is loaded."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HybridError, JobNotFound
from ..frames import FrameError
from ..handles import wrap
from ..launch import load_run
from ..pool import default_store
from ..progress import DONE, FAILED, RUNNING
from ..results import lost
from ..run import Run, run_of
from ..spec import ID_PATTERN, Cause, JobState
from ..storage import RunFolder
from ..store import JobRow
from ..tracker import tracker
from .files import folder_of, opened, read, tree
from .masking import Mask
from .pools import Pools
from .rows import BadRequest, Rows, integer

_KEPT = 8
"""Jobs whose status files are not read anew at each look."""
_SHOWN = 200
"""Batches and groups of failures of the detailed view."""
_LOOKED = 1000
"""Newest jobs that are looked through for checkpoints."""


class Jobs:
    """Answers questions about one job; all methods may be called from any thread.

    Parameters
    ----------
    pools, rows
        What they need of the others.
    root : str
        Folder that the server's file browser shows.
    """

    def __init__(self, pools: Pools, rows: Rows, root: str) -> None:
        self._pools, self._rows = pools, rows
        self._root = Path(os.path.realpath(root))
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._lock = threading.Lock()

    # --- finding ------------------------------------------------------------------------------------------------

    @staticmethod
    def row(job_id: str) -> JobRow:
        """Return the row of a job; its whole id must be given.

        Raises
        ------
        BadRequest
            This is no id.
        JobNotFound
            There is no such job.
        """
        if not ID_PATTERN.fullmatch(job_id):
            raise BadRequest(f"{job_id[:40]!r} is no job id")
        return default_store().job(job_id)

    def run(self, row: JobRow) -> Run:
        """Return a job as this process knows it, with all that its workers have written."""
        folder_of(row)
        run = run_of(row)
        with self._lock:  # so that the next look reads on where this one ends
            self._runs[row.id] = run
            self._runs.move_to_end(row.id)
            while len(self._runs) > _KEPT:
                self._runs.popitem(last=False)
        run.refresh()
        if not run.batches or row.pool not in tracker.holding():
            run.batches = default_store().batches(row.id)
        return run

    def to_act(self, row: JobRow) -> Run:
        """Return a job that something is about to be done with, followed by this process."""
        folder_of(row)
        return load_run(row.id)

    def mask_of(self, run: Run) -> Mask:
        """Return what masks the texts of a job: the values of its own environment, too."""
        environment = run.spec.settings.get("environment")
        return self._pools.mask.with_variables(
            {str(name): str(value) for name, value in environment.items()} if isinstance(environment, Mapping) else {}
        )

    # --- answers ------------------------------------------------------------------------------------------------

    def detail(self, job_id: str) -> dict[str, Any]:
        """Return all that the detailed view shows of a job."""
        row = self.row(job_id)
        shown = self._rows.json(row)
        try:
            run = self.run(row)
        except JobNotFound:
            return {**shown, **_GONE}
        mask, spec = self.mask_of(run), run.spec
        for name in ("name", "reason", "function"):
            shown[name] = mask.text(shown[name])
        with run.lock:
            attempts, known = list(run.progress.attempts), dict(run.progress.batches)
            batches = _batches(run, row)
            failures = _failures(run, mask)
        shares = wrap(run).efficiency()
        resources = attempts[-1].resources if attempts else spec.resources
        beats = [beat for batch in known.values() if (beat := batch.beat or batch.started) is not None]
        starts = [each.estimated_start for each in run.batches.values() if each.estimated_start is not None]
        origin = spec.origin
        return {
            **shown,
            "cost": self._cost(run),
            "folder": str(run.folder.path),
            "folder_browser": self._browsed(run.folder.path),
            "resources": resources.to_json(),
            "used": {
                "cpu_seconds": row.cpu_seconds,
                "peak_memory": row.peak_memory,
                "cpu_efficiency": shares["cpu"],
                "memory_efficiency": shares["memory"],
            },
            "inputs": [str(name) for name in origin.get("inputs", ())],
            "outputs": list(spec.out),
            "origin": {name: str(origin.get(name, "")) for name in ("notebook", "cell", "directory")},
            "checkpoints": _checkpoints(run.folder),
            "batches": batches,
            "last_heartbeat": max(beats, default=None),
            "estimated_start": min(starts, default=None) if not row.state.final else None,
            "after": list(spec.after),
            "attempts": row.attempt,
            "failures": failures,
        }

    def _cost(self, run: Run) -> float | None:
        """Return what the batches of a job have cost so far: for as long as each of them held its place."""
        pool = self._pools.config_of(run.row.pool)
        if pool is None or not (pool.prices.cpu_hour or pool.prices.gpu_hour):
            return None
        total = 0.0
        with run.lock:
            for attempt in run.progress.attempts:
                asked = attempt.resources
                price = asked.total_cpus * pool.prices.cpu_hour + asked.gpus * asked.nodes * pool.prices.gpu_hour
                for number in range(attempt.first, attempt.first + attempt.batches):
                    batch = run.progress.batches.get(number)
                    if batch is not None and batch.started is not None:
                        end = batch.ended or run.row.ended or batch.beat or batch.started
                        total += max(0.0, end - batch.started) / 3600 * price
        return total

    def _browsed(self, folder: Path) -> str | None:
        """Return where the file browser finds a folder; it shows nothing hidden and nothing outside of its root."""
        real = Path(os.path.realpath(folder))
        if not real.is_relative_to(self._root):
            return None
        relative = real.relative_to(self._root)
        return None if any(part.startswith(".") for part in relative.parts) else str(relative)

    def tasks(self, job_id: str, arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return the state of all tasks, a letter each; or tasks by their index or state, in detail."""
        run = self.run(self.row(job_id))
        with run.lock:
            letters, losses = _letters(run)
            total = len(letters)
            if "index" in arguments:
                index = integer(arguments, "index", 0, 0, 2**53)
                if index >= total:
                    raise JobNotFound(f"job {job_id} has tasks 0 to {total - 1}, not {index}")
                chosen = [index]
            elif "state" in arguments:
                letter = arguments["state"]
                if letter not in tuple("wrdflc"):
                    raise BadRequest(f"state={letter[:20]!r}: one of w, r, d, f, l, c")
                offset = integer(arguments, "offset", 0, 0, 2**53)
                limit = integer(arguments, "limit", 100, 1, 1000)
                chosen = [index for index, each in enumerate(letters) if each == letter][offset : offset + limit]
            else:
                return {"total": total, "states": letters}
            mask = self.mask_of(run)
            return {"total": total, "tasks": [_task(run, index, letters[index], losses, mask) for index in chosen]}

    def script(self, job_id: str) -> dict[str, Any]:
        """Return the script that the scheduler got last, with what is secret masked."""
        run = self.run(self.row(job_id))
        attempts = run.progress.attempts
        if not attempts:
            return {"script": ""}
        try:
            text = read(run.folder.path, f"script.{attempts[-1].first}.sh").decode(errors="replace")
        except FileNotFoundError:
            raise JobNotFound(f"job {job_id}: its script is not there any more") from None
        environment = run.spec.settings.get("environment")
        exported = environment if isinstance(environment, Mapping) else {}
        return {"script": self.mask_of(run).script(text, {str(n): str(v) for n, v in exported.items()})}

    def results(self, job_id: str, arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return where the results of tasks are; with ``verify=1`` their checksums are compared."""
        run = self.run(self.row(job_id))
        first = integer(arguments, "cursor", 0, 0, 2**53)
        limit = integer(arguments, "limit", 100, 1, 1000)
        verify = arguments.get("verify", "0") in ("1", "true")
        with run.lock:
            tasks = [task for task in range(first, run.progress.total) if run.progress.marks[task] == DONE]
        found = [_result(run, task, verify) for task in tasks[:limit]]
        return {"results": found, "next": str(tasks[limit]) if len(tasks) > limit else None}

    def checkpoints(self) -> dict[str, Any]:
        """Return the checkpoints of the newest jobs, newest job first."""
        found: list[dict[str, Any]] = []
        for row in default_store().page(limit=_LOOKED):
            with contextlib.suppress(HybridError, OSError):
                found += [{"job": row.id, **each} for each in _checkpoints(RunFolder(folder_of(row)))]
        return {"checkpoints": found}


_GONE: dict[str, Any] = {
    "folder": None,
    "folder_browser": None,
    "resources": {},
    "used": {"cpu_seconds": None, "peak_memory": None, "cpu_efficiency": None, "memory_efficiency": None},
    "inputs": [],
    "outputs": [],
    "origin": {"notebook": "", "cell": "", "directory": ""},
    "checkpoints": [],
    "batches": [],
    "last_heartbeat": None,
    "estimated_start": None,
    "after": [],
    "attempts": 0,
    "failures": [],
}
"""What is known of a job whose run folder was removed."""


def _batches(run: Run, row: JobRow) -> list[dict[str, Any]]:
    submissions = default_store().submissions(row.id, row.attempt)
    shown: list[dict[str, Any]] = []
    for submission in submissions:
        for number in range(submission.first, submission.first + submission.batches)[: _SHOWN - len(shown)]:
            worker, said = run.progress.batches.get(number), run.batches.get(number)
            state = said.state if said is not None else JobState.PENDING
            if worker is not None and worker.why == "done":
                state = JobState.COMPLETED
            elif worker is not None and worker.started is not None and not worker.why and not state.final:
                state = JobState.RUNNING
            host = (worker.host if worker is not None else "") or (said.host if said is not None else "")
            shown.append({"batch": number, "state": state.value, "host": host, "native_id": submission.native_id})
    return shown


def _letters(run: Run) -> tuple[str, dict[int, Any]]:
    """Return a letter for each task, and why tasks of an ended job have no result."""
    letters = bytearray(run.progress.marks.translate(bytes.maketrans(bytes((0, RUNNING, DONE, FAILED)), b"wrdf")))
    losses = lost(run)
    if run.row.state.final:
        plain = ord("c") if run.row.cause is Cause.CANCELLED else ord("l")
        for task, letter in enumerate(letters):
            if letter in b"wr":
                loss = losses.get(task)
                letters[task] = plain if loss is None else ord("c" if loss.cause is Cause.CANCELLED else "l")
    return letters.decode(), losses


_STATE = {"w": JobState.PENDING, "r": JobState.RUNNING, "d": JobState.COMPLETED, "c": JobState.CANCELLED}


def _task(run: Run, index: int, letter: str, losses: Mapping[int, Any], mask: Mask) -> dict[str, Any]:
    result, loss = run.progress.results.get(index), losses.get(index)
    state, cause, reason = _STATE.get(letter, JobState.FAILED), None, ""
    if letter == "f" and result is not None:
        cause, reason = Cause.USER_ERROR, result.error
    elif letter in "lc":
        state, cause, reason = (loss.state, loss.cause, loss.reason) if loss else run.row[5:8]
    batch = run.progress.batch_of(index)
    return {
        "index": index,
        "state": state.value,
        "cause": cause.value if cause else None,
        "reason": mask.text(reason),
        "seconds": result.seconds if result is not None else None,
        "batch": batch if batch is None or batch >= 0 else None,  # reused results have none
    }


def _failures(run: Run, mask: Mask) -> list[dict[str, Any]]:
    """Return the messages with which tasks failed, the most frequent first."""
    letters, losses = _letters(run)
    counts: Counter[str] = Counter()
    first: dict[str, list[int]] = {}
    for index, letter in enumerate(letters):
        if letter in "fl":
            result, loss = run.progress.results.get(index), losses.get(index)
            message = result.error if letter == "f" and result is not None else loss.reason if loss else run.row.reason
            counts[message] += 1
            first.setdefault(message, []).append(index) if counts[message] <= 10 else None
    return [
        {"message": mask.text(message), "count": count, "tasks": first[message]}
        for message, count in counts.most_common(_SHOWN)
    ]


def _checkpoints(folder: RunFolder) -> list[dict[str, Any]]:
    return [{"name": name, "size": size, "modified": when} for name, size, when in tree(folder.path, "checkpoint")]


def _result(run: Run, task: int, verify: bool) -> dict[str, Any]:
    result = run.progress.results[task]
    name = os.path.basename(run.progress.result_path(result))
    intact: bool | None = None
    try:
        with opened(run.folder.path, "results", name) as descriptor:
            status = os.fstat(descriptor)
            if result.entry.offset + result.entry.length > status.st_size or not stat.S_ISREG(status.st_mode):
                intact = False
        if verify and intact is None:
            run.progress.verify(task)
            intact = True
    except (FileNotFoundError, FrameError):
        intact = False
    return {
        "task": task,
        "file": f"results/{name}",
        "size": result.entry.length,
        "checksum": f"{result.entry.checksum:016x}",
        "seconds": result.seconds,
        "intact": intact,
    }
