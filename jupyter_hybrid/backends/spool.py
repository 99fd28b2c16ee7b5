"""The database of the local pools of one user, ``spool.sqlite``: every submission and every element of it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import PoolUnreachable
from ..spec import Cause, JobState
from .element import Outcome
from .slots import Request, Slots

KEEP = 7 * 86400.0
"""Seconds for which ended submissions are known."""
LIVE = "('PENDING', 'RUNNING')"
BAD = "('FAILED', 'CANCELLED', 'TIMEOUT')"

VERSION = 1
_SCHEMA = f"""
CREATE TABLE pool (name TEXT PRIMARY KEY, cpus INTEGER, memory INTEGER, gpus INTEGER);
CREATE TABLE submission (
    native_id INTEGER PRIMARY KEY AUTOINCREMENT, tag TEXT UNIQUE, pool TEXT, name TEXT, script TEXT, logs TEXT,
    first INTEGER, count INTEGER, array INTEGER, cpus INTEGER, memory INTEGER, gpus INTEGER, walltime REAL,
    priority INTEGER, after TEXT, environment TEXT, held INTEGER DEFAULT 0, submitted REAL);
CREATE TABLE element (
    native_id INTEGER, idx INTEGER, state TEXT DEFAULT 'PENDING', ending TEXT, signalled INTEGER DEFAULT 0,
    started REAL, clock REAL, boot TEXT, oom INTEGER, devices TEXT, ended REAL, exit_code INTEGER, cause TEXT,
    reason TEXT DEFAULT '', cpu_seconds REAL, peak_memory INTEGER, PRIMARY KEY (native_id, idx)) WITHOUT ROWID;
CREATE INDEX element_state ON element (state, native_id);
PRAGMA user_version = {VERSION};
"""


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
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL, 0o600))  # it holds the environments of submissions
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


def has_any(database: sqlite3.Connection, native_id: int | str, states: str) -> bool:
    """Return whether a submission has an element in one of these states."""
    query = f"SELECT EXISTS (SELECT 1 FROM element WHERE native_id = ? AND state IN {states})"
    return bool(database.execute(query, (native_id,)).fetchone()[0])


def prune(database: sqlite3.Connection) -> None:
    """Forget submissions that ended long ago, unless a live one waits for them."""
    waiting = f"SELECT after FROM submission WHERE native_id IN (SELECT native_id FROM element WHERE state IN {LIVE})"
    needed = {native_id for (after,) in database.execute(waiting) for native_id in json.loads(after)}
    ended = f"""SELECT native_id FROM submission WHERE submitted < ? AND NOT EXISTS (
        SELECT 1 FROM element WHERE element.native_id = submission.native_id AND (state IN {LIVE} OR ended > ?))"""
    limit = time.time() - KEEP
    old = [row[0] for row in database.execute(ended, (limit, limit)) if row[0] not in needed]
    database.execute("BEGIN IMMEDIATE")
    for table in ("element", "submission"):
        database.executemany(f"DELETE FROM {table} WHERE native_id = ?", [(native_id,) for native_id in old])
    database.execute("COMMIT")


def request_of(row: sqlite3.Row) -> Request:
    """Return a row of the table ``submission`` as a request without elements."""
    plain = "native_id pool script logs first array cpus memory gpus walltime priority held".split()  # noqa: SIM905
    values = {name: row[name] for name in plain}
    return Request(**values, after=json.loads(row["after"]), environment=json.loads(row["environment"]))


def settle(database: sqlite3.Connection, requests: Sequence[Request], pools: Mapping[str, Slots]) -> None:
    """Free or cancel what waits for other submissions, and fail what no longer fits its pool; `pools` are empty."""
    for request in requests:
        if not pools[request.pool].fits(request):
            reason = f"pool {request.pool} was made smaller than what it asks for"
            _drop(database, request, Outcome(JobState.FAILED, Cause.SUBMIT_REJECTED, reason))
    answers: dict[int, str] = {}
    # By age: what is cancelled here is seen by those that wait for it, which are younger.
    for request in sorted((one for one in requests if one.after), key=lambda one: one.native_id):
        for native_id in list(request.after):
            if native_id not in answers:
                live = has_any(database, native_id, LIVE)
                answers[native_id] = "bad" if has_any(database, native_id, BAD) else "live" if live else "done"
            if answers[native_id] == "bad":
                reason = f"job {native_id}, which it waits for, did not complete"
                _drop(database, request, Outcome(JobState.CANCELLED, Cause.DEPENDENCY_FAILED, reason))
                break
            if answers[native_id] == "done":
                request.after.remove(native_id)


def _drop(database: sqlite3.Connection, request: Request, outcome: Outcome) -> None:
    values = outcome.values(time.time())
    names = ", ".join(f"{name} = ?" for name in values)
    query = f"UPDATE element SET {names} WHERE native_id = ? AND state = 'PENDING'"
    database.execute(query, (*values.values(), request.native_id))
    request.waiting.clear()
    request.after.clear()
