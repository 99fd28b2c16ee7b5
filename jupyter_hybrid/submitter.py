"""Submitter: hands the scheduler of one pool what waits, exactly once, as far as limits allow."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Sequence

from . import process
from .backends.base import Submission
from .errors import HybridError, JobNotFound, PoolUnreachable, ResourceError, SubmitRejected
from .index import columns, index_job, keep_end
from .pool import Pool
from .progress import Verdict
from .run import Run
from .spec import Cause, JobState
from .store import JobRow, Store, SubmissionRow

log = logging.getLogger(__name__)

UNSETTLED = 10.0
"""Seconds for which a broken-off submission may still turn up at the scheduler."""


class _DependencyFailed(SubmitRejected):
    """A job that this one waits for did not complete."""


class Submitter:
    """Submits the jobs of one pool that this process follows.

    Parameters
    ----------
    pool : Pool
        The pool.
    store : Store
        The user's Store.
    """

    def __init__(self, pool: Pool, store: Store) -> None:
        self.pool, self.store = pool, store
        self.holds = False  # the lease of the pool
        self.runs: dict[str, Run] = {}  # all that this process follows
        self.wake = threading.Event()
        self._submitting = threading.RLock()
        self._next_query = 0.0
        self._interval = pool.config.limits.poll_min.total_seconds()
        self._retry_at = 0.0
        self._backoff = 0.0

    def soon(self) -> None:
        """Look again at once, and ask the scheduler soon."""
        self._interval = self.pool.config.limits.poll_min.total_seconds()
        self._next_query = min(self._next_query, time.monotonic() + self._interval)
        self.wake.set()

    def submit(self) -> None:
        """Hand the scheduler what waits, as far as limits allow."""
        with self._submitting:  # the tracker's thread, and the main one at the end of the process
            self._submit()

    def _submit(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        most = self.pool.config.limits.max_jobs
        if most is not None and not self.holds:
            return
        full = False
        queue = self.store.waiting(self.pool.name)
        for number, waiting in enumerate(queue):
            run = self.runs.get(waiting.job)
            if run is None or run.row.state.final:  # an earlier submission of the same job was refused
                continue
            if most is not None and not run.cancelled:
                if not full and self._held() + waiting.batches > most:  # none overtakes: a large one would starve
                    full = True
                    self._ask_when_ended()
                if full:
                    self._wait(run, f"the limit of {most} jobs of this pool is reached")
                    continue
            try:
                self._submit_one(run, waiting)
                self._backoff = 0.0
            except SubmitRejected as error:
                if error.temporary:
                    hint = "" if self._held() else " (what the pool allows goes into its 'limits: {max_jobs: N}')"
                    self._postpone(queue[number:], f"{error}{hint}")
                    return
                if not self._end_rejected(run, waiting, error):
                    return
            except ResourceError as error:  # what only this kind of scheduler can tell to be wrong
                if not self._end_rejected(run, waiting, SubmitRejected(str(error))):
                    return
            except PoolUnreachable as error:
                self._unreachable(error)
                self._postpone(queue[number:], str(error))
                return
            except (OSError, JobNotFound) as error:
                if (run.folder / "spec.json").exists() or not self._mounted():
                    self._wait(run, f"the run folder cannot be used: {error}")
                else:
                    self._removed(run.row, f"its run folder {run.folder.path} was removed")
            except HybridError as error:  # of this job alone: the others go on
                self._wait(run, str(error))
            except Exception as error:
                if not run.broken:
                    log.exception("job %s: unexpected error", run.row.id)
                run.broken = True
                self._wait(run, f"cannot be submitted: {error!r}")

    def _end_rejected(self, run: Run, waiting: SubmissionRow, error: SubmitRejected) -> bool:
        """End a refused job; return whether the pool answers, so that the next one can be tried."""
        try:
            self._rejected(run, waiting, error)
        except PoolUnreachable as unreachable:  # it is rejected again, and ended, when the pool answers
            self._unreachable(unreachable)
            self._postpone()
            return False
        return True

    def _held(self) -> int:
        """Return how many batches the scheduler has, as far as is known: those it was given and has not ended yet."""
        return sum(self._held_of(run) for run in list(self.runs.values()))

    def _held_of(self, run: Run) -> int:
        return sum(
            batch not in run.left
            for submission in self.store.submissions(run.row.id, run.row.attempt)
            if submission.state == "submitted"
            for batch in range(submission.first, submission.first + submission.batches)
        )

    def _ask_when_ended(self) -> None:
        """Ask the scheduler soon if a worker says that it has ended: others wait for its place."""
        if any(
            batch.why and number not in run.left
            for run in list(self.runs.values())
            for number, batch in list(run.progress.batches.items())
        ):
            soon = time.monotonic() + self.pool.config.limits.poll_min.total_seconds()
            self._next_query = min(self._next_query, soon)

    def _postpone(self, queue: Sequence[SubmissionRow] = (), reason: str = "") -> None:
        """Leave the scheduler alone for a while; all who wait are told why."""
        for waiting in queue:
            run = self.runs.get(waiting.job)
            if run is not None and not run.row.state.final:
                self._wait(run, reason)
        self._backoff = min(60.0, 2 * self._backoff or 1.0)
        self._retry_at = time.monotonic() + self._backoff

    def _wait(self, run: Run, reason: str) -> None:
        if run.row.reason != reason:
            self.store.update_job(run.row.id, run.row.attempt, reason=reason)
            run.row = run.row._replace(reason=reason)

    def _submit_one(self, run: Run, waiting: SubmissionRow) -> None:
        folder, backend = run.folder, self.pool.backend
        with folder.submitting() as descriptor:
            if descriptor is None:
                return  # a submission is under way, here or in a process that has died since
            answer = folder.submissions().get(waiting.tag)
            if answer is not None and answer["state"] == "rejected":
                # Who heard it was killed before the job was ended.
                kind = _DependencyFailed if answer.get("cause") == Cause.DEPENDENCY_FAILED else SubmitRejected
                raise kind(answer["reason"])
            if answer is not None:
                self.store.set_submission(waiting.tag, answer["state"], answer.get("native_id", ""))
                return
            if (folder / f"cancelled-{waiting.attempt}").exists():
                folder.record_submission(waiting.tag, state="cancelled")
                self.store.set_submission(waiting.tag, "cancelled")
                return
            after = self._dependencies(run)
            if after is None:
                return
            native_id = None
            size = os.fstat(descriptor).st_size
            begun = waiting.tag in os.pread(descriptor, size, 0).decode().split("\n")
            if not begun:
                mark = f"{waiting.tag}\n".encode()
                if os.pwrite(descriptor, mark, size) != len(mark):
                    raise OSError(errno.ENOSPC, "no space left to begin the submission")
                os.fsync(descriptor)
            elif not backend.idempotent:
                # An earlier submission broke off. The lock is free, so no command is under way, but the scheduler
                # may be a moment behind: it is submitted again only when it surely is not there.
                waited = run.since("begun", waiting.tag, True)
                if 0.0 < waited < UNSETTLED:
                    return  # asked once; again before it is submitted anew
                native_id = backend.find([waiting.tag]).get(waiting.tag)
                if native_id is None and waited < UNSETTLED:
                    return
            if native_id is None:
                folder.adopt(waiting.attempt)
                attempt = folder.attempt(waiting.attempt)
                with process.inheriting(descriptor):
                    native_id = backend.submit(
                        Submission(
                            tag=waiting.tag,
                            name=run.spec.name,
                            script=folder / f"script.{waiting.first}.sh",
                            logs=folder / "logs",
                            first=waiting.first,
                            count=waiting.batches,
                            array=attempt.batches > 1,
                            resources=attempt.resources,
                            after=after,
                        )
                    )
            folder.record_submission(waiting.tag, state="submitted", native_id=native_id)
        self.store.set_submission(waiting.tag, "submitted", native_id)
        self._reachable()
        run.row = self.store.job(run.row.id)
        run.news = time.monotonic()
        self.soon()
        run.tell()

    def _dependencies(self, run: Run) -> tuple[str, ...] | None:
        """Return the native ids to wait for; ``None`` while a dependency is not there yet."""
        natives: list[str] = []
        for job_id in run.spec.after:
            try:
                row = self.store.job(job_id)
            except JobNotFound:
                raise _DependencyFailed(f"job {job_id}, which this one waits for, has been removed") from None
            if row.state is JobState.COMPLETED:
                continue
            if row.state.final:
                raise _DependencyFailed(f"job {job_id} ({row.name}), which this one waits for, ended {row.state}")
            submissions = self.store.submissions(job_id, row.attempt)
            if row.pool != self.pool.name or any(submission.state != "submitted" for submission in submissions):
                self._wait(run, f"waits for job {job_id} ({row.name})")
                return None
            natives += [submission.native_id for submission in submissions]
        return tuple(natives)

    def _rejected(self, run: Run, waiting: SubmissionRow, error: SubmitRejected) -> None:
        """End a job whose submission was refused; what the scheduler took of it before is cancelled."""
        cause = Cause.DEPENDENCY_FAILED if isinstance(error, _DependencyFailed) else Cause.SUBMIT_REJECTED
        run.folder.record_submission(waiting.tag, state="rejected", reason=str(error), cause=cause)
        for other in self.store.submissions(run.row.id, waiting.attempt):
            if other.state == "submitted":
                self._cancel_native(run, other.native_id)
            elif other.state == "new" and other.tag != waiting.tag:
                self.store.set_submission(other.tag, "cancelled")
        self._write(run, Verdict(JobState.FAILED, cause, str(error), 0, {}), waiting.attempt)
        self.store.set_submission(waiting.tag, "rejected")  # last: until then whoever comes next does all of this

    def _cancel_native(self, run: Run, native_id: str) -> None:
        """Cancel a submission; a refusal is logged: asking again would not help, nor may it hold up other jobs."""
        try:
            self.pool.backend.cancel(native_id)
        except PoolUnreachable:
            raise
        except HybridError as error:
            log.warning("job %s cannot be cancelled: %s", run.row.id, error)

    def _unreachable(self, error: PoolUnreachable) -> None:
        row = self.store.pool(self.pool.name)
        if row.unreachable_since is None or row.error != str(error):
            self.store.set_pool(
                self.pool.name, unreachable_since=row.unreachable_since or time.time(), error=str(error)
            )

    def _reachable(self) -> None:
        if self.store.pool(self.pool.name).unreachable_since is not None:
            self.store.set_pool(self.pool.name, unreachable_since=None, error="")

    def _mounted(self) -> bool:
        """Return whether the pool's storage is there: one that is not mounted says nothing of its jobs."""
        return (self.pool.storage.root / ".worker").is_dir()

    def _removed(self, row: JobRow, reason: str) -> None:
        end = {"state": JobState.FAILED, "cause": Cause.RESULT_LOST, "reason": reason, "ended": time.time()}
        self.store.update_job(row.id, row.attempt, **end)

    def _write(self, run: Run, verdict: Verdict, attempt: int) -> None:
        changes = columns(run.progress, run.batches.values(), verdict)
        if verdict.state.final and not run.progress.complete:
            with contextlib.suppress(OSError):  # a folder that was removed, or a full disk: the Store knows it
                keep_end(run.folder, attempt, changes, run.batches.values())
        self.store.update_job(run.row.id, attempt, **changes)
        run.row = self._reload(run)
        run.tell()

    def _reload(self, run: Run) -> JobRow:
        """Return the row of a job; one that the Store has lost is made anew from the run folder, which is the truth."""
        try:
            return self.store.job(run.row.id)
        except JobNotFound:
            if not (run.folder / "spec.json").exists():
                # Cleaned up elsewhere; it must not hold up the pool's other jobs.
                return run.row._replace(state=JobState.FAILED, cause=Cause.RESULT_LOST, reason="the job was removed")
        index_job(self.store, run.folder)
        try:
            return self.store.job(run.row.id)
        except JobNotFound:  # deleted once more
            return run.row
