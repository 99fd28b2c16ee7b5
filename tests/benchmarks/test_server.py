"""The server extension with a full index of jobs: answers of a real server over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.spec import JobState
from jupyter_hybrid.store import JobRow

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

TOKEN = "a-token-of-benchmarks"
JOBS = 100_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], http.client.HTTPConnection]]:
    runtime = tmp_path / "runtime"
    config = tmp_path / "jupyter_server_config.json"
    served = {"jpserver_extensions": {"jupyter_hybrid": True}, "ip": "127.0.0.1", "port": 0, "open_browser": False}
    served |= {"allow_root": True, "root_dir": str(tmp_path)}
    config.write_text(json.dumps({"ServerApp": served, "IdentityProvider": {"token": TOKEN}}))
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", f"--config={config}"], stdout=log, stderr=log,
            env={**os.environ, "JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_DATA_DIR": str(tmp_path / "share")},
        )  # fmt: skip
    try:
        end, found = time.monotonic() + 60, runtime / f"jpserver-{process.pid}.json"
        while not (found.exists() and found.read_text().endswith("}")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.02)
        connection = http.client.HTTPConnection(urlsplit(json.loads(found.read_text())["url"]).netloc, timeout=60)
        yield process, connection
        connection.close()
    finally:
        process.terminate()
        process.wait(60)


def fill() -> None:
    """Put many ended jobs into the Store."""
    choose = random.Random(1)
    states = [state.value for state in JobState if state.final]
    columns = f"({', '.join(JobRow._fields)}) VALUES ({','.join('?' * len(JobRow._fields))})"
    with default_store().write() as db:
        db.executemany(
            f"INSERT INTO jobs {columns}",
            (
                (f"job{i:07d}", i, f"model {i % 1000}", "local", "function", choose.choice(states), None, "", 0, 1, 1,
                 0, 0, 1, 1.7e9 + i, 1.7e9 + i, 1.7e9 + i + 60, 50.0, 10**8, 1, None, None, str(i),
                 f"/scratch/user/runs/job{i:07d}", f"study/{i % 50}.ipynb", "module.function")
                for i in range(JOBS)
            ),
        )  # fmt: skip
        db.execute("UPDATE sequence SET value=?", (JOBS,))


def memory(process: subprocess.Popen[bytes]) -> float:
    """Return the resident memory of a process in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_jobs_are_listed_fast_whatever_their_number(table: Any, server: Any) -> None:
    process, connection = server
    tasks = hy.Executor("local").array(abs, range(10_000), batch=1000)
    tasks.wait_for(lambda: tasks.run.row.state.final, 300)

    def get(path: str) -> Any:
        connection.request("GET", f"/hybrid/api/v1/{path}", headers={"Authorization": f"token {TOKEN}"})
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return json.loads(body)

    def p95(*paths: str) -> float:
        times = []
        for path in paths * (200 // len(paths)):
            begun = time.perf_counter()
            get(path)
            times.append(1000 * (time.perf_counter() - begun))
        return statistics.quantiles(times, n=20)[-1]

    get("jobs")
    before = memory(process)
    fill()
    end = time.monotonic() + 60
    while get("health")["seq"] < JOBS:
        assert time.monotonic() < end
    page = get("jobs")
    assert (page["total"], len(page["jobs"])) == (JOBS + 1, 100)
    deep = [page["next"]]
    for _ in range(20):
        deep.append(get(f"jobs?limit=1000&cursor={deep[-1]}")["next"])
    note = f"{JOBS:,} jobs, 100 of them a page"
    table.hold("GET jobs, p95", p95("jobs"), 50, " ms", note)
    table.hold("GET jobs, deep pages, p95", p95(*(f"jobs?cursor={cursor}" for cursor in deep)), 50, " ms", note)
    table.hold("GET jobs?state=, p95", p95("jobs?state=FAILED", "jobs?state=RUNNING,PENDING"), 50, " ms", note)
    table.hold("GET jobs?pool=&name=, p95", p95("jobs?pool=local&name=model%2042"), 50, " ms", note)
    table.hold("GET jobs?sort=name, p95", p95("jobs?sort=name"), 50, " ms", note)
    table.hold("GET jobs?since=, p95", p95(f"jobs?since={JOBS - 10}"), 50, " ms", note)
    table.hold("GET tasks, p95", p95(f"jobs/{tasks.id}/tasks"), 50, " ms", "10,000 tasks")
    table.hold("memory that the server grows by", memory(process) - before, 100, " MB", note)
