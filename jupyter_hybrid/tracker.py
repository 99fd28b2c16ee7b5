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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from .backends.base import Observation
from .config import load
from .errors import HybridError, PoolUnreachable
from .index import columns
from .pool import Pool, default_store, get_pool
from .progress import Lost, ending, judge
from .run import Run, forget_all, remember, run_of
from .spec import Cause, JobState
from .storage import RunFolder
from .store import BatchRow, JobRow, Store, SubmissionRow, lease_owner, network_file_system, owner_is_gone
from .submitter import Submitter

log = logging.getLogger(__name__)

LEASE = 15.0
"""Seconds without a sign of life after which the lease of another host's process is taken over."""
RENEW = 4.0
"""Seconds between two signs of life of the lease's owner, and between two looks of the others."""
ABSENT = 120.0
"""Seconds for which neither scheduler nor worker may know a batch before it counts as gone."""
COUNTS = 0.5
"""Least seconds between two writes of a job's counts to the Store."""
MEASURED = 5.0
"""Seconds for which the workers of an ended job may still say what they have used."""


class PoolTracker(Submitter):
    """Follows the jobs of one pool in this process.

    Parameters
    ----------
    pool : Pool
        The pool.
    store : Store
        The user's Store.
    """

    def __init__(self, pool: Pool, store: Store) -> None:
        super().__init__(pool, store)
        self.owner = lease_owner()
        self.own: set[str] = set()  # runs that somebody in this process waits for
        self.lock = threading.RLock()
        self.stepped = threading.Event()  # set once the scheduler has answered the thread's first question
        self.thread: threading.Thread | None = None
        self._stopped = False
        self._seen = ("", -1)
        self._seen_at = self._renewed = self._loaded = float("-inf")
        self._changes = -1
        self._asked: tuple[dict[str, tuple[Run, SubmissionRow]], Future[Sequence[Observation]]] | None = None
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
                self._stopped = False
                self.stepped.clear()
                self.thread = threading.Thread(target=self._loop, name=f"hybrid-{self.pool.name}", daemon=True)
                self.thread.start()

    def _loop(self) -> None:
        while True:
            self.wake.clear()
            try:
                pause = 0.0 if self._stopped else self.step()
            except HybridError as error:
                log.warning("pool %s: %s", self.pool.name, error)
                pause = RENEW
            except Exception:  # the thread must outlive a bug, or every job of the pool would stand still
                log.exception("pool %s: unexpected error", self.pool.name)
                pause = RENEW
            if self._asked is None:
                self.stepped.set()
            with self.lock:
                if self._stopped or (not self.own and not self.runs and not self.wake.is_set()):
                    self.leave()
                    self.thread = None
                    self.store.close()
                    return
            self.wake.wait(pause)

    def stop(self) -> None:
        """Have the thread end after its round; :meth:`start` begins anew."""
        self._stopped = True
        self.wake.set()

    def leave(self) -> None:
        """Give the lease back."""
        if self.holds:
            self.holds, self._renewed = False, float("-inf")
            with contextlib.suppress(HybridError):
                self.store.leave_lease(self.pool.name, self.owner)

    # --- one round ----------------------------------------------------------------------------------------------

    def step(self, patient: bool = False) -> float:
        """Do all that is due and return the seconds until something is due again.

        The scheduler's answer to a question is taken up by the round that finds it; a patient one waits for it.
        """
        self._lease()
        self._load()
        runs = list(self.runs.values())
        self.submit()
        self._cancel_asked(runs)
        now = time.monotonic()
        for run in runs:
            with self._alone(run):
                if run.refresh():
                    self._judge(run)
                    run.tell()
        if self.holds and runs and now >= self._next_query and self._asked is None:
            self._ask(runs)
        if self._asked is not None and (patient or self._asked[1].done()):
            self._hear(*self._asked)
        for run in runs:
            with self._alone(run):
                self._judge(run)
                if run.settled:
                    self._finish(run)
        pauses = [run.pause() for run in runs if run.row.id in self.runs]
        pauses.append(RENEW)
        if self.holds and self._asked is None:
            pauses.append(max(0.0, self._next_query - time.monotonic()))
        return min(pauses)

    @contextlib.contextmanager
    def _alone(self, run: Run) -> Iterator[None]:
        """Keep what is wrong with one job, or with who listens to it, from holding up the others."""
        try:
            yield
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

    def _take_up(self, row: JobRow) -> None:
        try:
            run = run_of(row)
            run.folder.attempts()
        except HybridError as error:
            if self._mounted():
                self._removed(row, str(error))
            return
        except OSError as error:
            log.warning("job %s: %s", row.id, error)
            return
        run.batches = self.store.batches(row.id)
        self.runs[row.id] = run

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
        row, verdict = run.row, run.verdict
        if verdict is not None and verdict.state is row.state:
            used = columns(run.progress, run.batches.values(), verdict)
            if (used["cpu_seconds"], used["peak_memory"]) != (row.cpu_seconds, row.peak_memory):
                self._write(run, verdict, row.attempt)
        return True

    def _gone(self, run: Run) -> bool:
        """Return whether the scheduler has ended all of a job, as far as others wait for its place."""
        if self.pool.config.limits.max_jobs is None or not self.store.waiting(self.pool.name):
            return True
        self._ask_when_ended()
        return not self._held_of(run)

    # --- asking -------------------------------------------------------------------------------------------------

    def _ask(self, runs: Iterable[Run]) -> None:
        """Ask the scheduler in a thread of its own: while it thinks, or is down, the run folders have news."""
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
        except PoolUnreachable as error:
            self._unreachable(error)
            return
        backend, answer = self.pool.backend, Future[Sequence[Observation]]()

        def ask() -> None:
            try:
                answer.set_result(backend.query(list(submitted)))
            except BaseException as error:  # noqa: BLE001  told to who hears it
                answer.set_exception(error)
            self.wake.set()

        self._asked = (submitted, answer)
        threading.Thread(target=ask, name=f"hybrid-{self.pool.name}-query", daemon=True).start()

    def _hear(self, submitted: dict[str, tuple[Run, SubmissionRow]], answer: Future[Sequence[Observation]]) -> None:
        try:
            observations = answer.result()
        except PoolUnreachable as error:
            self._unreachable(error)
            return
        finally:
            self._asked = None
        if not self.holds:  # somebody else has taken over in the meantime
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
                    if batch not in run.left:
                        self._retry_at = 0.0  # there may be room for what was refused
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
                self._cancel_native(run, native_id)
                run.cancel_sent.add(native_id)

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
        if not self.holds or run.row.state.final or not self._planned(run):
            return
        with run.lock:
            attempt, submitted = run.row.attempt, run.row.state is not JobState.NEW
            verdict = judge(run.progress, run.batches, self._over(run), submitted, run.cancelled)
        if verdict != run.verdict or verdict.state.final:
            urgent = run.verdict is None or verdict.state is not run.verdict.state
            now = time.monotonic()
            if urgent or now - run.written >= COUNTS:
                run.written = now
                run.verdict = verdict
                # Looked up before anybody hears of the end: a retry may begin a new round at once.
                idle = self._idle(run) if verdict.state.final else {}
                self._write(run, verdict, attempt)
                self._tidy(run, idle)

    def _planned(self, run: Run) -> bool:
        """Return whether the round can be judged: its plan is here, or has not come in a time in which it would have.

        Who was killed right after the Store got the round has left the draft; NFS shows a new file a moment later.
        """
        if not run.planned:
            run.folder.adopt(run.row.attempt)
            run.refresh()
        return run.planned or run.since("unplanned", run.row.attempt, True) >= self._grace

    def _idle(self, run: Run) -> dict[str, list[int]]:
        """Return the elements of a pulled array that have nothing to do any more, by native id."""
        attempt = run.progress.attempts[-1] if run.progress.attempts else None
        idle: dict[str, list[int]] = {}
        if attempt is None or not attempt.pull or not run.progress.complete:
            return idle
        for submission in self.store.submissions(run.row.id, run.row.attempt):
            for batch in range(submission.first, submission.first + submission.batches):
                if submission.state == "submitted" and batch not in run.progress.batches:
                    idle.setdefault(submission.native_id, []).append(batch - submission.first)
        return idle

    def _tidy(self, run: Run, idle: dict[str, list[int]]) -> None:
        """Take what is left of a pulled array out of the queue: its tasks are done."""
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
        self._pools, self._lock = {}, threading.Lock()
        forget_all()

    def pool(self, pool: Pool) -> PoolTracker:
        """Return the tracker of a pool, made when first asked for."""
        store = default_store()
        key = (str(store.path), pool.name)
        with self._lock:
            found = self._pools.get(key)
            if found is None:
                found = self._pools[key] = PoolTracker(pool, store)
            elif found.pool is not pool:
                found.pool = pool  # its configuration was changed
            return found

    def leave(self) -> None:
        """Give the leases of this process back."""
        for tracker in list(self._pools.values()):
            tracker.leave()

    def holding(self) -> list[str]:
        """Return the names of the pools whose lease this process has."""
        return sorted(each.pool.name for each in list(self._pools.values()) if each.holds)

    def stop(self, wait: float = 2.0) -> None:
        """Follow nothing any more, and give the leases back; wait at most so many seconds for rounds under way.

        Who is in the middle of a command of a scheduler that hangs decides nothing afterwards without the lease.
        """
        trackers = list(self._pools.values())
        for each in trackers:
            each.stop()
        deadline = time.monotonic() + wait
        for each in trackers:
            thread = each.thread
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
            each.leave()

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
    remember(run)
    tracker.pool(pool or get_pool(run.row.pool)).add(run)


def step_all(names: Iterable[str] | None = None) -> None:
    """Do one round on every pool with unfinished jobs, in this thread; for commands that run once."""
    store = default_store()
    for name in names if names is not None else load().pools:
        if store.active(name):
            pool_tracker = tracker.pool(get_pool(name))
            with contextlib.suppress(PoolUnreachable):
                pool_tracker.step(patient=True)
            pool_tracker.leave()
