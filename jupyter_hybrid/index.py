"""From run folders to rows of the Store: the columns that say how a job stands, and a row the Store does not have."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from .progress import Progress, Verdict, judge
from .spec import Cause, JobState
from .storage import RunFolder
from .store import BatchRow, Store


def columns(progress: Progress, observed: Iterable[BatchRow], verdict: Verdict) -> dict[str, Any]:
    """Return the columns of the Store that say how a job stands.

    Parameters
    ----------
    progress : Progress
        What its workers wrote.
    observed : iterable of BatchRow
        What the scheduler last said of its batches.
    verdict : Verdict
        Its state.
    """
    final = verdict.state.final
    batches = [batch for batch in progress.batches.values() if batch.started is not None]
    ends = [batch.ended for batch in batches if batch.ended is not None]
    ends += [result.ended for result in progress.results.values()] if not ends and final else []
    cpu = [batch.cpu_seconds for batch in batches if batch.cpu_seconds is not None]
    memory = [batch.peak_memory for batch in batches if batch.peak_memory is not None]
    cpu = cpu or [row.cpu_seconds for row in observed if row.cpu_seconds is not None]
    memory = memory or [row.peak_memory for row in observed if row.peak_memory is not None]
    return {
        "state": verdict.state,
        "cause": verdict.cause,
        "reason": verdict.reason,
        "done": progress.done,
        "failed": progress.failed + sum(loss.cause is not Cause.CANCELLED for loss in verdict.lost.values()),
        "running": verdict.running,
        "started": min((batch.started for batch in batches if batch.started is not None), default=None),
        "ended": max(ends, default=time.time()) if final else None,
        "cpu_seconds": sum(cpu) if cpu else None,
        "peak_memory": max(memory, default=None),
    }


def keep_end(folder: RunFolder, attempt: int, changes: dict[str, Any], observed: Iterable[BatchRow]) -> None:
    """Write down in the run folder how a round ended that its workers cannot tell: what only the scheduler knew."""
    content = {"columns": changes, "batches": [list(row) for row in observed]}
    folder.write(f"end-{attempt}.json", json.dumps(content).encode())


def index_job(store: Store, folder: RunFolder) -> bool:
    """Add the row of a job, with all that hangs on it, from its run folder; what the Store knows already it keeps.

    Returns ``False`` for a folder with tasks to run and without a round: the Store never had it.
    """
    spec, attempts = folder.spec, folder.attempts()
    reused = len(folder.read_json("reused.json")) if (folder / "reused.json").exists() else 0
    keys = folder.read_json("keys.json") if (folder / "keys.json").exists() else []
    if not attempts and reused < spec.tasks:
        return False
    first = attempts[0] if attempts else None
    store.add_job(spec, folder.path, first, reused, {key: task for task, key in enumerate(keys)})
    for attempt in attempts[1:]:
        store.add_attempt(spec.id, spec.pool, attempt)
    for tag, answer in folder.submissions().items():
        store.set_submission(tag, answer["state"], answer.get("native_id", ""))
    if not attempts:
        return True
    number = attempts[-1].number
    if (folder / f"end-{number}.json").exists():
        end = folder.read_json(f"end-{number}.json")
        rows = [
            BatchRow(row[0], JobState(row[1]), Cause(row[2]) if row[2] else None, *row[3:]) for row in end["batches"]
        ]
        store.set_batches(spec.id, rows)
        changes = end["columns"]
        changes["state"] = JobState(changes["state"])
        store.update_job(spec.id, number, **changes)
        return True
    progress = Progress(folder)
    progress.refresh()
    if progress.complete:
        cancelled = (folder / f"cancelled-{number}").exists()
        store.update_job(spec.id, number, **columns(progress, [], judge(progress, {}, {}, True, cancelled)))
    return True
