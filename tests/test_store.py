"""The Store: an index that may be shared, locked, deleted, replaced, damaged or newer, and says so."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_hybrid.errors import JobNotFound, StoreError
from jupyter_hybrid.spec import Cause, JobSpec, JobState, Resources, new_id
from jupyter_hybrid.storage import Attempt
from jupyter_hybrid.store import BatchRow, Store, lease_owner, owner_is_gone


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "data" / "store.sqlite")
    yield store
    store.close()


def spec(name: str = "name", pool: str = "local", tasks: int = 1, created: float = 1.0) -> JobSpec:
    return JobSpec(new_id(), name, pool, "function", tasks, tasks > 1, 1, Resources(), created)


def attempt(number: int = 1, chunks: tuple[int, ...] = (1,)) -> Attempt:
    return Attempt(number, 0, sum(chunks), 1, False, ((0, sum(chunks)),), Resources(), chunks)


def added(store: Store, *, name: str = "name", chunks: tuple[int, ...] = (1,), created: float = 1.0) -> str:
    job = spec(name, tasks=sum(chunks), created=created)
    store.add_job(job, Path("/runs") / job.id, attempt(1, chunks))
    return job.id


def test_rows(store: Store) -> None:
    job = added(store, chunks=(7, 7, 6))
    row = store.job(job)
    assert (row.state, row.tasks, row.attempt, row.array) == (JobState.NEW, 20, 1, True)
    assert store.job(job[:5]) == row
    assert [(each.tag, each.first, each.batches) for each in store.waiting("local")] == [
        (f"{job}.1.0", 0, 7), (f"{job}.1.1", 7, 7), (f"{job}.1.2", 14, 6),
    ]  # fmt: skip
    store.set_submission(f"{job}.1.0", "submitted", "55")
    assert (store.job(job).state, store.job(job).native_id) == (JobState.PENDING, "55")
    batch = BatchRow(3, JobState.FAILED, Cause.PREEMPTED, "r", "h", 1, 2, None, 0.5, 7)
    store.set_batches(job, [batch])
    assert store.batches(job) == {3: batch}
    store.add_attempt(job, "local", attempt(2))
    assert (store.job(job).attempt, store.job(job).state) == (2, JobState.NEW)
    store.remove_job(job)
    with pytest.raises(JobNotFound, match="no job"):
        store.job(job)
    assert not store.waiting("local")


def test_what_has_ended_stays_ended(store: Store) -> None:
    job = added(store)
    store.update_job(job, 1, state=JobState.COMPLETED, done=1)
    store.update_job(job, 1, state=JobState.RUNNING, done=0)  # by one that was stopped meanwhile
    store.update_job(job, 1, reason="being cancelled")
    assert (store.job(job).state, store.job(job).done, store.job(job).reason) == (JobState.COMPLETED, 1, "")
    store.update_job(job, 1, state=JobState.COMPLETED, cpu_seconds=2.0)
    assert store.job(job).cpu_seconds == 2.0
    store.update_job(job, 2, state=JobState.COMPLETED, done=5)  # another round
    assert store.job(job).done == 1


def test_any_text(store: Store) -> None:
    for text in ("\udcff", "a\0b", "'; DROP TABLE jobs; --", "x" * 10_000, "🎉\n"):
        job = added(store, name=text)
        store.update_job(job, 1, reason=text)
        clean = text.encode(errors="replace").decode()
        assert (store.job(job).name, store.job(job).reason) == (clean, clean)
        store.set_pool("local", error=text)
        assert store.pool("local").error == clean
    with pytest.raises(JobNotFound):
        store.job("\udcff")


def test_filters_and_pages(store: Store) -> None:
    jobs = [added(store, name=f"n{i}", created=float(i // 2)) for i in range(10)]
    store.update_job(jobs[3], 1, state=JobState.FAILED)
    assert [row.id for row in store.jobs(states=[JobState.FAILED])] == [jobs[3]]
    assert [row.id for row in store.jobs(name="n7")] == [jobs[7]]
    assert store.count() == {JobState.NEW: 9, JobState.FAILED: 1}
    paged, before = [], None
    while page := store.jobs(limit=3, before=before):
        paged += [row.id for row in page]
        before = (page[-1].created, page[-1].id)
    assert paged == [row.id for row in store.jobs()]
    assert [row.id for row in store.jobs(after_seq=store.sequence() - 1)] == [jobs[3]]


def test_private(store: Store) -> None:
    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(store.path.parent).st_mode) == 0o700


def test_nothing_of_a_broken_transaction_remains(store: Store) -> None:
    job = added(store)

    def write(sql: str, error: type[Exception]) -> None:
        with store.write() as db:
            db.execute("DELETE FROM jobs")
            db.execute(sql)
            raise error

    with pytest.raises(KeyError):
        write("SELECT 1", KeyError)
    with pytest.raises(StoreError, match="no such table"):
        write("DELETE FROM no_table", KeyError)
    assert store.job(job)
    store.update_job(job, 1, reason="it can be written again")


def test_deleted_and_replaced_under_an_open_connection(store: Store) -> None:
    job = added(store)
    for path in (store.path, Path(f"{store.path}-shm")):  # and the -wal stays behind
        path.unlink(missing_ok=True)
    assert store.jobs() == []
    again = added(store)
    assert [row.id for row in Store(store.path).jobs()] == [again]
    with pytest.raises(JobNotFound):
        store.job(job)


def test_damaged_and_newer(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"no database " * 1000)
    with pytest.raises(StoreError, match="reindex"):
        Store(path)
    path.unlink()
    store = Store(path)
    with store.write() as db:
        db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(StoreError, match="newer"):
        Store(path)


def test_many_processes_make_it_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from jupyter_hybrid.store import Store; s = Store(Path(sys.argv[1])); "
    )
    code += (
        "sys.stdin.read(1); s = Store(Path(sys.argv[2])); [s.set_pool(str(i), error=sys.argv[3]) for i in range(20)]"
    )
    paths = [str(tmp_path / name / "store.sqlite") for name in "ab"]
    running = [
        subprocess.Popen([sys.executable, "-c", code, *paths, str(i)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(4)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write(b"!")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert errors == [b""] * 4
    store = Store(Path(paths[1]))
    assert {store.pool(str(i)).error for i in range(20)} <= set("0123")
    store.close()


def test_threads_share_it(store: Store) -> None:
    job = added(store)

    def work(number: int) -> None:
        for i in range(20):
            store.set_pool(f"{number}", error=str(i))
            store.job(job)
        store.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {store.pool(str(number)).error for number in range(4)} == {"19"}


def test_lease(store: Store) -> None:
    mine, other = lease_owner(), "elsewhere boot 1 2 x"
    assert store.take_lease("local", mine, ("", 0))
    assert not store.take_lease("local", other, ("", 0)), "it is no longer as it was seen"
    row = store.pool("local")
    assert store.take_lease("local", mine, (row.owner, row.beat))
    assert store.pool("local").beat == row.beat + 1
    store.leave_lease("local", other)
    assert store.pool("local").owner == mine
    store.leave_lease("local", mine)
    assert store.pool("local").owner == ""


def test_gone_owners() -> None:
    assert owner_is_gone("")
    assert not owner_is_gone(lease_owner())
    assert not owner_is_gone("another-host boot 1 1 x")
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from jupyter_hybrid.store import lease_owner; print(lease_owner(), flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    owner = child.stdout.readline().strip()
    assert not owner_is_gone(owner)
    child.communicate("\n", timeout=60)
    assert owner_is_gone(owner)
    host, _, pid, start, random = lease_owner().split(" ")
    assert owner_is_gone(f"{host} another-boot {pid} {start} {random}")


def test_a_writer_waits_for_another(store: Store) -> None:
    job = added(store)
    other = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    def release() -> None:
        time.sleep(0.2)
        other.execute("COMMIT")

    thread = threading.Thread(target=release)
    thread.start()
    store.update_job(job, 1, reason="after the other")
    thread.join()
    other.close()
    assert store.job(job).reason == "after the other"
