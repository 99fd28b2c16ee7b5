"""The Tracker: submits what waits, asks each pool for news, decides states and writes them to the Store.

Every process has one thread for each pool it has jobs on. A lease in the Store makes one of all a user's processes the
one that asks the scheduler and writes states; the others read the run folders and the Store. Whoever dies is replaced.
No decision compares clocks of two machines, or the wall clock with itself: waiting times are this process's own
monotonic time since it first saw a thing.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from . import process
from .backends.base import Observation, Submission
from .config import load
from .errors import HybridError, JobNotFound, PoolUnreachable, SubmitRejected
from .index import columns, index_job, keep_end
from .pool import Pool, default_store, get_pool
from .progress import Lost, Progress, Verdict, ending, judge
from .spec import Cause, JobState
from .storage import RunFolder
from .store import BatchRow, JobRow, Store, SubmissionRow, lease_owner, network_file_system, owner_is_gone

log = logging.getLogger(__name__)

FASTEST, SLOWEST = 0.005, 1.0
"""Bounds, in seconds, of the time between two looks at the run folder of a job."""
LEASE = 15.0
"""Seconds without a sign of life after which the lease of another host's process is taken over."""
RENEW = 4.0
"""Seconds between two signs of life of the lease's owner, and between two looks of the others."""
ABSENT = 120.0
"""Seconds for which neither scheduler nor worker may know a batch before it counts as gone."""
UNSETTLED = 10.0
"""Seconds for which a broken-off submission may still turn up at the scheduler."""
COUNTS = 0.5
"""Least seconds between two writes of a job's counts to the Store."""
MEASURED = 5.0
"""Seconds for which the workers of an ended job may still say what they have used."""


