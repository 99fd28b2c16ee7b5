"""The program that runs the jobs of the local pools of one user: ``python -m jupyter_hybrid.backends.supervisor``.

The database ``spool.sqlite`` is the truth; what the supervisor has in memory is read from it anew whenever another
process wrote to it. Each array element runs under a shim, a few lines of sh, which holds a lock on the element's file
in ``run/`` and writes there when the script starts and how it ended. So for an element in state RUNNING:

==================== ==================== =====================================
lock                 file                 meaning
==================== ==================== =====================================
held                                      the shim lives
free                 ``exit N``           the script ended with status N
free                 ``start PID`` only   the shim died without a word
free                 empty or missing     never started: it is put back
==================== ==================== =====================================

and a supervisor killed between any two system calls loses and doubles nothing. One supervisor serves a folder: it
inherits the lock on ``supervisor.lock`` from the client that starts it, already taken, and holds it for its life.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import sqlite3
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

from .. import process
from ..errors import PoolUnreachable
from ..job import Cause, JobState, format_memory
from . import proctree

WARNING = 30.0
"""Most seconds before walltime at which a script that handles SIGUSR2 gets it; a tenth of the walltime if less."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
PASSES = 16
"""How many starts may pass a waiting element that needs more slots than are free; then the pool is kept for it."""
KEEP = 7 * 86400.0
"""Seconds for which ended submissions are known."""
LOG_SIZE = 1 << 20
LIVE = "('PENDING', 'RUNNING')"

VERSION = 1
_SCHEMA = f"""
CREATE TABLE pool (name TEXT PRIMARY KEY, cpus INTEGER, memory INTEGER, gpus INTEGER);
CREATE TABLE submission (
    native_id INTEGER PRIMARY KEY AUTOINCREMENT, tag TEXT UNIQUE, pool TEXT, name TEXT, script TEXT, logs TEXT,
    first INTEGER, count INTEGER, array INTEGER, cpus INTEGER, memory INTEGER, gpus INTEGER, walltime REAL,
    priority INTEGER, after TEXT, environment TEXT, held INTEGER DEFAULT 0, submitted REAL);
CREATE TABLE element (
    native_id INTEGER, idx INTEGER, state TEXT DEFAULT 'PENDING', ending TEXT, started REAL, clock REAL, boot TEXT,
    oom INTEGER, devices TEXT, ended REAL, exit_code INTEGER, cause TEXT, reason TEXT DEFAULT '', cpu_seconds REAL,
    peak_memory INTEGER, PRIMARY KEY (native_id, idx)) WITHOUT ROWID;
CREATE INDEX element_state ON element (state, native_id);
PRAGMA user_version = {VERSION};
"""

_SHIM = """trap : HUP INT QUIT TERM PIPE ALRM USR1 USR2
echo "start $$" >&9 || exit 75
"$0" </dev/null 9>&-
code=$?
echo "exit $code" >&9
exit $code
"""
_SHIM_LOCK = 9  # sh redirects only one-digit descriptors

_TEMPORARY = {errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}


def connect(folder: Path) -> sqlite3.Connection:
    """Open the database of a spool folder; make it if there is none.

    Raises
    ------
    PoolUnreachable
        The folder or the database cannot be made, opened or understood.
    """
    path = folder / "spool.sqlite"
    try:
        if not path.exists():
            _create(path)
        database = sqlite3.connect(path, timeout=30, isolation_level=None)
        database.row_factory = sqlite3.Row
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error:
            database.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise PoolUnreachable(f"local spool {path} cannot be opened: {error}") from error
    if version != VERSION:
        database.close()
        raise PoolUnreachable(f"local spool {path} has schema {version}, not {VERSION}: use one version of the package")
    return database


