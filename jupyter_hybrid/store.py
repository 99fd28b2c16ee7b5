"""The Store: the SQLite index of all jobs of a user. The run folders are the truth; this can be rebuilt from them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import JobNotFound, StoreError
from .process import unforked
from .spec import Cause, JobSpec, JobState, new_id
from .storage import Attempt

_VERSION = 1
_SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, seq INTEGER NOT NULL, name TEXT NOT NULL, pool TEXT NOT NULL, kind TEXT NOT NULL,
    state TEXT NOT NULL, cause TEXT, reason TEXT NOT NULL DEFAULT '', array INTEGER NOT NULL, tasks INTEGER NOT NULL,
    done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0, running INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL, created REAL NOT NULL, started REAL, ended REAL, cpu_seconds REAL, peak_memory INTEGER,
    cpus INTEGER NOT NULL, memory INTEGER, time REAL, native_id TEXT NOT NULL DEFAULT '', folder TEXT NOT NULL,
    notebook TEXT NOT NULL DEFAULT '', function TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE INDEX jobs_created ON jobs (created DESC, id);
CREATE INDEX jobs_state ON jobs (state, pool, created DESC);
CREATE INDEX jobs_pool ON jobs (pool, created DESC);
CREATE INDEX jobs_seq ON jobs (seq);
CREATE INDEX jobs_function ON jobs (function, created DESC);
CREATE TABLE submissions (
    tag TEXT PRIMARY KEY, job TEXT NOT NULL, pool TEXT NOT NULL, attempt INTEGER NOT NULL, chunk INTEGER NOT NULL,
    first INTEGER NOT NULL, batches INTEGER NOT NULL, state TEXT NOT NULL, native_id TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE INDEX submissions_job ON submissions (job, attempt, chunk);
CREATE INDEX submissions_new ON submissions (pool, state) WHERE state IN ('new', 'submitted');
CREATE TABLE batches (
    job TEXT NOT NULL, batch INTEGER NOT NULL, state TEXT NOT NULL, cause TEXT, reason TEXT NOT NULL DEFAULT '',
    host TEXT NOT NULL DEFAULT '', exit_code INTEGER, restarts INTEGER NOT NULL DEFAULT 0, estimated_start REAL,
    cpu_seconds REAL, peak_memory INTEGER, PRIMARY KEY (job, batch)
) WITHOUT ROWID;
CREATE TABLE cache (key TEXT PRIMARY KEY, job TEXT NOT NULL, task INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX cache_job ON cache (job);
CREATE TABLE pools (
    name TEXT PRIMARY KEY, owner TEXT NOT NULL DEFAULT '', beat INTEGER NOT NULL DEFAULT 0,
    unreachable_since REAL, error TEXT NOT NULL DEFAULT '', snapshot TEXT, snapshot_time REAL
) WITHOUT ROWID;
CREATE TABLE sequence (value INTEGER NOT NULL);
INSERT INTO sequence VALUES (0);
"""

_abandoned: list[sqlite3.Connection] = []
"""Never closed: in a forked child, closing would touch the locks of the parent; a deleted file needs no care."""

_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "panfs", "9p", "fuse", "gfs2")


class JobRow(NamedTuple):
    """One job as the Store knows it; times are seconds since the epoch, memory bytes."""

    id: str
    seq: int
    name: str
    pool: str
    kind: str
    state: JobState
    cause: Cause | None
    reason: str
    array: bool
    tasks: int
    done: int
    failed: int
    running: int
    attempt: int
    created: float
    started: float | None
    ended: float | None
    cpu_seconds: float | None
    peak_memory: int | None
    cpus: int
    memory: int | None
    time: float | None
    native_id: str
    folder: str
    notebook: str
    function: str


class SubmissionRow(NamedTuple):
    """One submission of a job: `state` is ``new``, ``submitted``, ``rejected`` or ``cancelled``."""

    tag: str
    job: str
    pool: str
    attempt: int
    chunk: int
    first: int
    batches: int
    state: str
    native_id: str


class BatchRow(NamedTuple):
    """What the scheduler last said of one batch."""

    batch: int
    state: JobState
    cause: Cause | None
    reason: str
    host: str
    exit_code: int | None
    restarts: int
    estimated_start: float | None
    cpu_seconds: float | None
    peak_memory: int | None


@dataclass(frozen=True)
class PoolRow:
    """What all processes of a user share about a pool."""

    owner: str
    beat: int
    unreachable_since: float | None
    error: str
    snapshot: dict[str, Any] | None
    snapshot_time: float | None


