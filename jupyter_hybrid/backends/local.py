"""The local pool: a small batch system on this machine, for one user, without root and without daemons.

A submission is one transaction in the SQLite file of the spool folder; a supervisor process (see
:mod:`jupyter_hybrid.backends.supervisor`) runs what waits there, is started when there is work and ends when there is
none. Reading needs no supervisor.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import process
from ..errors import PoolUnreachable, ResourceError, SubmitRejected, SubmitUnclear
from ..spec import Cause, JobState, Resources, format_memory, round_memory
from . import proctree
from .base import Observation, PoolSnapshot, Submission
from .spool import LIVE, alive, connect, has_any

if TYPE_CHECKING:
    from ..config import PoolConfig

_IGNORED = ("partition", "qos", "account", "constraint", "extra")
FAILED_STARTS = 5
"""So many supervisors in a row that did not come up make the pool unreachable; each further call still tries."""


class LocalBackend:
    """Runs jobs on this machine in slots of cpus, memory and gpus; satisfies :class:`~.base.Backend`.

    A job gets the environment of the process that submitted it, as with ``sbatch``, and starts in the folder of its
    script. Resources that one machine does not have (partition, qos, account, constraint, extra) are ignored, so that a
    notebook moves between pools unchanged. Without a memory request a job takes no memory slot and has no limit.

    Parameters
    ----------
    folder : pathlib.Path
        Spool folder of this user, on a local disk. Several pools may share it; one supervisor serves it.
    pool : str
        Name of the pool.
    cpus, memory, gpus : int, optional
        What its jobs may use together: cores, bytes, devices. By default what this machine or its container has, and
        no gpus.
    """

    kind = "local"
    index_variable = "HYBRID_ARRAY_INDEX"
    idempotent = True

    def __init__(
        self, folder: Path, pool: str = "local", cpus: int | None = None, memory: int | None = None, gpus: int = 0
    ) -> None:
        self.folder = Path(folder).absolute()
        self.pool = pool
        self.cpus = cpus if cpus is not None else machine_cpus()
        self.memory = memory if memory is not None else machine_memory()
        self.gpus = gpus

    @classmethod
    def from_pool(cls, config: PoolConfig) -> LocalBackend:
        """Return the backend of a configured pool; all local pools of a user on one host share a spool folder."""
        from ..storage import data_folder

        folder = data_folder() / "local" / socket.gethostname()
        return cls(folder, config.name, **config.options)

    def submit(self, submission: Submission) -> str:
        """Put a submission into the queue; with a tag that is there already, only return its native id."""
        try:
            self.check(submission.resources)
        except ResourceError as error:
            raise SubmitRejected(str(error)) from None
        try:
            os.makedirs(submission.logs, exist_ok=True)
        except OSError as error:
            raise PoolUnreachable(f"folder {submission.logs} for logs cannot be made: {error}") from error
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            native_id = self._known(database, [submission.tag]).get(submission.tag)
            if native_id is None:
                native_id = self._insert(database, submission)
            try:
                database.execute("COMMIT")
            except sqlite3.Error as error:
                raise SubmitUnclear(f"local spool {self.folder} broke off a submission: {error}") from error
        # It is in the queue, whatever comes now; a supervisor that cannot be started is told by query().
        with contextlib.suppress(PoolUnreachable):
            self._wake()
        return native_id

    def _insert(self, database: sqlite3.Connection, submission: Submission) -> str:
        resources = submission.resources
        values = {
            "tag": submission.tag,
            "pool": self.pool,
            "name": submission.name,
            "script": str(submission.script.absolute()),
            "logs": str(submission.logs.absolute()),
            "first": submission.first,
            "count": submission.count,
            "array": submission.array,
            "cpus": resources.total_cpus,
            "memory": resources.memory,
            "gpus": resources.gpus,
            "walltime": resources.time.total_seconds() if resources.time is not None else None,
            "priority": resources.priority,
            "after": json.dumps(self._after(database, submission.after)),
            "environment": json.dumps(dict(os.environ)),
            "submitted": time.time(),
        }
        slots = (self.pool, self.cpus, self.memory, self.gpus)
        database.execute("INSERT OR REPLACE INTO pool VALUES (?, ?, ?, ?)", slots)
        columns, names = ", ".join(values), ", ".join(f":{name}" for name in values)
        native_id = database.execute(f"INSERT INTO submission ({columns}) VALUES ({names})", values).lastrowid
        elements = ((native_id, index) for index in range(submission.count))
        database.executemany("INSERT INTO element (native_id, idx) VALUES (?, ?)", elements)
        return str(native_id)

    def find(self, tags: Iterable[str]) -> Mapping[str, str]:
        """Return the native id of each known tag."""
        with self._database() as database:
            return self._known(database, tags)

    def query(self, native_ids: Sequence[str]) -> Sequence[Observation]:
        """Return the state of every element; starts a supervisor if there is work and none is alive."""
        host, observations = socket.gethostname(), []
        query = """SELECT native_id, idx, array, state, cause, reason, exit_code, started, ended, cpu_seconds,
            peak_memory FROM element JOIN submission USING (native_id) WHERE native_id = ? ORDER BY idx"""
        with self._database() as database:
            for native_id in native_ids:
                waits = _waits_for(database, native_id)
                observations += [_observation(row, waits, host) for row in database.execute(query, (native_id,))]
            work = alive(database)
        if work:
            self._ensure_supervisor()
        return observations

    def cancel(self, native_id: str, indices: Sequence[int] | None = None) -> None:
        """End waiting elements at once, running ones by SIGTERM and after a grace by SIGKILL."""
        where = "native_id = ?" if indices is None else "native_id = ? AND idx = ?"
        rows: list[tuple[object, ...]] = [(native_id,)] if indices is None else [(native_id, one) for one in indices]
        with self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(
                f"""UPDATE element SET state = 'CANCELLED', cause = 'CANCELLED', reason = 'cancelled by its user',
                ended = {time.time()!r} WHERE {where} AND state = 'PENDING'""",
                rows,
            )
            database.executemany(
                f"UPDATE element SET ending = 'CANCELLED' WHERE {where} AND state = 'RUNNING' AND ending IS NULL", rows
            )
            database.execute("COMMIT")
        self._wake()

    def hold(self, native_id: str) -> None:
        """Keep elements that wait from starting."""
        self._set_held(native_id, True)

    def release(self, native_id: str) -> None:
        """Let them start again."""
        self._set_held(native_id, False)

    def snapshot(self) -> PoolSnapshot:
        """Return what is free now."""
        query = """SELECT COUNT(*), TOTAL(cpus), TOTAL(gpus), TOTAL(memory)
            FROM element JOIN submission USING (native_id) WHERE state = ? AND pool = ?"""
        with self._database() as database:
            running, cpus, gpus, memory = database.execute(query, ("RUNNING", self.pool)).fetchone()
            queued, *_ = database.execute(query, ("PENDING", self.pool)).fetchone()
        return PoolSnapshot(
            free_cpus=max(0, self.cpus - int(cpus)),
            total_cpus=self.cpus,
            nodes=1,
            queued=queued,
            running=running,
            free_gpus=max(0, self.gpus - int(gpus)),
            total_gpus=self.gpus,
            memory=self.memory,
            free_memory=max(0, self.memory - int(memory)),
            total_memory=self.memory,
        )

    def check(self, resources: Resources) -> list[str]:
        """Return the names of what is asked for and has no meaning on one machine; it is ignored.

        Raises
        ------
        ResourceError
            It asks for more than there is, and could never start.
        """
        wrong = []
        if resources.nodes > 1:
            wrong.append(f"{resources.nodes} nodes, it is one machine")
        if resources.total_cpus > self.cpus:
            factors = f" ({resources.nodes * resources.tasks_per_node} processes of {resources.cpus})"
            product = factors if resources.total_cpus > resources.cpus else ""
            wrong.append(f"{resources.total_cpus} cpus{product}, it has {self.cpus}")
        if (resources.memory or 0) > self.memory:
            wrong.append(f"memory {format_memory(resources.memory or 0)}, it has {round_memory(self.memory)}")
        if resources.gpus > self.gpus:
            wrong.append(f"{resources.gpus} gpu{'s' * (resources.gpus != 1)}, it has {self.gpus or 'none'}")
        if wrong:
            said = f"pool {self.pool!r} can never run this: it asks for {'; and for '.join(wrong)}"
            advice = "ask for less, or choose a larger pool (hy.pools() lists them)"
            if resources.gpus > self.gpus == 0:
                advice += f"; if this machine has gpus, say how many as 'gpus:' of pool {self.pool!r} in hybrid.yaml"
            raise ResourceError(f"{said}. What to do: {advice}")
        return [name for name in _IGNORED if getattr(resources, name)]

    def _after(self, database: sqlite3.Connection, after: Sequence[str]) -> list[int]:
        for native_id in after:
            query = "SELECT EXISTS (SELECT 1 FROM submission WHERE native_id = ?)"
            if not database.execute(query, (native_id,)).fetchone()[0]:
                raise SubmitRejected(f"pool {self.pool} does not know job {native_id}, which this job waits for")
        return [int(native_id) for native_id in after]

    def _known(self, database: sqlite3.Connection, tags: Iterable[str]) -> dict[str, str]:
        query = "SELECT native_id FROM submission WHERE tag = ?"
        rows = ((tag, database.execute(query, (tag,)).fetchone()) for tag in tags)
        return {tag: str(row[0]) for tag, row in rows if row is not None}

    def _set_held(self, native_id: str, held: bool) -> None:
        with self._database() as database:
            database.execute("UPDATE submission SET held = ? WHERE native_id = ?", (held, native_id))
        self._wake()

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        # Opened for each call: a connection must not be used in a forked child or in another thread.
        with process.unforked:
            database = connect(self.folder)
            try:
                yield database
            except sqlite3.Error as error:
                raise PoolUnreachable(f"local spool {self.folder} cannot be used: {error}") from error
            finally:
                database.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # nobody listens: then the lock is free, or the database is yet to be read
            poke = os.open(self.folder / "poke", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(poke, b"!")
            finally:
                os.close(poke)
        self._ensure_supervisor()

    def _ensure_supervisor(self) -> None:
        try:
            lock = os.open(self.folder / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PoolUnreachable(f"local spool {self.folder} cannot be used: {error}") from error
        try:
            # The supervisor inherits the lock already taken: two clients never start two, whatever the moment.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._start_supervisor(lock)
        except BlockingIOError:
            return
        finally:
            os.close(lock)

    def _start_supervisor(self, lock: int) -> None:
        # A supervisor that came up has put its process id in place of this count.
        before = os.pread(lock, 64, 0).decode(errors="replace").split()
        failed = int(before[1]) if len(before) == 2 and before[0] == "starts" else 0
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"starts {failed + 1}".encode(), 0)
        # Through sh, which ends at once: the supervisor is nobody's child and nobody has to wait for it.
        start = 'exec >>supervisor.log 2>&1; "$@" & :'
        command = [sys.executable, "-m", "jupyter_hybrid.backends.supervisor", str(lock)]
        with process.inheriting(lock):
            # A job may submit jobs: neither the supervisor nor what it runs belongs to that job.
            process.run(["/bin/sh", "-c", start, "sh", *command], cwd=str(self.folder), env={proctree.MARK: ""})
        if failed >= FAILED_STARTS:
            said = (self.folder / "supervisor.log").read_text(errors="replace").strip()[-500:]
            raise PoolUnreachable(f"the supervisor of pool {self.pool} does not come up; it says: {said}")


def _observation(row: sqlite3.Row, waits: str, host: str) -> Observation:
    state = JobState(row["state"])
    return Observation(
        native_id=str(row["native_id"]),
        index=row["idx"] if row["array"] else None,
        state=state,
        cause=Cause(row["cause"]) if row["cause"] else None,
        reason=row["reason"] if state is not JobState.PENDING else row["reason"] or waits,
        host=host if row["started"] is not None else "",
        exit_code=row["exit_code"],
        started=row["started"],
        ended=row["ended"],
        cpu_seconds=row["cpu_seconds"],
        peak_memory=row["peak_memory"],
    )


def _waits_for(database: sqlite3.Connection, native_id: str) -> str:
    row = database.execute("SELECT held, after FROM submission WHERE native_id = ?", (native_id,)).fetchone()
    if row is None:
        return ""
    jobs = [str(job) for job in json.loads(row["after"]) if has_any(database, job, LIVE)]
    if row["held"]:
        return "held by its user"
    return f"waits for job {', '.join(jobs)}" if jobs else "waits for free slots"


def machine_cpus() -> int:
    """Return the cores this process may use, by affinity and the container's quota."""
    cpus = len(os.sched_getaffinity(0))
    quota = _limits("cpu.max", "cpu/cpu.cfs_quota_us")
    period = _limits("cpu/cpu.cfs_period_us") or [100000]
    if len(quota) == 2:
        period = quota[1:]
    return max(1, min(cpus, round(quota[0] / period[0]))) if quota and quota[0] > 0 else cpus


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container if that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_limits("memory.max", "memory/memory.limit_in_bytes")])


def _limits(*names: str) -> list[int]:
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            return [int(word) for word in Path("/sys/fs/cgroup", name).read_text().split()]
    return []
