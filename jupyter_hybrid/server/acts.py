"""What a request does with a job: cancel, retry, hold, release, remove; and the doctor."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from .. import clean, launch, process
from ..errors import HybridError, ResourceError
from ..pool import default_store
from ..spec import JobState, Resources
from .jobs import Jobs
from .masking import Mask
from .pools import Pools
from .rows import BadRequest, Rows

DOCTOR = 60
"""Seconds that the doctor gives a pool for a job there and back."""


class Conflict(HybridError):
    """The state of the job does not allow this."""


class Acts:
    """Acts on jobs; all methods block, and may be called from any thread."""

    def __init__(self, pools: Pools, jobs: Jobs, rows: Rows) -> None:
        self._pools, self._jobs, self._rows = pools, jobs, rows

    def _answer(self, job_id: str) -> dict[str, Any]:
        return {"job": self._rows.json(default_store().job(job_id))}

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job that has not ended."""
        row = self._jobs.row(job_id)
        if row.state.final or not launch.cancel(self._jobs.to_act(row)):
            raise Conflict(f"job {job_id} had ended already: {default_store().job(job_id).state}")
        return self._answer(job_id)

    def retry(self, job_id: str, everything: bool, resources: Mapping[str, Any]) -> dict[str, Any]:
        """Run again what has no result, or everything, of a job that has ended."""
        row = self._jobs.row(job_id)
        if not row.state.final:
            raise Conflict(f"job {job_id} is {row.state}; only what has ended can be retried (cancel ends it)")
        try:
            Resources.parse(**resources)
            count = launch.retry(self._jobs.to_act(row), everything=everything, **resources)
        except ResourceError as error:
            raise BadRequest(str(error)) from None
        if not count:
            raise Conflict(f"job {job_id}: nothing to run again, all results are intact")
        return self._answer(job_id)

    def hold(self, job_id: str, held: bool) -> dict[str, Any]:
        """Keep a waiting job from starting, or let it start."""
        row = self._jobs.row(job_id)
        if row.state is not JobState.PENDING:
            raise Conflict(f"job {job_id} is {row.state}; only jobs that wait in the queue can be held and released")
        launch.hold(self._jobs.to_act(row), held)
        return self._answer(job_id)

    def remove(self, job_id: str) -> None:
        """Remove an ended job with its run folder."""
        row = self._jobs.row(job_id)
        if os.path.basename(row.folder) != row.id or os.path.islink(row.folder):
            raise Conflict(f"job {job_id}: {row.folder} is not its run folder, and is not removed")
        try:
            (found,) = clean.find([row.id])
            removed = clean.remove(found.row)
        except HybridError as error:
            raise Conflict(str(error)) from error
        if not removed:
            raise Conflict(f"job {job_id} has been retried in the meantime")

    def doctor(self, name: str | None) -> dict[str, Any]:
        """Check one pool, or all, end to end.

        In a process of its own: the doctor runs a job and loads its result, and nothing is unpickled here.
        """
        names = self._pools.names()
        wanted = names if name is None else [name]
        argv = [sys.executable, "-m", "jupyter_hybrid", "doctor", "--json", "--timeout", f"{DOCTOR}s", *wanted]
        done = process.run(argv, timeout=2.0 * DOCTOR * len(wanted))
        try:
            checks = json.loads(done.out)["checks"]
        except ValueError:
            raise HybridError(f"the doctor did not come to its end: {self._pools.mask.text(done.words)}") from None
        return {"checks": [_check(check, self._pools.mask) for check in checks]}


def _check(check: Mapping[str, Any], mask: Mask) -> dict[str, Any]:
    return {
        "pool": check["pool"],
        "check": check["name"],
        "ok": check["status"] != "failure",
        "status": check["status"],
        "message": mask.text(check["text"]),
        "advice": mask.text(check["advice"]),
    }


def wanted(body: Any) -> tuple[bool, dict[str, Any]]:
    """Return what the body of a retry asks for: whether everything runs again, and with which other resources.

    Raises
    ------
    BadRequest
        It is no such thing.
    """
    if body is None:
        return False, {}
    if not isinstance(body, dict) or not body.keys() <= {"tasks", "resources"}:
        raise BadRequest('the body is {"tasks": "failed" or "all", "resources": {…}}')
    tasks, resources = body.get("tasks", "failed"), body.get("resources", {})
    if tasks not in ("failed", "all"):
        raise BadRequest('tasks: "failed" or "all"')
    if not isinstance(resources, dict) or "everything" in resources or "run" in resources:
        raise BadRequest('resources: a mapping such as {"memory": "16G", "time": "2h"}')
    return tasks == "all", resources
