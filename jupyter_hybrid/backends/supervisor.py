"""The program that runs the jobs of the local pools of one user: ``python -m jupyter_hybrid.backends.supervisor``.

The database is the truth: what the supervisor has in memory is read from it anew whenever another process wrote to it,
every change of an element is written before it is acted upon, and each script has a shim that outlives the supervisor.
So a supervisor killed between any two system calls loses and doubles nothing; the next one adopts what runs.

One supervisor serves a folder. It inherits the lock on ``supervisor.lock``, already taken, from the client that starts
it, and holds it for its life.
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
from collections.abc import Iterator
from pathlib import Path

from ..spec import Cause, JobState, format_memory
from . import proctree, shim
from .element import Element, Outcome, outcome_of
from .slots import Request, Slots, start
from .spool import alive, connect, prune, request_of, settle

WARNING = 30.0
"""Most seconds before walltime at which a script that handles SIGUSR2 gets it; a tenth of the walltime if less."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
LOG_SIZE = 1 << 20

_TEMPORARY = {errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}


class Supervisor:
    """Runs what waits in a spool folder until nothing waits or runs for `idle` seconds."""

    def __init__(self, folder: Path, lock: int, idle: float) -> None:
        self.folder, self.lock, self.idle = folder, lock, idle
        self.runs = folder / "run"
        self.runs.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(folder / "poke", 0o600)
        # Open before the database is first read: a poke that finds no reader comes after its submission.
        self.poke = os.open(folder / "poke", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.epoll = select.epoll()
        self.epoll.register(self.poke, select.EPOLLIN)
        self.database = connect(folder)
        self.database.execute("PRAGMA synchronous = NORMAL")
        self.inode = os.stat(folder / "spool.sqlite").st_ino
        self.boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.census = proctree.Census()
        self.requests: list[Request] = []
        self.running: dict[tuple[int, int], Element] = {}
        self.shims: dict[int, tuple[str, int | None]] = {}
        self.newest, self.version, self.changed = 0, -1, True
        self.sample_at = self.retry_at = 0.0
        self.sweep = True  # something may be left over of an element that has ended

    def serve(self) -> None:
        """Work until idle. A submission that comes while it ends is seen by it, or starts the next one."""
        self._adopt()
        prune(self.database)
        while True:
            self._work()
            fcntl.flock(self.lock, fcntl.LOCK_UN)
            if not self._has_folder() or not alive(self.database):
                return
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return

    def _work(self) -> None:
        busy = time.monotonic()
        while self._has_folder():
            try:
                self._refresh()
                self._look()
                self._sample()
                for element in self._record():
                    self._start(element)
                working = bool(self.running) or self.sweep or alive(self.database)
            except sqlite3.OperationalError as error:  # a full disk, or locked for very long
                log(f"database: {error}; trying again")
                self._forget()
                time.sleep(1)
                continue
            now = time.monotonic()
            if working:
                busy = now
            elif now - busy >= self.idle:
                return
            self._wait(now, busy)

    def _has_folder(self) -> bool:
        try:
            return os.stat(self.folder / "spool.sqlite").st_ino == self.inode
        except OSError:
            return False

    # What other processes wrote

    def _adopt(self) -> None:
        query = "SELECT * FROM element JOIN submission USING (native_id) WHERE state = 'RUNNING'"
        for row in self.database.execute(query):
            request = request_of(row)
            element = Element(
                request,
                row["idx"],
                self._file(request, row["idx"]),
                row["clock"],
                row["boot"],
                row["oom"],
                json.loads(row["devices"]),
                ending=Cause(row["ending"]) if row["ending"] else None,
                signalled=bool(row["signalled"]),
                reason=row["reason"],
            )
            self.running[element.key] = element
        files = {element.file for element in self.running.values()}
        for path in self.runs.iterdir():
            if str(path) not in files:
                path.unlink()
        log(f"process {os.getpid()} starts, {len(files)} elements are running")

    def _file(self, request: Request, index: int) -> str:
        return str(self.runs / f"{request.native_id}.{index}")

    def _refresh(self) -> None:
        (version,) = self.database.execute("PRAGMA data_version").fetchone()
        if version == self.version:
            return
        query = """SELECT * FROM submission WHERE native_id > ? AND EXISTS (
            SELECT 1 FROM element WHERE state = 'PENDING' AND element.native_id = submission.native_id)"""
        new = {row["native_id"]: request_of(row) for row in self.database.execute(query, (self.newest,))}
        waiting = "SELECT native_id, idx FROM element WHERE state = 'PENDING' AND native_id > ?"
        for native_id, index in self.database.execute(waiting, (self.newest,)):
            if native_id in new:
                new[native_id].waiting.append(index)
        self.requests = sorted([*self.requests, *new.values()], key=lambda request: request.order)
        self.newest = max([self.newest, *new])
        held = {row[0] for row in self.database.execute("SELECT native_id FROM submission WHERE held")}
        for request in self.requests:
            request.held = request.native_id in held
        ending = "SELECT native_id, idx, ending FROM element WHERE state = 'RUNNING' AND ending IS NOT NULL"
        for native_id, index, cause in self.database.execute(ending):
            element = self.running.get((native_id, index))
            if element is not None and element.ending is None:
                element.ending = Cause(cause)
        self.version, self.changed = version, True

    def _forget(self) -> None:
        """Read everything that waits anew."""
        if self.database.in_transaction:
            self.database.execute("ROLLBACK")
        self.requests, self.newest, self.version = [], 0, -1

    # Running elements

    def _look(self) -> None:
        """Find out which elements have ended, and end those whose time has come."""
        now = time.monotonic()
        for element in self.running.values():
            if element.watch is None and not element.ended:
                self._find(element)
            if element.ended:
                continue
            walltime = element.request.walltime
            if element.ending is None and walltime is not None and element.boot == self.boot:
                left = element.clock + walltime - now
                if left <= 0:
                    self._will_end(element, Cause.TIMEOUT, f"walltime of {walltime:g} s used up")
                elif left <= _warning(walltime) and not element.warned:
                    self._warn(element)
            if element.ending is not None and element.pid is not None:
                self._end(element, now)

    def _find(self, element: Element) -> None:
        pid = shim.words(element.file).get("start")
        if pid is not None:
            self._watch(element, pid)
        # Only now: if the lock is still held, the number has not gone to another process before it was watched.
        if not shim.is_held(element.file):
            element.ended = True

    def _watch(self, element: Element, pid: int) -> None:
        element.pid = pid
        self.shims[pid] = (element.file, None)
        # Linux 5.3 and a Python that was built for it; without, the lock is looked at many times a second.
        with contextlib.suppress(OSError, AttributeError):
            element.watch = os.pidfd_open(pid)
            self.epoll.register(element.watch, select.EPOLLIN)

    def _warn(self, element: Element) -> None:
        element.warned = True
        for member in self.census.take(self.shims).get(element.file, []):
            if member.parent == element.pid and proctree.catches(member.pid, signal.SIGUSR2):
                proctree.send(signal.SIGUSR2, [member], element.file)

    def _will_end(self, element: Element, cause: Cause, reason: str) -> None:
        element.ending, element.reason = cause, reason
        self._update(element, ending=cause.value, reason=reason)

    def _end(self, element: Element, now: float) -> None:
        if element.kill_at is None:
            log(f"ends {element.key}: {element.ending} {element.reason}")
            if not element.signalled:
                # On disk before the first signal: the next supervisor must know why the script died.
                self._update(element, signalled=1)
                element.signalled = True
            element.kill_at = now
            if element.ending is not Cause.OUT_OF_MEMORY:
                element.kill_at += GRACE
                members = self.census.take(self.shims).get(element.file, [])
                proctree.send(signal.SIGTERM, members, element.file)
                proctree.send(signal.SIGCONT, members, element.file)
        if now >= element.kill_at:
            proctree.send(signal.SIGKILL, self.census.take(self.shims).get(element.file, []), element.file)
            element.kill_at = now + 0.2  # again, for what was forked meanwhile

    def _update(self, element: Element, **values: object) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        query = f"UPDATE element SET {names} WHERE native_id = ? AND idx = ?"
        self.database.execute(query, (*values.values(), *element.key))

    def _sample(self) -> None:
        """Measure memory and cpu time, and kill what is left over of elements that have ended."""
        begin = time.monotonic()
        if begin < self.sample_at or not (self.running or self.sweep):
            return
        self.sweep = False
        by_file = {element.file: element for element in self.running.values()}
        for file, members in self.census.take(self.shims).items():
            element = by_file.get(file)
            if element is not None:
                self._measure(element, members, begin)
            elif os.path.dirname(file) == str(self.runs):
                proctree.send(signal.SIGKILL, members, file)
                self.sweep = True  # once more, for what was forked meanwhile
        self.shims = {pid: known for pid, known in self.shims.items() if known[1] is None}
        limited = any(element.request.memory is not None for element in self.running.values())
        now = time.monotonic()
        self.sample_at = now + max(0.1 if limited else 1.0, 20 * (now - begin))

    def _measure(self, element: Element, members: list[proctree.Process], now: float) -> None:
        element.cpu = max(element.cpu, sum(member.cpu for member in members) / proctree.TICKS)
        element.peak = max(element.peak, proctree.memory(members, element.peak))
        limit = element.request.memory
        if limit is not None and element.peak > limit and element.ending is None:
            self._will_end(element, Cause.OUT_OF_MEMORY, f"used {_rounded(element.peak)} of {format_memory(limit)}")
            self._end(element, now)

    # Ends and starts: one transaction a round

    def _record(self) -> list[Element]:
        ended = {element: self._outcome(element) for element in self.running.values() if element.ended}
        if not ended and not self.changed:
            return []
        started: list[Element] = []
        now = time.time()
        self.database.execute("BEGIN IMMEDIATE")
        for element, outcome in ended.items():
            if outcome is None:
                self._update(element, state=JobState.PENDING.value, started=None)
            else:
                used = {"cpu_seconds": element.cpu, "peak_memory": element.peak or None}
                self._update(element, **outcome.values(now), **used)
        lost = self._claim([element for element in self.running.values() if not element.ended], started)
        self.database.execute("COMMIT")
        self.changed = False
        for element, outcome in ended.items():
            del self.running[element.key]
            Path(element.file).unlink(missing_ok=True)
            lost = lost or outcome is None
        if lost:
            self._forget()
        self.running.update((element.key, element) for element in started)
        return started

    def _outcome(self, element: Element) -> Outcome | None:
        """Return how an element ended; ``None`` if it never started."""
        self._close(element)
        words = shim.words(element.file)
        if "start" in words and "exit" not in words:
            if element.child is not None and element.child.returncode >= 0:
                words["exit"] = element.child.returncode  # the disk was too full to write it down
            else:
                # The shim is gone, its script may not be: nothing of it may go on once the element has ended.
                proctree.send(signal.SIGKILL, self.census.take(self.shims).get(element.file, []), element.file)
        return outcome_of(element, words, self.boot)

    def _close(self, element: Element) -> None:
        if element.watch is not None:
            os.close(element.watch)  # which also takes it out of epoll
            element.watch = None
        if element.child is not None and element.child.returncode is None:
            _, status, usage = os.wait4(element.child.pid, 0)
            element.child.returncode = os.waitstatus_to_exitcode(status)
            element.cpu = max(element.cpu, usage.ru_utime + usage.ru_stime)
        if element.pid is not None:
            # Kept until the next sample, which ends what is left over of its session.
            self.sweep = True
            self.shims[element.pid] = (element.file, proctree.boot_ticks())
            self.sample_at = min(self.sample_at, time.monotonic() + 0.5)

    def _claim(self, running: list[Element], started: list[Element]) -> bool:
        """Mark what starts now as RUNNING; return whether something that waited here did not wait any more."""
        rows = self.database.execute("SELECT name, cpus, memory, gpus FROM pool")
        free = {name: Slots(cpus, memory, list(range(gpus))) for name, cpus, memory, gpus in rows}
        settle(self.database, self.requests, free)
        for element in running:
            free[element.request.pool].take(element.request, element.devices)
        clock, wall, oom, lost = time.monotonic(), time.time(), proctree.oom_kills(), False

        def claim(request: Request, index: int, devices: list[int]) -> bool:
            nonlocal lost
            query = """UPDATE element SET state = 'RUNNING', started = ?, clock = ?, boot = ?, oom = ?, devices = ?
                WHERE native_id = ? AND idx = ? AND state = 'PENDING'
                AND NOT (SELECT held FROM submission WHERE submission.native_id = element.native_id)"""
            values = (wall, clock, self.boot, oom, json.dumps(devices), request.native_id, index)
            if not self.database.execute(query, values).rowcount:
                lost = True  # cancelled or held since
                return False
            file = self._file(request, index)
            started.append(Element(request, index, file, clock, self.boot, oom, devices))
            return True

        if clock >= self.retry_at:
            start(self.requests, free, claim)
        self.requests = [request for request in self.requests if request.waiting]
        return lost

    def _start(self, element: Element) -> None:
        request = element.request
        environment = {**request.environment, proctree.MARK: element.file, "HYBRID_LOCAL_JOB": str(request.native_id)}
        environment.pop("HYBRID_ARRAY_INDEX", None)
        if request.array:
            environment["HYBRID_ARRAY_INDEX"] = str(element.index)
        if request.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, element.devices))
        output = os.path.join(request.logs, f"{request.first + element.index}.out")
        try:
            element.child = shim.start(element.file, request.script, output, environment)
            self._watch(element, element.child.pid)
            self.sample_at = min(self.sample_at, time.monotonic() + 0.25)
        except OSError as error:
            log(f"cannot start {element.key}: {error}")
            self._not_started(element, error)

    def _not_started(self, element: Element, error: OSError) -> None:
        Path(element.file).unlink(missing_ok=True)
        if error.errno in _TEMPORARY:
            self._update(element, state=JobState.PENDING.value, started=None, reason=str(error))
            self._forget()
            self.retry_at = time.monotonic() + 5
        else:
            outcome = Outcome(JobState.FAILED, Cause.INFRASTRUCTURE, str(error), None)
            self._update(element, **outcome.values(time.time()))
        del self.running[element.key]
        self.changed = True

    # Waiting

    def _wait(self, now: float, busy: float) -> None:
        until = min(now + 2.0, *self._deadlines(now, busy))
        events = self.epoll.poll(max(0.0, until - now) + 0.001)
        ready = {descriptor for descriptor, _ in events}
        if self.poke in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self.poke, 65536)
        for element in self.running.values():
            element.ended = element.ended or element.watch in ready
        if now < self.retry_at <= time.monotonic():
            self.changed = True

    def _deadlines(self, now: float, busy: float) -> Iterator[float]:
        if self.running or self.sweep:
            yield self.sample_at
        if self.retry_at > now:
            yield self.retry_at
        if self.changed:
            yield now
        if not self.running:
            yield busy + self.idle
        for element in self.running.values():
            walltime = element.request.walltime
            if element.watch is None:
                yield now + 0.02
            elif element.kill_at is not None:
                yield element.kill_at
            elif walltime is not None:
                yield element.clock + walltime - (0.0 if element.warned else _warning(walltime))