class Run:
    """One job as a process follows it: its folder, what its workers wrote, and its row in the Store."""

    def __init__(self, folder: RunFolder, row: JobRow) -> None:
        self.folder = folder
        self.spec = folder.spec
        self.row = row
        self.progress = Progress(folder)
        self.lock = threading.RLock()
        self.listeners: list[Callable[[Run], None]] = []
        self.news = time.monotonic()
        self.cost = 0.0
        self.batches: dict[int, BatchRow] = {}
        self.verdict: Verdict | None = None
        self.cancel_sent: set[str] = set()
        self.cancel_asked = False  # by this process, which tells the scheduler itself
        self.absent: dict[int, float] = {}  # for how long the scheduler has said, when asked, that it has no such batch
        self.left: set[int] = set()  # batches that the scheduler no longer has, or has ended
        self.handle: object = None  # the one Job or ArrayJob of this process
        self._first_seen: dict[tuple[str, int | str], float] = {}
        self.written = 0.0
        self.broken = False  # said once
        self.pid = os.getpid()

    def refresh(self) -> bool:
        """Read what the workers wrote; return whether it was anything."""
        with self.lock:
            start = time.thread_time()
            changed = self.progress.refresh()
            self.cost = time.thread_time() - start
            if changed:
                self.news = time.monotonic()
            return changed

    @property
    def settled(self) -> bool:
        """Whether the job's end is known here: all tasks have ended, or the Store says so."""
        return self.row.state.final or (bool(self.progress.attempts) and self.progress.complete)

    def since(self, what: str, number: int | str, holds: bool) -> float:
        """Return for how many seconds something has held, as this process has seen it."""
        if not holds:
            self._first_seen.pop((what, number), None)
            return 0.0
        now = time.monotonic()
        return now - self._first_seen.setdefault((what, number), now)

    def tell(self) -> None:
        """Call whoever listens."""
        for listener in list(self.listeners):
            listener(self)

    def pause(self) -> float:
        """Return how long to wait before the next look: 2 % of the time without news, within bounds."""
        quiet = 0.02 * (time.monotonic() - self.news)
        return max(FASTEST, min(SLOWEST, quiet), 10 * self.cost)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to cancel this round."""
        return (self.folder / f"cancelled-{self.row.attempt}").exists()


_runs: weakref.WeakValueDictionary[str, Run] = weakref.WeakValueDictionary()
_runs_lock = threading.Lock()


def run_of(row: JobRow) -> Run:
    """Return what this process knows of a job: one object, whoever asks, so that news reaches all who wait for it."""
    with _runs_lock:
        run = _runs.get(row.folder)
        if run is None:
            run = _runs[row.folder] = Run(RunFolder(Path(row.folder)), row)
        else:
            run.row = row
        return run


class PoolTracker:
    """Follows the jobs of one pool in this process.

    Parameters
    ----------
    pool : Pool
        The pool.
    store : Store
        The user's Store.
    """

    def __init__(self, pool: Pool, store: Store) -> None:
        self.pool, self.store = pool, store
        self.owner = lease_owner()
        self.holds = False
        self.runs: dict[str, Run] = {}  # all that this process follows
        self.own: set[str] = set()  # those that somebody in this process waits for
        self.lock = threading.RLock()
        self.submitting = threading.RLock()
        self.wake = threading.Event()
        self.stepped = threading.Event()  # set after the thread's first round
        self.thread: threading.Thread | None = None
        self._seen = ("", -1)
        self._seen_at = self._renewed = float("-inf")
        self._changes = -1
        self._next_query = 0.0
        self._interval = pool.config.limits.poll_min.total_seconds()
        self._retry_at = 0.0
        self._backoff = 0.0
        self._grace = 20.0 if network_file_system(pool.storage.root.parent) else 2.0

    # --- life ---------------------------------------------------------------------------------------------------

    def add(self, run: Run) -> None:
        """Follow a run until it has ended."""
        with self.lock:
            self.runs[run.row.id] = run
            self.own.add(run.row.id)
            self.start()
        self.soon()

    def start(self) -> None:
        """Start the thread, if it is not there; it ends when the pool has no unfinished job."""
        with self.lock:
            if self.thread is None or not self.thread.is_alive():
                self.stepped.clear()
                self.thread = threading.Thread(target=self._loop, name=f"hybrid-{self.pool.name}", daemon=True)
                self.thread.start()

    def soon(self) -> None:
        """Look again at once, and ask the scheduler soon."""
        self._interval = self.pool.config.limits.poll_min.total_seconds()
        self._next_query = min(self._next_query, time.monotonic() + self._interval)
        self.wake.set()

    def _loop(self) -> None:
        while True:
            self.wake.clear()
            try:
                pause = self.step()
            except HybridError as error:
                log.warning("pool %s: %s", self.pool.name, error)
                pause = RENEW
            except Exception:  # the thread must outlive a bug, or every job of the pool would stand still
                log.exception("pool %s: unexpected error", self.pool.name)
                pause = RENEW
            self.stepped.set()
            with self.lock:
                if not self.own and not self.runs and not self.wake.is_set():
                    self.leave()
                    self.thread = None
                    self.store.close()
                    return
            self.wake.wait(pause)

    def leave(self) -> None:
        """Give the lease back."""
        if self.holds:
            self.holds, self._renewed = False, float("-inf")
            with contextlib.suppress(HybridError):
                self.store.leave_lease(self.pool.name, self.owner)

    # --- one round ----------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Do all that is due and return the seconds until something is due again."""
        self._lease()
        self._load()
        runs = list(self.runs.values())
        self.submit()
        self._cancel_asked(runs)
        now = time.monotonic()
        for run in runs:
            with self._alone(run):
                if run.refresh():
                    run.tell()  # first: who waits for results need not wait for the Store
                    self._judge(run)
        if self.holds and runs and now >= self._next_query:
            self._query(runs)
        for run in runs:
            with self._alone(run):
                self._judge(run)
                if run.settled:
                    self._finish(run)
        pauses = [run.pause() for run in runs if run.row.id in self.runs]
        pauses += [RENEW, max(0.0, self._next_query - time.monotonic())] if self.holds else [RENEW]
        return min(pauses)

    @contextlib.contextmanager
    def _alone(self, run: Run) -> Iterator[None]:
        """Keep what is wrong with one job, or with who listens to it, from holding up the others."""
        try:
            yield
        except HybridError:
            raise
        except Exception:
            if not run.broken:
                log.exception("job %s: unexpected error", run.row.id)
            run.broken = True

    def _lease(self) -> None:
        now = time.monotonic()
        if now - self._renewed < RENEW:
            return
        row = self.store.pool(self.pool.name)
        seen = (row.owner, row.beat)
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        if row.owner == self.owner or owner_is_gone(row.owner) or now - self._seen_at >= LEASE:
            self.holds = self.store.take_lease(self.pool.name, self.owner, seen)
            self._seen, self._seen_at = (self.owner, row.beat + 1), now
        else:
            self.holds = False
        self._renewed = now

    def _load(self) -> None:
        """Bring rows up to date where another process has written, and take up what this one has to follow."""
        changes = self.store.changes()
        if changes == self._changes and not self.holds:
            return
        if changes != self._changes or self._renewed > self._loaded:
            self._loaded = time.monotonic()
            self._changes = changes
            active = {row.id: row for row in self.store.active(self.pool.name)} if self.holds or self.own else {}
            with self.lock:
                for job_id, run in list(self.runs.items()):
                    row = active.get(job_id)
                    if row is None:
                        run.row = self._reload(run)
                    else:
                        run.row = row
                    if not self.holds:
                        run.batches = self.store.batches(job_id)
                        if job_id not in self.own:
                            del self.runs[job_id]
                if self.holds:
                    for job_id, row in active.items():
                        if job_id not in self.runs:
                            self._take_up(row)

    _loaded = float("-inf")

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

    def _take_up(self, row: JobRow) -> None:
        try:
            run = run_of(row)
            run.folder.attempts()
        except HybridError as error:
            self._removed(row, str(error))
            return
        run.batches = self.store.batches(row.id)
        self.runs[row.id] = run

    def _removed(self, row: JobRow, reason: str) -> None:
        end = {"state": JobState.FAILED, "cause": Cause.RESULT_LOST, "reason": reason, "ended": time.time()}
        self.store.update_job(row.id, row.attempt, **end)

    def _finish(self, run: Run) -> None:
        run.tell()
        if self.holds and run.row.state.final and not (self._measured(run) and self._gone(run)):
            return
        with self.lock:
            if run.row.state.final:  # until then: who holds the lease may die before it writes down the end
                self.runs.pop(run.row.id, None)
                self.own.discard(run.row.id)

    def _measured(self, run: Run) -> bool:
        """Return whether nothing more is to come; what ended workers say of their use comes after their results."""
        started = [batch for batch in run.progress.batches.values() if batch.started is not None]
        late = any(not batch.why for batch in started)
        if late and run.since("late", run.row.attempt, True) < MEASURED:
            return False
        if run.verdict is not None and run.verdict.state is run.row.state:
            used = columns(run.progress, run.batches.values(), run.verdict)
            if (used["cpu_seconds"], used["peak_memory"]) != (run.row.cpu_seconds, run.row.peak_memory):
                self._write(run, run.verdict)
        return True

    def _gone(self, run: Run) -> bool:
        """Return whether the scheduler has ended all of a job, as far as others wait for its place."""
        if self.pool.config.limits.max_jobs is None or not self.store.waiting(self.pool.name):
            return True
        self._ask_when_ended()
        return not self._held_of(run)

    # --- submitting ---------------------------------------------------------------------------------------------

    def submit(self) -> None:
        """Hand the scheduler what waits, as far as limits allow."""
        with self.submitting:  # the tracker's thread, and the main one at the end of the process
            self._submit()

    def _submit(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        most = self.pool.config.limits.max_jobs
        if most is not None and not self.holds:
            return
        full = False
        for waiting in self.store.waiting(self.pool.name):
            run = self.runs.get(waiting.job)
            if run is None or run.row.state.final:  # an earlier submission of the same job was refused
                continue
            if most is not None and not run.cancelled:
                full = full or self._held() + waiting.batches > most  # none overtakes: a large one would starve
                if full:
                    self._wait(run, f"the limit of {most} jobs of this pool is reached")
                    self._ask_when_ended()
                    continue
            try:
                self._submit_one(run, waiting)
                self._backoff = 0.0
            except SubmitRejected as error:
                if getattr(error, "temporary", False):
                    self._wait(run, str(error))
                    self._postpone()
                    return
                try:
                    self._rejected(run, waiting, str(error))
                except PoolUnreachable as unreachable:  # it is rejected again, and ended, when the pool answers
                    self._unreachable(unreachable)
                    self._postpone()
                    return
            except PoolUnreachable as error:
                self._unreachable(error)
                self._wait(run, str(error))
                self._postpone()
                return
            except (OSError, JobNotFound) as error:
                if (run.folder / "spec.json").exists():
                    self._wait(run, f"the run folder cannot be used: {error}")
                else:
                    self._removed(run.row, f"its run folder {run.folder.path} was removed")
            except HybridError:
                raise
            except Exception as error:
                log.exception("job %s: unexpected error", run.row.id)
                self._wait(run, f"cannot be submitted: {error!r}")

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

    def _postpone(self) -> None:
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
                raise SubmitRejected(answer["reason"])  # who heard it was killed before the job was ended
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
                os.pwrite(descriptor, f"{waiting.tag}\n".encode(), size)
                os.fsync(descriptor)
            elif not backend.idempotent:
                # An earlier submission broke off. The lock is free, so no command is under way, but the scheduler
                # may be a moment behind: it is submitted again only when it surely is not there.
                native_id = backend.find([waiting.tag]).get(waiting.tag)
                if native_id is None and run.since("begun", waiting.tag, True) < UNSETTLED:
                    return
            if native_id is None:
                attempt = run.folder.attempt(waiting.attempt)
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
                raise SubmitRejected(f"job {job_id}, which this one waits for, has been removed") from None
            if row.state is JobState.COMPLETED:
                continue
            if row.state.final:
                raise SubmitRejected(f"job {job_id} ({row.name}), which this one waits for, ended {row.state}")
            submissions = self.store.submissions(job_id, row.attempt)
            if row.pool != self.pool.name or any(submission.state != "submitted" for submission in submissions):
                self._wait(run, f"waits for job {job_id} ({row.name})")
                return None
            natives += [submission.native_id for submission in submissions]
        return tuple(natives)

    def _rejected(self, run: Run, waiting: SubmissionRow, words: str) -> None:
        """End a job whose submission was refused; what the scheduler took of it before is cancelled."""
        run.folder.record_submission(waiting.tag, state="rejected", reason=words)
        for other in self.store.submissions(run.row.id, waiting.attempt):
            if other.state == "submitted":
                self.pool.backend.cancel(other.native_id)
            elif other.state == "new" and other.tag != waiting.tag:
                self.store.set_submission(other.tag, "cancelled")
        cause = Cause.DEPENDENCY_FAILED if "which this one waits for" in words else Cause.SUBMIT_REJECTED
        self._write(run, Verdict(JobState.FAILED, cause, words, 0, {}))
        self.store.set_submission(waiting.tag, "rejected")  # last: until then whoever comes next does all of this

    # --- asking -------------------------------------------------------------------------------------------------

    def _query(self, runs: Iterable[Run]) -> None:
        limits = self.pool.config.limits
        submitted: dict[str, tuple[Run, SubmissionRow]] = {}
        for run in runs:
            for submission in self.store.submissions(run.row.id, run.row.attempt):
                if submission.state == "submitted":
                    submitted[submission.native_id] = (run, submission)
        self._next_query = time.monotonic() + self._interval
        self._interval = min(limits.poll_max.total_seconds(), 1.5 * self._interval)
        if not submitted:
            return
        try:
            self._cancel(submitted)
            observations = self.pool.backend.query(list(submitted))
        except PoolUnreachable as error:
            self._unreachable(error)
            return
        self._reachable()
        seen: dict[str, dict[int, Observation]] = {}
        for observation in observations:
            if observation.native_id in submitted:
                run, submission = submitted[observation.native_id]
                batch = submission.first + (observation.index or 0)
                seen.setdefault(run.row.id, {})[batch] = observation
        for run in {run.row.id: run for run, _ in submitted.values()}.values():
            mine = [submission for owner, submission in submitted.values() if owner is run]
            self._observe(run, mine, seen.get(run.row.id, {}))

    def _observe(self, run: Run, submissions: list[SubmissionRow], seen: dict[int, Observation]) -> None:
        changed = []
        for submission in submissions:
            for batch in range(submission.first, submission.first + submission.batches):
                observation = seen.get(batch)
                worker = run.progress.batches.get(batch)
                before = run.batches.get(batch)
                gone = observation is None and not (worker is not None and worker.why == "done")
                gone = gone and not (before is not None and before.state.final)
                run.absent[batch] = run.since("absent", batch, gone)
                if observation is None or observation.state.final:
                    run.left.add(batch)
                else:
                    run.left.discard(batch)
                if observation is not None:
                    row = _batch_row(run.folder, batch, observation, before)
                elif gone:
                    row = BatchRow(
                        batch, JobState.UNKNOWN, None, "the scheduler does not know it", "", None, 0, None, None, None
                    )
                else:
                    continue
                if row != before:
                    run.batches[batch] = row
                    changed.append(row)
        if changed:
            self.store.set_batches(run.row.id, changed)

    def _cancel_asked(self, runs: Iterable[Run]) -> None:
        """Tell the scheduler of what was cancelled in this process, whoever holds the lease."""
        for run in runs:
            if run.cancel_asked and time.monotonic() >= self._retry_at:
                rows = self.store.submissions(run.row.id, run.row.attempt)
                try:
                    self._cancel({row.native_id: (run, row) for row in rows if row.state == "submitted"})
                except PoolUnreachable as error:
                    self._unreachable(error)
                    self._postpone()
                    return
                run.cancel_asked = False
                self.soon()

    def _cancel(self, submitted: dict[str, tuple[Run, SubmissionRow]]) -> None:
        for native_id, (run, _) in submitted.items():
            if run.cancelled and native_id not in run.cancel_sent:
                self.pool.backend.cancel(native_id)
                run.cancel_sent.add(native_id)

    def _unreachable(self, error: PoolUnreachable) -> None:
        row = self.store.pool(self.pool.name)
        if row.unreachable_since is None or row.error != str(error):
            self.store.set_pool(
                self.pool.name, unreachable_since=row.unreachable_since or time.time(), error=str(error)
            )

    def _reachable(self) -> None:
        if self.store.pool(self.pool.name).unreachable_since is not None:
            self.store.set_pool(self.pool.name, unreachable_since=None, error="")

    # --- deciding -----------------------------------------------------------------------------------------------

    def _over(self, run: Run) -> dict[int, Lost | None]:
        """Return the batches of the round that surely run no more."""
        over: dict[int, Lost | None] = {}
        if not run.progress.attempts:
            return over
        attempt = run.progress.attempts[-1]
        for batch in range(attempt.first, attempt.first + attempt.batches):
            worker, row = run.progress.batches.get(batch), run.batches.get(batch)
            said = worker is not None and worker.why in ("done", "walltime", "infrastructure")
            final = row is not None and row.state.final
            ended = worker is not None and worker.why == "terminated"
            settling = run.since("final", batch, final)
            if final and not (said or ended):
                run.progress.look(batch)
                worker = run.progress.batches.get(batch)
                said = worker is not None and worker.why in ("done", "walltime", "infrastructure")
                ended = worker is not None and worker.why == "terminated"
            quiet = run.absent.get(batch, 0.0)
            if worker is not None:
                quiet = min(quiet, time.monotonic() - worker.news)
            if said or (final and (ended or settling >= self._grace)) or quiet >= ABSENT:
                over[batch] = ending(worker, row)
        for submission in self.store.submissions(run.row.id, run.row.attempt) if run.cancelled else ():
            if submission.state == "cancelled":
                lost = Lost(JobState.CANCELLED, Cause.CANCELLED, "cancelled before it was submitted")
                over.update(dict.fromkeys(range(submission.first, submission.first + submission.batches), lost))
        return over

    def _judge(self, run: Run) -> None:
        if not self.holds or run.row.state.final:
            return
        with run.lock:
            submitted = run.row.state is not JobState.NEW
            verdict = judge(run.progress, run.batches, self._over(run), submitted, run.cancelled)
        if verdict != run.verdict or verdict.state.final:
            urgent = run.verdict is None or verdict.state is not run.verdict.state
            now = time.monotonic()
            if urgent or now - run.written >= COUNTS:
                run.written = now
                run.verdict = verdict
                self._write(run, verdict)

    def _write(self, run: Run, verdict: Verdict) -> None:
        changes = columns(run.progress, run.batches.values(), verdict)
        if verdict.state.final and not run.progress.complete:
            with contextlib.suppress(OSError):  # a folder that was removed, or a full disk: the Store knows it
                keep_end(run.folder, run.row.attempt, changes, run.batches.values())
        self.store.update_job(run.row.id, run.row.attempt, **changes)
        run.row = self._reload(run)
        run.tell()
        if verdict.state.final:
            self._tidy(run)

    def _tidy(self, run: Run) -> None:
        """Take what is left of a pulled array out of the queue: its tasks are done."""
        attempt = run.progress.attempts[-1] if run.progress.attempts else None
        if attempt is None or not attempt.pull or not run.progress.complete:
            return
        idle: dict[str, list[int]] = {}
        for submission in self.store.submissions(run.row.id, run.row.attempt):
            for batch in range(submission.first, submission.first + submission.batches):
                if submission.state == "submitted" and batch not in run.progress.batches:
                    idle.setdefault(submission.native_id, []).append(batch - submission.first)
        # An idle batch that is cancelled would fail those who have the scheduler wait for the whole array. Whoever
        # looks at this job from now on finds it COMPLETED and has nothing to wait for.
        if not idle or any(run.row.id in _after(row) for row in self.store.active(self.pool.name)):
            return
        for native_id, indices in idle.items():
            with contextlib.suppress(HybridError):
                self.pool.backend.cancel(native_id, indices)


def _after(row: JobRow) -> tuple[str, ...]:
    try:
        return RunFolder(Path(row.folder)).spec.after
    except HybridError:
        return ()


_OUT_OF_MEMORY = ("memory limit", "oom-kill", "oom_kill", "Out Of Memory")
"""What Slurm's and the kernel's messages in a log say of a job that took too much; not every state says so."""


def _batch_row(folder: RunFolder, batch: int, said: Observation, before: BatchRow | None) -> BatchRow:
    """Return what is kept of a scheduler's word on a batch."""
    cause, reason = said.cause, said.reason
    if cause is Cause.USER_ERROR:  # all a scheduler can know is that the script, which is not the user's, failed
        cause = None
        if said.state.final and any(words in folder.log_tail(batch) for words in _OUT_OF_MEMORY):
            cause, reason = Cause.OUT_OF_MEMORY, "the batch used more memory than it asked for"
    cpu, memory = said.cpu_seconds, said.peak_memory
    if before is not None:  # measured once, and not in every answer
        cpu = before.cpu_seconds if cpu is None else cpu
        memory = before.peak_memory if memory is None else memory
    return BatchRow(
        batch, said.state, cause, reason, said.host, said.exit_code, said.restarts, said.estimated_start, cpu, memory
    )


class Tracker:
    """The pool trackers of this process."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str], PoolTracker] = {}
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """Begin anew in a child: threads do not survive a fork, and locks may be held for ever."""
        global _runs_lock  # noqa: PLW0603
        self._pools, self._lock = {}, threading.Lock()
        _runs_lock = threading.Lock()
        _runs.clear()

    def pool(self, pool: Pool) -> PoolTracker:
        """Return the tracker of a pool, made when first asked for."""
        store = default_store()
        key = (str(store.path), pool.name)
        with self._lock:
            if key not in self._pools:
                self._pools[key] = PoolTracker(pool, store)
            return self._pools[key]

    def leave(self) -> None:
        """Give the leases of this process back."""
        for tracker in list(self._pools.values()):
            tracker.leave()

    def flush(self) -> None:
        """Hand the schedulers what this process has promised them; the end of a script must not lose it."""
        for tracker in list(self._pools.values()):
            with contextlib.suppress(HybridError):
                # An unreachable scheduler is not waited for: the intents are on disk, for the next tracker.
                if tracker.store.pool(tracker.pool.name).unreachable_since is None:
                    tracker.submit()
                tracker.leave()


tracker = Tracker()
"""The one of this process."""
atexit.register(tracker.flush)


def watch_all(wait: float = 1.0) -> None:
    """Follow all unfinished jobs of all pools in this process; wait at most so many seconds for the first news."""
    store = default_store()
    trackers = [tracker.pool(get_pool(name)) for name in load().pools if store.active(name)]
    for pool_tracker in trackers:
        pool_tracker.start()
    deadline = time.monotonic() + wait
    for pool_tracker in trackers:
        pool_tracker.stepped.wait(max(0.0, deadline - time.monotonic()))


def follow(run: Run, pool: Pool | None = None) -> None:
    """Follow a run in this process until it has ended; its pool is looked up if not given."""
    with _runs_lock:
        _runs.setdefault(str(run.folder.path), run)
    tracker.pool(pool or get_pool(run.row.pool)).add(run)


def step_all(names: Iterable[str] | None = None) -> None:
    """Do one round on every pool with unfinished jobs, in this thread; for commands that run once."""
    store = default_store()
    for name in names if names is not None else load().pools:
        if store.active(name):
            pool_tracker = tracker.pool(get_pool(name))
            with contextlib.suppress(PoolUnreachable):
                pool_tracker.step()
            pool_tracker.leave()