def _create(path: Path) -> None:
    # Complete under another name, then linked: nobody ever sees half a schema.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"draft.{os.getpid()}.{time.monotonic_ns()}")
    try:
        database = sqlite3.connect(draft, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(_SCHEMA)
            # Ids go on from the clock, so that a spool made anew never gives an id of the one before it.
            database.execute("INSERT INTO sqlite_sequence VALUES ('submission', ?)", (int(time.time()),))
        finally:
            database.close()
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def alive(database: sqlite3.Connection) -> bool:
    """Return whether anything runs, or waits and is not held: whether there is work for a supervisor."""
    query = """SELECT EXISTS (SELECT 1 FROM element WHERE state = 'RUNNING') OR EXISTS (
        SELECT 1 FROM element JOIN submission USING (native_id) WHERE state = 'PENDING' AND NOT held)"""
    return bool(database.execute(query).fetchone()[0])


@dataclass(eq=False)
class _Submission:
    native_id: int
    pool: str
    script: str
    logs: str
    first: int
    array: bool
    cpus: int
    memory: int | None
    gpus: int
    walltime: float | None
    priority: int
    after: list[int]
    environment: dict[str, str]
    held: bool
    waiting: deque[int] = field(default_factory=deque)
    passed: int = 0

    @classmethod
    def of(cls, row: sqlite3.Row) -> _Submission:
        plain = ("native_id", "pool", "script", "logs", "first", "cpus", "memory", "gpus", "walltime", "priority")
        return cls(
            **{name: row[name] for name in plain},
            array=bool(row["array"]),
            held=bool(row["held"]),
            after=json.loads(row["after"]),
            environment=json.loads(row["environment"]),
        )


@dataclass(eq=False)
class _Running:
    submission: _Submission
    index: int
    clock: float
    """Monotonic start: neither a jump of the wall clock nor a suspended laptop uses up walltime."""
    boot: str
    oom: int
    devices: list[int]
    mark: str
    ending: Cause | None = None
    signalled: bool = False
    kill_at: float | None = None
    warned: bool = False
    pid: int | None = None
    watch: int | None = None
    child: Popen[bytes] | None = None
    peak: int = 0
    cpu: float = 0.0
    ended: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.submission.native_id, self.index


@dataclass
class _Pool:
    cpus: int
    memory: int
    gpus: list[int]

    def take(self, submission: _Submission, devices: list[int]) -> None:
        self.cpus -= submission.cpus
        self.memory -= submission.memory or 0
        self.gpus = [device for device in self.gpus if device not in devices]

    def fits(self, submission: _Submission) -> bool:
        return (
            submission.cpus <= self.cpus
            and (submission.memory or 0) <= self.memory
            and submission.gpus <= len(self.gpus)
        )


class Supervisor:
    """Runs what waits in a spool folder until nothing waits or runs for `idle` seconds."""

    def __init__(self, folder: Path, lock: int, idle: float) -> None:
        self.folder, self.lock, self.idle = folder, lock, idle
        self.database = connect(folder)
        self.database.execute("PRAGMA synchronous = NORMAL")
        self.inode = (folder / "spool.sqlite").stat().st_ino
        self.runs = folder / "run"
        self.runs.mkdir(exist_ok=True)
        fifo = folder / "poke"
        with contextlib.suppress(FileExistsError):
            os.mkfifo(fifo, 0o600)
        # Opened before the database is first read: a poke that found no reader was preceded by its submission.
        self.poke = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        self.epoll = select.epoll()
        self.epoll.register(self.poke, select.EPOLLIN)
        self.boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.census = proctree.Census()
        self.submissions: list[_Submission] = []
        self.running: dict[tuple[int, int], _Running] = {}
        self.watched: dict[int, _Running] = {}
        self.shims: dict[int, tuple[str, int | None]] = {}
        self.newest, self.seen, self.dirty = 0, -1, True
        self.sample_at = self.retry_at = 0.0

    def serve(self) -> None:
        """Work until idle. A submission that comes while it ends is seen by it, or starts the next one."""
        self._adopt()
        self._prune()
        while True:
            self._work()
            fcntl.flock(self.lock, fcntl.LOCK_UN)
            if not self._current() or not alive(self.database):
                return
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return

    def _work(self) -> None:
        busy = time.monotonic()
        while self._current():
            try:
                self._refresh()
                self._look()
                self._sample()
                started = self._record()
            except sqlite3.OperationalError as error:  # full disk, or locked for very long
                log(f"database: {error}; trying again")
                self._forget()
                time.sleep(1)
                continue
            for element in started:
                self._start(element)
            now = time.monotonic()
            if self.running or alive(self.database):
                busy = now
            elif now - busy >= self.idle:
                return
            self._wait(now, busy)

    def _current(self) -> bool:
        try:
            return (self.folder / "spool.sqlite").stat().st_ino == self.inode
        except OSError:
            return False

    def _forget(self) -> None:
        if self.database.in_transaction:
            self.database.execute("ROLLBACK")
        self.submissions, self.newest, self.seen, self.dirty = [], 0, -1, True

    # What other processes wrote

    def _refresh(self) -> None:
        (version,) = self.database.execute("PRAGMA data_version").fetchone()
        if version == self.seen:
            return
        query = """SELECT * FROM submission WHERE native_id > ? AND EXISTS (
            SELECT 1 FROM element WHERE state = 'PENDING' AND element.native_id = submission.native_id)"""
        new = {row["native_id"]: _Submission.of(row) for row in self.database.execute(query, (self.newest,))}
        for native_id, index in self.database.execute(
            "SELECT native_id, idx FROM element WHERE state = 'PENDING' AND native_id > ?", (self.newest,)
        ):
            if native_id in new:
                new[native_id].waiting.append(index)
        held = {row[0] for row in self.database.execute("SELECT native_id FROM submission WHERE held")}
        self.submissions = sorted([*self.submissions, *new.values()], key=lambda one: (-one.priority, one.native_id))
        self.newest = max([self.newest, *new])
        for submission in self.submissions:
            submission.held = submission.native_id in held
        for native_id, index, ending in self.database.execute(
            "SELECT native_id, idx, ending FROM element WHERE state = 'RUNNING' AND ending IS NOT NULL"
        ):
            element = self.running.get((native_id, index))
            if element is not None and element.ending is None:
                element.ending = Cause(ending)
        self.seen, self.dirty = version, True

    def _adopt(self) -> None:
        query = "SELECT * FROM element JOIN submission USING (native_id) WHERE state = 'RUNNING'"
        for row in self.database.execute(query):
            element = self._element(_Submission.of(row), row["idx"], row["clock"], json.loads(row["devices"]))
            element.boot, element.oom = row["boot"], row["oom"]
            element.ending = Cause(row["ending"]) if row["ending"] else None
            self.running[element.key] = element
        for path in self.runs.iterdir():
            if path.name not in {Path(element.mark).name for element in self.running.values()}:
                path.unlink(missing_ok=True)
        log(f"started, process {os.getpid()}, adopts {len(self.running)} running")

    def _element(self, submission: _Submission, index: int, clock: float, devices: list[int]) -> _Running:
        mark = str(self.runs / f"{submission.native_id}.{index}")
        return _Running(submission, index, clock, self.boot, proctree.oom_kills(), devices, mark)

    def _prune(self) -> None:
        needed = {
            native_id
            for (after,) in self.database.execute(
                f"SELECT after FROM submission WHERE native_id IN (SELECT native_id FROM element WHERE state IN {LIVE})"
            )
            for native_id in json.loads(after)
        }
        query = f"""SELECT native_id FROM submission WHERE submitted < ? AND NOT EXISTS (
            SELECT 1 FROM element WHERE element.native_id = submission.native_id AND (state IN {LIVE} OR ended > ?))"""
        limit = time.time() - KEEP
        old = [row[0] for row in self.database.execute(query, (limit, limit)) if row[0] not in needed]
        self.database.execute("BEGIN IMMEDIATE")
        for table in ("element", "submission"):
            self.database.executemany(f"DELETE FROM {table} WHERE native_id = ?", [(native_id,) for native_id in old])
        self.database.execute("COMMIT")

    # Running elements

    def _look(self) -> None:
        """Find out which elements have ended, and end those whose time has come."""
        now = time.monotonic()
        for element in self.running.values():
            if element.watch is None and not element.ended:
                self._find_shim(element)
            if element.ended:
                continue
            walltime = element.submission.walltime
            if element.ending is None and walltime is not None and element.boot == self.boot:
                left = element.clock + walltime - now
                if left <= 0:
                    self._will_end(element, Cause.TIMEOUT, "")
                elif left <= min(WARNING, walltime / 10) and not element.warned:
                    self._warn(element)
            if element.ending is not None and element.pid is not None:
                self._end(element, now)

    def _find_shim(self, element: _Running) -> None:
        try:
            descriptor = os.open(element.mark, os.O_RDWR)
        except FileNotFoundError:
            element.ended = True
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            element.ended = True
        except BlockingIOError:
            element.pid = _words(element.mark).get("start")
            if element.pid is not None:
                self._watch(element, descriptor)
        finally:
            os.close(descriptor)

    def _watch(self, element: _Running, descriptor: int) -> None:
        assert element.pid is not None
        try:
            watch = os.pidfd_open(element.pid)
        except ProcessLookupError:
            return
        try:
            # Still locked, so it still lived: the number has not been given to another process meanwhile.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(watch)
            element.ended = True
        except BlockingIOError:
            self._watching(element, watch)

    def _watching(self, element: _Running, watch: int) -> None:
        assert element.pid is not None
        element.watch = watch
        self.watched[watch] = element
        self.epoll.register(watch, select.EPOLLIN)
        self.shims[element.pid] = (element.mark, None)

    def _warn(self, element: _Running) -> None:
        element.warned = True
        for member in self._members().get(element.mark, []):
            if member.parent == element.pid and proctree.catches(member.pid, signal.SIGUSR2):
                proctree.send(signal.SIGUSR2, [member], element.mark)

    def _will_end(self, element: _Running, cause: Cause, reason: str) -> None:
        # On disk before the first signal: the next supervisor must know why the script died.
        element.ending = cause
        self.database.execute(
            "UPDATE element SET ending = ?, reason = ? WHERE native_id = ? AND idx = ?",
            (cause.value, reason, *element.key),
        )

    def _end(self, element: _Running, now: float) -> None:
        if element.kill_at is None:
            log(f"ends {Path(element.mark).name}: {element.ending}")
            members = self._members().get(element.mark, [])
            element.kill_at = now
            element.signalled = True
            if element.ending is not Cause.OUT_OF_MEMORY:
                element.kill_at += GRACE
                proctree.send(signal.SIGTERM, members, element.mark)
                proctree.send(signal.SIGCONT, members, element.mark)
        if now >= element.kill_at:
            proctree.send(signal.SIGKILL, self._members().get(element.mark, []), element.mark)
            element.kill_at = now + 0.2  # again, for what was forked meanwhile

    def _members(self) -> dict[str, list[proctree.Process]]:
        return self.census.take(self.shims)

    def _sample(self) -> None:
        """Measure memory and cpu time, and kill what is left over of elements that have ended."""
        begin = time.monotonic()
        if begin < self.sample_at or not self.shims:
            return
        members = self._members()
        by_mark = {element.mark: element for element in self.running.values()}
        for mark, found in members.items():
            element = by_mark.get(mark)
            if element is None:
                if os.path.dirname(mark) == str(self.runs):
                    proctree.send(signal.SIGKILL, found, mark)
                continue
            element.cpu = max(element.cpu, sum(one.cpu for one in found) / proctree.TICKS)
            element.peak = max(element.peak, proctree.memory(found, element.peak))
            limit = element.submission.memory
            if limit is not None and element.peak > limit and element.ending is None:
                reason = f"used {_rounded(element.peak)} of {format_memory(limit)}"
                self._will_end(element, Cause.OUT_OF_MEMORY, reason)
                self._end(element, begin)
        self.shims = {pid: shim for pid, shim in self.shims.items() if shim[1] is None}
        limited = any(element.submission.memory is not None for element in self.running.values())
        now = time.monotonic()
        self.sample_at = now + max(0.1 if limited else 1.0, 20 * (now - begin))

    # Ends and starts: one transaction a round

    def _record(self) -> list[_Running]:
        ended = [element for element in self.running.values() if element.ended]
        if not (ended or self.dirty):
            return []
        now = time.time()
        outcomes = {element.key: self._outcome(element) for element in ended}
        self.database.execute("BEGIN IMMEDIATE")
        for element in ended:
            outcome = outcomes[element.key]
            if outcome is None:
                self._put_back(element)
                continue
            self.database.execute(
                """UPDATE element SET state = ?, cause = ?, reason = ?, exit_code = ?, ended = ?, cpu_seconds = ?,
                peak_memory = ? WHERE native_id = ? AND idx = ?""",
                (*outcome, now, element.cpu, element.peak or None, *element.key),
            )
        started = self._claim([element for element in self.running.values() if not element.ended])
        self.database.execute("COMMIT")
        self.dirty = False
        for element in ended:
            del self.running[element.key]
            Path(element.mark).unlink(missing_ok=True)
            if outcomes[element.key] is None:
                self._forget()
        self.running.update((element.key, element) for element in started)
        return started

    def _outcome(self, element: _Running) -> tuple[Any, ...] | None:
        """Return state, cause, reason and exit status of an ended element; ``None`` if it never started."""
        words = _words(element.mark)
        code = words.get("exit")
        self._close(element)
        if element.child is not None:
            # Its own child's status is known also if the disk was too full to write it down.
            status = element.child.returncode
            code = status if code is None and status >= 0 and "start" in words else code
        if code is None and "start" in words:
            # The shim is gone, its script may not be: nothing of it may go on once the element has ended.
            proctree.send(signal.SIGKILL, self._members().get(element.mark, []), element.mark)
        if element.ending is not None and (element.signalled or "start" not in words):
            return _ended_by(element, code, self._reason(element))
        if code == 0:
            return JobState.COMPLETED, None, "", 0
        if element.boot != self.boot and code is None:
            return JobState.FAILED, Cause.NODE_FAILURE, "the machine was restarted while it ran", None
        if "start" not in words:
            return None
        if code in (137, None) and proctree.oom_kills() > element.oom:
            return JobState.FAILED, Cause.OUT_OF_MEMORY, "killed while the machine was out of memory", code
        if code is None:
            return JobState.FAILED, Cause.INFRASTRUCTURE, "killed from outside together with its shim", None
        return JobState.FAILED, None, f"exit status {code}", code

    def _reason(self, element: _Running) -> str:
        query = "SELECT reason FROM element WHERE native_id = ? AND idx = ?"
        return str(self.database.execute(query, element.key).fetchone()[0])

    def _close(self, element: _Running) -> None:
        if element.watch is not None:
            self.epoll.unregister(element.watch)
            os.close(element.watch)
            del self.watched[element.watch]
            element.watch = None
        if element.pid is not None:
            # Kept until the next sample, which finds what is left over of its session.
            self.shims[element.pid] = (element.mark, proctree.boot_ticks())
            self.sample_at = min(self.sample_at, time.monotonic() + 0.5)

    def _put_back(self, element: _Running) -> None:
        self.database.execute(
            "UPDATE element SET state = 'PENDING', started = NULL WHERE native_id = ? AND idx = ?", element.key
        )

    def _claim(self, running: list[_Running]) -> list[_Running]:
        pools = self._pools()
        self._settle(pools)
        for element in running:
            if element.submission.pool in pools:
                pools[element.submission.pool].take(element.submission, element.devices)
        started: list[_Running] = []
        if time.monotonic() < self.retry_at:
            return started
        heads: dict[str, _Submission] = {}
        full = {name for name, pool in pools.items() if pool.cpus <= 0}
        for submission in self.submissions:
            if len(full) == len(pools):
                break
            if submission.held or submission.after or submission.pool in full:
                continue
            pool, head = pools[submission.pool], heads.get(submission.pool)
            while submission.waiting and pool.fits(submission) and (head is None or head.passed < PASSES):
                claimed = self._claim_one(submission, pool)
                if claimed is None:
                    continue
                started.append(claimed)
                pool.take(submission, claimed.devices)
                submission.passed = 0
                if head is not None:
                    head.passed += 1
            if submission.waiting and head is None:
                head = heads[submission.pool] = submission
            if pool.cpus <= 0 or (head is not None and head.passed >= PASSES):
                full.add(submission.pool)
        self.submissions = [submission for submission in self.submissions if submission.waiting]
        return started

    def _claim_one(self, submission: _Submission, pool: _Pool) -> _Running | None:
        index = submission.waiting.popleft()
        element = self._element(submission, index, time.monotonic(), pool.gpus[: submission.gpus])
        claimed = self.database.execute(
            """UPDATE element SET state = 'RUNNING', started = ?, clock = ?, boot = ?, oom = ?, devices = ?
            WHERE native_id = ? AND idx = ? AND state = 'PENDING'
            AND NOT (SELECT held FROM submission WHERE submission.native_id = element.native_id)""",
            (time.time(), element.clock, self.boot, element.oom, json.dumps(element.devices), *element.key),
        )
        # None: cancelled or held since; a held one is read again when it is released.
        return element if claimed.rowcount else None

    def _pools(self) -> dict[str, _Pool]:
        rows = self.database.execute("SELECT name, cpus, memory, gpus FROM pool")
        return {name: _Pool(cpus, memory, list(range(gpus))) for name, cpus, memory, gpus in rows}

    def _settle(self, pools: dict[str, _Pool]) -> None:
        """Free or cancel what waits for other submissions, and fail what no longer fits its pool."""
        query = "SELECT EXISTS (SELECT 1 FROM element WHERE native_id = ? AND state IN {})"
        again = True
        while again:
            again = False
            answers: dict[int, str] = {}
            for submission in [one for one in self.submissions if one.after]:
                for native_id in list(submission.after):
                    if native_id not in answers:
                        bad, live = (
                            self.database.execute(query.format(states), (native_id,)).fetchone()[0]
                            for states in ("('FAILED', 'CANCELLED', 'TIMEOUT')", LIVE)
                        )
                        answers[native_id] = "bad" if bad else "live" if live else "done"
                    if answers[native_id] == "bad":
                        reason = f"job {native_id}, which it waits for, did not complete"
                        self._drop(submission, JobState.CANCELLED, Cause.DEPENDENCY_FAILED, reason)
                        again = True
                        break
                    if answers[native_id] == "done":
                        submission.after.remove(native_id)
        for submission in self.submissions:
            if submission.waiting and not pools[submission.pool].fits(submission):
                reason = f"pool {submission.pool} was made smaller than what it asks for"
                self._drop(submission, JobState.FAILED, Cause.SUBMIT_REJECTED, reason)

    def _drop(self, submission: _Submission, state: JobState, cause: Cause, reason: str) -> None:
        self.database.execute(
            "UPDATE element SET state = ?, cause = ?, reason = ?, ended = ? WHERE native_id = ? AND state = 'PENDING'",
            (state.value, cause.value, reason, time.time(), submission.native_id),
        )
        submission.waiting.clear()
        submission.after.clear()

    def _start(self, element: _Running) -> None:
        submission = element.submission
        environment = {
            **submission.environment,
            proctree.MARK: element.mark,
            "HYBRID_LOCAL_JOB": str(submission.native_id),
            **({"HYBRID_ARRAY_INDEX": str(element.index)} if submission.array else {}),
            **({"CUDA_VISIBLE_DEVICES": ",".join(map(str, element.devices))} if element.devices else {}),
        }
        log_file = os.path.join(submission.logs, f"{submission.first + element.index}.out")
        try:
            descriptor = os.open(element.mark, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.dup2(descriptor, _SHIM_LOCK, inheritable=False)
            os.close(descriptor)
            element.child = process.spawn(
                ["/bin/sh", "-c", _SHIM, submission.script],
                log=log_file,
                env=environment,
                cwd=os.path.dirname(submission.script),
                pass_fds=[_SHIM_LOCK],
            )
            element.pid = element.child.pid
            self._watching(element, os.pidfd_open(element.pid))
        except OSError as error:
            self._not_started(element, error)
        finally:
            _reserve_shim_lock()

    def _not_started(self, element: _Running, error: OSError) -> None:
        log(f"cannot start {Path(element.mark).name}: {error}")
        if element.child is not None:  # it runs, but cannot be watched: found again by its lock
            return
        del self.running[element.key]
        if error.errno in _TEMPORARY:
            self._put_back(element)
            self._forget()
            self.retry_at = time.monotonic() + 5
            return
        self.database.execute(
            "UPDATE element SET state = ?, cause = ?, reason = ?, ended = ? WHERE native_id = ? AND idx = ?",
            (JobState.FAILED.value, Cause.INFRASTRUCTURE.value, str(error), time.time(), *element.key),
        )
        self.dirty = True

    # Waiting

    def _wait(self, now: float, busy: float) -> None:
        times = [now + 2.0, *self._deadlines(now)]
        if self.shims:
            times.append(self.sample_at)
        if not self.running:
            times.append(busy + self.idle)
        if self.retry_at > now:
            times.append(self.retry_at)
            self.dirty = True
        for descriptor, _ in self.epoll.poll(max(0.0, min(times) - now) + 0.001):
            if descriptor == self.poke:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.poke, 65536)
                continue
            element = self.watched[descriptor]
            element.ended = True
            if element.child is not None:
                _, status, usage = os.wait4(element.child.pid, 0)
                element.child.returncode = os.waitstatus_to_exitcode(status)
                element.cpu = max(element.cpu, usage.ru_utime + usage.ru_stime)

    def _deadlines(self, now: float) -> Iterator[float]:
        for element in self.running.values():
            walltime = element.submission.walltime
            if element.watch is None:
                yield now + 0.05
            elif element.kill_at is not None:
                yield element.kill_at
            elif walltime is not None:
                end = element.clock + walltime
                yield end if element.warned else end - min(WARNING, walltime / 10)


def _ended_by(element: _Running, code: int | None, reason: str) -> tuple[Any, ...]:
    if element.ending is Cause.TIMEOUT:
        return JobState.TIMEOUT, Cause.TIMEOUT, f"walltime of {element.submission.walltime:g} s used up", code
    if element.ending is Cause.OUT_OF_MEMORY:
        return JobState.FAILED, Cause.OUT_OF_MEMORY, reason, code
    return JobState.CANCELLED, Cause.CANCELLED, "cancelled by its user", code


def _words(mark: str) -> dict[str, int]:
    """Return what the shim has written: ``{"start": pid, "exit": status}``, complete lines only."""
    try:
        text = Path(mark).read_text()
    except OSError:
        return {}
    lines = (line.split() for line in text.splitlines(keepends=True) if line.endswith("\n"))
    return {word: int(number) for word, number in lines}


def _rounded(amount: int) -> str:
    for power, unit in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if amount >= 1024**power:
            return f"{amount / 1024**power:.1f}{unit}"
    return str(amount)


def _reserve_shim_lock() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, _SHIM_LOCK, inheritable=False)
    if null != _SHIM_LOCK:
        os.close(null)


def log(text: str) -> None:
    """Append a line to ``supervisor.log``, which is standard error; at its full size it begins anew."""
    if os.fstat(2).st_size > LOG_SIZE:
        os.replace("supervisor.log", "supervisor.log.1")
        descriptor = os.open("supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    os.write(2, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())


def main() -> None:
    """Run as ``supervisor LOCK`` in the spool folder; LOCK is the number of the inherited, locked descriptor."""
    lock = int(sys.argv[1])
    os.set_inheritable(lock, False)
    if lock == _SHIM_LOCK:
        lock = fcntl.fcntl(lock, fcntl.F_DUPFD_CLOEXEC, 10)
    _reserve_shim_lock()
    with contextlib.suppress(PermissionError):
        os.setsid()
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # ignored in a background child of sh, and so would be in every job
    idle = float(os.environ.get("HYBRID_SUPERVISOR_IDLE", "10"))
    os.environ.clear()  # jobs get the environment of their submission, nothing of this process
    try:
        Supervisor(Path.cwd(), lock, idle).serve()
    except Exception:
        log(traceback.format_exc())
        raise


if __name__ == "__main__":
    main()