def _warning(walltime: float) -> float:
    return min(WARNING, walltime / 10)


def _rounded(amount: int) -> str:
    for power, unit in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if amount >= 1024**power:
            return f"{amount / 1024**power:.1f}{unit}"
    return str(amount)


def log(text: str) -> None:
    """Append a line to ``supervisor.log``, which is standard error; at its full size it begins anew."""
    if os.fstat(2).st_size > LOG_SIZE:
        with contextlib.suppress(OSError):
            os.replace("supervisor.log", "supervisor.log.1")
            descriptor = os.open("supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(descriptor, 2)
            os.close(descriptor)
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())


def main() -> None:
    """Run as ``supervisor LOCK`` in the spool folder; LOCK is the number of the inherited, locked descriptor."""
    lock = fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, shim.LOCK + 1)
    os.close(int(sys.argv[1]))
    shim.reserve()
    os.setsid()
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # ignored in a background child of sh, and so would be in every job
    idle = float(os.environ.get("HYBRID_SUPERVISOR_IDLE", "10"))
    os.environ.clear()  # jobs get the environment of their submission, nothing of this process
    try:
        supervisor = Supervisor(Path.cwd(), lock, idle)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        supervisor.serve()
    except Exception:
        log(traceback.format_exc())
        raise


if __name__ == "__main__":
    main()
