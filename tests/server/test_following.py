"""One tracker of all processes: the server follows what others submit, takes over from them and they from it."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.pool import default_store, get_pool
from jupyter_hybrid.server.following import TICK, TOLD, Follower
from jupyter_hybrid.server.pools import Pools
from jupyter_hybrid.server.rows import Rows
from jupyter_hybrid.spec import JobState
from jupyter_hybrid.store import JobRow, Store
from jupyter_hybrid.tracker import tracker

DEADLINE = 60.0
SUBMIT = """
import os, sys
import jupyter_hybrid as hy

def wait(gate):
    import os, time
    while not os.path.exists(gate):
        time.sleep(0.02)
    return 42

job = hy.Executor("local").submit(wait, sys.argv[1])
print(job.id, flush=True)
"""
KERNEL = SUBMIT + "import threading; print(job.result(), flush=True); threading.Event().wait()\n"
LEFT = SUBMIT + "os._exit(0)\n"  # killed right after: it submitted nothing


def until(holds: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE
    while not (found := holds()):
        assert time.monotonic() < end, f"{what}: not within {DEADLINE:g} s"
        time.sleep(0.02)
    return found


@pytest.fixture
def kernel() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return what starts a program as a kernel would; it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-W", "ignore", "-c", program, *arguments]
        started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()
        if each.stdout is not None:
            each.stdout.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def holder(pool: str = "local") -> int:
    """Return the process that has the lease of a pool; 0 if nobody has."""
    owner = default_store().pool(pool).owner
    return int(owner.split(" ")[2]) if owner else 0


def test_the_lease_goes_from_kernel_to_server_and_back(
    server: Callable[[], Any], kernel: Callable[..., Any], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = kernel(KERNEL, str(gate))
    job_id = first_line(first)
    until(lambda: holder() == first.pid, "the kernel's lease")
    running = server()
    assert running.get("health")["tracking"] == []
    assert running.get(f"jobs/{job_id}")["id"] == job_id
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: running.get("health")["tracking"] == ["local"], "the server's lease")
    assert holder() == running.process.pid

    second = kernel(KERNEL, str(gate))  # while the server has the lease
    other_id = first_line(second)
    until(lambda: running.get(f"jobs/{other_id}")["state"] == "RUNNING", "the second job")
    assert holder() == running.process.pid
    running.stop()
    until(lambda: holder() in (0, second.pid), "the lease that the server left")
    until(lambda: holder() == second.pid, "the second kernel's lease")
    gate.touch()
    assert first_line(second) == "42"
    until(lambda: default_store().job(job_id).state is JobState.COMPLETED, "the end of the first job")


def test_jobs_go_on_where_no_kernel_lives_and_a_server_is_killed(
    server: Callable[[], Any], kernel: Callable[..., Any], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    killed = server()
    job_id = first_line(kernel(LEFT, str(gate)))
    until(lambda: killed.get(f"jobs/{job_id}")["state"] == "RUNNING", "a job of a kernel that died")
    killed.kill()
    gate.touch()
    running = server()
    job = until(lambda: (found := running.get(f"jobs/{job_id}"))["ended"] and found, "the end of the job")
    assert (job["state"], job["attempts"]) == ("COMPLETED", 1)
    assert len(default_store().submissions(job_id)) == 1
    assert running.get("jobs", since=0)["reset"]  # what was removed before this server began, nobody knows


def test_two_servers_and_two_kernels_show_the_same_and_one_asks(
    server: Callable[[], Any], kernel: Callable[..., Any], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    servers = [server(), server()]
    ids = [first_line(kernel(KERNEL, str(gate))) for _ in range(2)]
    for running in servers:
        until(lambda: {running.get(f"jobs/{i}")["state"] for i in ids} <= {"RUNNING", "PENDING"}, "both jobs")  # noqa: B023
    holders = [running for running in servers if running.get("health")["tracking"]]
    assert len(holders) <= 1
    gate.touch()
    for job_id in ids:
        shown = [until(lambda: (j := s.get(f"jobs/{job_id}"))["ended"] and j, "the end") for s in servers]  # noqa: B023
        until(lambda: servers[0].get(f"jobs/{job_id}") == servers[1].get(f"jobs/{job_id}"), "the same")  # noqa: B023
        assert {job["state"] for job in shown} == {"COMPLETED"}


def fill(store: Store, count: int) -> None:
    """Put ended jobs into the Store."""
    with store.write() as db:
        db.executemany(
            f"INSERT INTO jobs ({', '.join(JobRow._fields)}) VALUES ({','.join('?' * len(JobRow._fields))})",
            (
                (f"job{i:07d}", 0, f"name{i}", "local", "function", "COMPLETED", None, "", 0, 1, 1, 0, 0, 1, 1.7e9 + i,
                 None, None, None, None, 1, None, None, str(i), "/folder", "", "f")
                for i in range(count)
            ),
        )  # fmt: skip


def test_ten_thousand_changes_are_a_few_messages(home: Path) -> None:
    store = default_store()
    fill(store, 10_000)
    told: list[dict[str, Any]] = []
    pools = Pools()
    follower = Follower(pools, Rows(pools), lambda name, message: told.append(message) if name == "jobs" else None)
    follower.start()
    try:
        assert follower.ready.wait(DEADLINE)
        begun = time.monotonic()
        with_change = "UPDATE jobs SET reason='changed', seq=? WHERE id=?"
        for start in range(0, 10_000, 100):  # as many writers would
            with store.write() as db:
                for number in range(start, start + 100):
                    seq = db.execute("UPDATE sequence SET value = value + 1 RETURNING value").fetchone()[0]
                    db.execute(with_change, (seq, f"job{number:07d}"))
        until(lambda: told and told[-1]["seq"] == 10_000, "the last change")
        took = time.monotonic() - begun
    finally:
        follower.stop()
    assert len(told) <= took / TICK + 2
    assert all(len(message["jobs"]) <= TOLD for message in told)
    assert any(message["more"] for message in told)
    # The chain has no gap, and who asks for what was left out gets all of it.
    assert told[0]["since"] == 0
    assert all(after["since"] == before["seq"] for before, after in itertools.pairwise(told))
    rows, cursor, found = Rows(pools), None, set()
    while True:
        page = rows.changed(0, 1000, cursor)
        found |= {row["id"] for row in page["jobs"]}
        if (cursor := page["next"]) is None:
            break
    assert len(found) == 10_000


async def test_an_array_with_many_changes_stays_few_messages(api: Any, listen: Any) -> None:
    async with listen() as listener:
        begun = time.monotonic()
        array = hy.Executor("local").array(abs, range(2000), batch=100)
        await listener.until(lambda said: any(row["id"] == array.id and row["ended"] for row in said.get("jobs", ())))
        assert len(listener.messages) <= 2 * ((time.monotonic() - begun) / TICK + 2)
    assert (await api(f"jobs/{array.id}/tasks"))["states"] == "d" * 2000


async def test_stopping_leaves_no_thread_and_no_lease(api: Any, jp_serverapp: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def wait(gate: str) -> None:
        import os
        import time

        while not os.path.exists(gate):
            time.sleep(0.02)

    job = hy.Executor("local").submit(wait, str(gate))
    await api.job(job.id, lambda job: job["state"] == "RUNNING")
    assert (await api("health"))["tracking"] == ["local"]
    assert holder() == os.getpid()
    await jp_serverapp.extension_manager.stop_all_extensions()
    assert holder() == 0
    assert tracker.holding() == []
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("hybrid-server", "hybrid-local"))]
    tracker.pool(get_pool("local")).start()  # it can go on
    gate.touch()
    await asyncio.to_thread(job.result, DEADLINE)