_JOB_COLUMNS = ", ".join(JobRow._fields)
_STATES = {state.value: state for state in JobState}
_ENDED = "('" + "', '".join(state.value for state in JobState if state.final) + "')"
_CAUSES: dict[str | None, Cause | None] = {None: None, **{cause.value: cause for cause in Cause}}


def _job_row(_cursor: object, row: tuple[Any, ...]) -> JobRow:
    return JobRow._make((*row[:5], _STATES[row[5]], _CAUSES[row[6]], row[7], bool(row[8]), *row[9:]))


def network_file_system(path: Path) -> bool:
    """Return whether a folder is on a network file system, where SQLite's WAL mode does not work."""
    best, kind = "", ""
    resolved = os.path.realpath(path)
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            _, point, file_system, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            if (resolved + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
                best, kind = point, file_system
    return kind.startswith(_NETWORK_FILE_SYSTEMS)


class Store:
    """The index of all jobs of a user, shared by all their kernels, servers and shells.

    Parameters
    ----------
    path : pathlib.Path
        The database file; made with its folder (0700) when missing.

    Raises
    ------
    StoreError
        The file cannot be made, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._connect()

    def _connect(self) -> sqlite3.Connection:
        local = self._local
        connection: sqlite3.Connection | None = getattr(local, "connection", None)
        if connection is not None:
            # Not a parent's connection in a forked child, nor one to a file that was deleted or replaced.
            if local.pid == os.getpid() and local.inode == self._inode():
                return connection
            _abandoned.append(connection)
        try:
            os.makedirs(self.path.parent, mode=0o700, exist_ok=True)
            if not self.path.exists():
                self._make()
            local.inode, local.pid = self._inode(), os.getpid()
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            mode = "DELETE" if network_file_system(self.path.parent) else "WAL"
            connection.execute("PRAGMA synchronous=NORMAL" if mode == "WAL" else "PRAGMA synchronous=FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise StoreError(
                    f"{self.path} was written by a newer jupyter_hybrid (schema {version}); update this one"
                )
            if version == 0:
                raise sqlite3.DatabaseError("it has no schema")
        except (OSError, sqlite3.Error) as error:
            raise self._broken("open", error) from error
        local.connection = connection
        return connection

    def _inode(self) -> int:
        try:
            return os.stat(self.path).st_ino
        except FileNotFoundError:
            return 0

    def _make(self) -> None:
        """Make the file: complete under another name, then linked, so that nobody ever sees half a schema."""
        with open(self.path.with_name(self.path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                return
            draft = self.path.with_name(f"{self.path.name}.{new_id()}")
            connection = sqlite3.connect(draft, isolation_level=None)
            try:
                os.chmod(draft, 0o600)
                if not network_file_system(self.path.parent):
                    connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;")
            finally:
                connection.close()
            for ending in ("-wal", "-shm", "-journal"):  # of a file that was deleted: they would be read into this one
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.path}{ending}")
            os.rename(draft, self.path)

    def _broken(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"cannot {what} the Store {self.path}: {error}. If it is damaged, remove it and run: jupyter hybrid reindex"
        )

    def close(self) -> None:
        """Close this thread's connection."""
        connection = getattr(self._local, "connection", None)
        if connection is not None and self._local.pid == os.getpid():
            connection.close()
            self._local.connection = None

    def _rows(
        self,
        sql: str,
        parameters: Sequence[Any] | Mapping[str, Any] = (),
        factory: Callable[[Any, tuple[Any, ...]], Any] | None = None,
    ) -> list[Any]:
        with unforked:
            try:
                cursor = self._connect().cursor()
                cursor.row_factory = factory
                return cursor.execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                raise self._broken("read", error) from error

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One write transaction; on an error nothing of it remains."""
        with unforked:
            connection = self._connect()
            try:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._broken("write", error) from error

    def changes(self) -> int:
        """Return a number that differs after another connection has written."""
        return int(self._rows("PRAGMA data_version")[0][0])

    # --- jobs ---------------------------------------------------------------------------------------------------

    def add_job(
        self,
        spec: JobSpec,
        folder: Path,
        attempt: Attempt | None,
        reused: int = 0,
        keys: Mapping[str, int] | None = None,
    ) -> None:
        """Add a new job with the submissions of its first round; without a round all its results are reused."""
        resources = spec.resources
        done = attempt is None
        with self.write() as db:
            db.execute(
                f"INSERT OR IGNORE INTO jobs ({_JOB_COLUMNS}) VALUES ({','.join('?' * len(JobRow._fields))})",
                JobRow(
                    spec.id, _next(db), _text(spec.name), spec.pool, spec.kind,
                    JobState.COMPLETED.value if done else JobState.NEW.value,  # type: ignore[arg-type]
                    None, "all results reused" if done else "", spec.array, spec.tasks, reused, 0, 0,
                    0 if attempt is None else attempt.number, spec.created, spec.created if done else None,
                    spec.created if done else None, None, None, resources.total_cpus, resources.memory,
                    resources.time.total_seconds() if resources.time else None, "", str(folder),
                    _text(str(spec.origin.get("notebook", ""))), _text(str(spec.origin.get("function", ""))),
                ),
            )  # fmt: skip
            if attempt is not None:
                self._add_submissions(db, spec.id, spec.pool, attempt)
            if keys:
                db.executemany(
                    "INSERT OR REPLACE INTO cache VALUES (?, ?, ?)",
                    [(key, spec.id, task) for key, task in keys.items()],
                )

    def add_attempt(self, job_id: str, pool: str, attempt: Attempt) -> None:
        """Add a further round of a job, which becomes NEW again."""
        with self.write() as db:
            self._add_submissions(db, job_id, pool, attempt)
            db.execute(
                "UPDATE jobs SET state='NEW', cause=NULL, reason='', running=0, failed=0, ended=NULL, native_id='', "
                "attempt=?, seq=? WHERE id=? AND attempt<?",
                (attempt.number, _next(db), job_id, attempt.number),
            )

    @staticmethod
    def _add_submissions(db: sqlite3.Connection, job_id: str, pool: str, attempt: Attempt) -> None:
        rows = []
        for chunk, count in enumerate(attempt.chunks):
            tag = f"{job_id}.{attempt.number}.{chunk}"
            rows.append((tag, job_id, pool, attempt.number, chunk, attempt.chunk_first(chunk), count, "new", ""))
        db.executemany("INSERT OR IGNORE INTO submissions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def job(self, job_id: str) -> JobRow:
        """Return one job by its id, or by the beginning of its id where that is unambiguous.

        Raises
        ------
        JobNotFound
            No job, or more than one, begins so.
        """
        upper = job_id + "{"  # the first text after all that begin with job_id
        found = self._rows(
            f"SELECT {_JOB_COLUMNS} FROM jobs WHERE id >= ? AND id < ? LIMIT 3", (_text(job_id), _text(upper)), _job_row
        )
        if len(found) == 1 or (found and found[0].id == job_id):
            row: JobRow = found[0]
            return row
        if found:
            raise JobNotFound(f"more than one job begins with {job_id!r}: {', '.join(row.id for row in found)}, …")
        raise JobNotFound(f"no job {job_id!r}; hy.jobs() or 'jupyter hybrid jobs' lists them")

    def jobs(
        self,
        *,
        states: Iterable[JobState] = (),
        pool: str | None = None,
        name: str | None = None,
        notebook: str | None = None,
        function: str | None = None,
        since: float | None = None,
        before: tuple[float, str] | None = None,
        after_seq: int | None = None,
        limit: int = -1,
    ) -> list[JobRow]:
        """Return jobs, newest first.

        Parameters
        ----------
        states : iterable of JobState
            Only these; empty for all.
        pool, notebook, function : str, optional
            Only with exactly this value.
        name : str, optional
            Only with this text in the name.
        since : float, optional
            Only created at or after this time.
        before : (float, str), optional
            Keyset page: only jobs after this (created, id) in the order of the list.
        after_seq : int, optional
            Only jobs changed after this sequence number.
        limit : int
            At most so many; -1 for all.
        """
        where, values = self._where(states, pool, name, notebook, function, since)
        if before is not None:
            where.append("(created < ? OR (created = ? AND id > ?))")
            values += [before[0], before[0], before[1]]
        if after_seq is not None:
            where.append("seq > ?")
            values.append(after_seq)
        sql = f"SELECT {_JOB_COLUMNS} FROM jobs {_clause(where)} ORDER BY created DESC, id LIMIT ?"
        return self._rows(sql, [*values, limit], _job_row)

    def page(
        self,
        *,
        order: str = "created",
        descending: bool = True,
        beyond: tuple[float | str, str] | None = None,
        limit: int = 100,
        states: Iterable[JobState] = (),
        pool: str | None = None,
        name: str | None = None,
        notebook: str | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> list[JobRow]:
        """Return a page of jobs in the order of a column, and of their ids where that is the same.

        Parameters
        ----------
        order : {"created", "name", "state", "seq"}
            The column.
        descending : bool
            Whether the largest comes first.
        beyond : (float or str, str), optional
            Value of the column and id of the last job of the page before.
        limit : int
            At most so many.
        states, pool, name, notebook, since
            As in :meth:`jobs`.
        until : float, optional
            Only created at or before this time.
        """
        if order not in ("created", "name", "state", "seq"):
            raise ValueError(order)
        where, values = self._where(states, pool, name, notebook, None, since, until)
        if beyond is not None:
            sign = "<" if descending else ">"
            # In this form, and not with OR alone, it is a range of the index.
            where.append(f"{order} {sign}= ? AND ({order} {sign} ? OR id > ?)")
            values += [beyond[0], beyond[0], beyond[1]]
        direction = "DESC" if descending else "ASC"
        sql = f"SELECT {_JOB_COLUMNS} FROM jobs {_clause(where)} ORDER BY {order} {direction}, id LIMIT ?"
        return self._rows(sql, [*values, limit], _job_row)

    def ids(self) -> set[str]:
        """Return the ids of all jobs."""
        return {row[0] for row in self._rows("SELECT id FROM jobs")}

    def size(self) -> int:
        """Return the number of jobs."""
        return int(self._rows("SELECT count(*) FROM jobs")[0][0])

    def count(
        self,
        *,
        states: Iterable[JobState] = (),
        pool: str | None = None,
        name: str | None = None,
        notebook: str | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> dict[JobState, int]:
        """Return the number of jobs in each state."""
        where, values = self._where(states, pool, name, notebook, None, since, until)
        rows = self._rows(f"SELECT state, count(*) FROM jobs {_clause(where)} GROUP BY state", values)
        return {_STATES[state]: number for state, number in rows}

    @staticmethod
    def _where(
        states: Iterable[JobState],
        pool: str | None,
        name: str | None,
        notebook: str | None,
        function: str | None,
        since: float | None,
        until: float | None = None,
    ) -> tuple[list[str], list[Any]]:
        where: list[str] = []
        values: list[Any] = [state.value for state in states]
        if values:
            where.append(f"state IN ({','.join('?' * len(values))})")
        for column, value in (("pool", pool), ("notebook", notebook), ("function", function)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        if name is not None:
            where.append("instr(name, ?) > 0")
            values.append(name)
        if since is not None:
            where.append("created >= ?")
            values.append(since)
        if until is not None:
            where.append("created <= ?")
            values.append(until)
        return where, values

    def active(self, pool: str) -> list[JobRow]:
        """Return the jobs of a pool that have not ended."""
        return self.jobs(states=(JobState.NEW, JobState.PENDING, JobState.RUNNING, JobState.UNKNOWN), pool=pool)

    def update_job(self, job_id: str, attempt: int, **changes: Any) -> None:
        """Change columns of a job, if it is still in this round and has not ended with another state."""
        names = ", ".join(f"{name}=?" for name in changes)
        values = [_text(value.value if isinstance(value, (JobState, Cause)) else value) for value in changes.values()]
        state = changes["state"].value if "state" in changes else ""
        with self.write() as db:
            # One that was stopped and comes back with an old view must not undo what its successor has found.
            db.execute(
                f"UPDATE jobs SET {names}, seq=? WHERE id=? AND attempt=? AND (state=? OR state NOT IN {_ENDED})",
                [*values, _next(db), job_id, attempt, state],
            )

    def remove_job(self, job_id: str) -> None:
        """Forget a job."""
        with self.write() as db:
            for table, column in (("jobs", "id"), ("submissions", "job"), ("batches", "job"), ("cache", "job")):
                db.execute(f"DELETE FROM {table} WHERE {column}=?", (job_id,))
            _next(db)

    def sequence(self) -> int:
        """Return the number of the last change of any job."""
        return int(self._rows("SELECT value FROM sequence")[0][0])

    # --- submissions and batches --------------------------------------------------------------------------------

    def submissions(self, job_id: str, attempt: int | None = None) -> list[SubmissionRow]:
        """Return the submissions of a job (of one round), in order."""
        rows = self._rows(
            "SELECT * FROM submissions WHERE job=? AND (? IS NULL OR attempt=?) ORDER BY attempt, chunk",
            (job_id, attempt, attempt),
        )
        return [SubmissionRow(*row) for row in rows]

    def waiting(self, pool: str) -> list[SubmissionRow]:
        """Return the submissions of a pool that the scheduler has not got yet, oldest job first."""
        rows = self._rows(
            "SELECT s.* FROM submissions s JOIN jobs j ON j.id = s.job "
            "WHERE s.pool=? AND s.state='new' AND s.attempt = j.attempt ORDER BY j.created, s.job, s.chunk",
            (pool,),
        )
        return [SubmissionRow(*row) for row in rows]

    def set_submission(self, tag: str, state: str, native_id: str = "") -> None:
        """Record how a submission went."""
        with self.write() as db:
            db.execute("UPDATE submissions SET state=?, native_id=? WHERE tag=?", (state, native_id, tag))
            if native_id:
                db.execute(
                    "UPDATE jobs SET native_id=?, seq=?, state=CASE state WHEN 'NEW' THEN 'PENDING' ELSE state END, "
                    "reason=CASE state WHEN 'NEW' THEN '' ELSE reason END "
                    "WHERE (id, attempt)=(SELECT job, attempt FROM submissions WHERE tag=? AND chunk=0)",
                    (native_id, _next(db), tag),
                )

    def batches(self, job_id: str) -> dict[int, BatchRow]:
        """Return what the scheduler last said of each batch of a job."""
        rows = self._rows(
            f"SELECT {', '.join(BatchRow._fields)} FROM batches WHERE job=? ORDER BY batch",
            (job_id,),
        )
        return {row[0]: BatchRow(row[0], _STATES[row[1]], _CAUSES[row[2]], *row[3:]) for row in rows}

    def set_batches(self, job_id: str, rows: Iterable[BatchRow]) -> None:
        """Record what the scheduler says of batches."""
        values = [
            (job_id, row.batch, row.state.value, row.cause.value if row.cause else None, *map(_text, row[3:]))
            for row in rows
        ]
        with self.write() as db:
            db.executemany("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    # --- cache --------------------------------------------------------------------------------------------------

    def cached(self, keys: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Return the job and task that last ran with each of these cache keys."""
        found: dict[str, tuple[str, int]] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            rows = self._rows(f"SELECT key, job, task FROM cache WHERE key IN ({','.join('?' * len(part))})", part)
            found.update((key, (job, task)) for key, job, task in rows)
        return found

    # --- pools --------------------------------------------------------------------------------------------------

    def pool(self, name: str) -> PoolRow:
        """Return what is shared about a pool."""
        rows = self._rows(
            "SELECT owner, beat, unreachable_since, error, snapshot, snapshot_time FROM pools WHERE name=?",
            (name,),
        )
        if not rows:
            return PoolRow("", 0, None, "", None, None)
        owner, beat, since, error, snapshot, snapshot_time = rows[0]
        return PoolRow(owner, beat, since, error, None if snapshot is None else json.loads(snapshot), snapshot_time)

    def set_pool(self, name: str, **changes: Any) -> None:
        """Change what is shared about a pool."""
        with self.write() as db:
            db.execute("INSERT OR IGNORE INTO pools (name) VALUES (?)", (name,))
            names = ", ".join(f"{column}=?" for column in changes)
            db.execute(f"UPDATE pools SET {names} WHERE name=?", [*map(_text, changes.values()), name])

    def take_lease(self, name: str, owner: str, seen: tuple[str, int]) -> bool:
        """Take or keep the lease of a pool, if it still is as the caller has seen it (owner, beat)."""
        with self.write() as db:
            db.execute("INSERT OR IGNORE INTO pools (name) VALUES (?)", (name,))
            changed = db.execute(
                "UPDATE pools SET owner=?, beat=beat+1 WHERE name=? AND owner=? AND beat=?", (owner, name, *seen)
            )
            return changed.rowcount == 1

    def leave_lease(self, name: str, owner: str) -> None:
        """Give the lease of a pool back, if it is this owner's."""
        with self.write() as db:
            db.execute("UPDATE pools SET owner='', beat=beat+1 WHERE name=? AND owner=?", (name, owner))


def lease_owner() -> str:
    """Return a text that names this process among all hosts: host, boot, pid, start time, and a random part."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return f"{os.uname().nodename} {boot} {os.getpid()} {process_start(os.getpid())} {new_id()}"


def process_start(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot, or an empty text where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def owner_is_gone(owner: str) -> bool:
    """Return whether the process behind a lease surely no longer lives: same host, and its boot or pid is gone."""
    if not owner:
        return True
    host, boot, pid, start, _ = owner.split(" ")
    mine = lease_owner().split(" ")
    if host != mine[0]:
        return False
    return boot != mine[1] or process_start(int(pid)) != start


def _next(db: sqlite3.Connection) -> int:
    return int(db.execute("UPDATE sequence SET value = value + 1 RETURNING value").fetchone()[0])


def _text(value: Any) -> Any:
    """Return a value that SQLite takes: what is not UTF-8 (a file name in an error message) replaced."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _clause(where: Sequence[str]) -> str:
    return "WHERE " + " AND ".join(where) if where else ""
