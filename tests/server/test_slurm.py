"""A real Slurm: one process asks it, however many look; a new server asks nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.practice import PracticeSlurm, missing_commands, slurm_up

pytestmark = pytest.mark.slurm

DEADLINE = 120.0
LOGGING = '#!/bin/sh\necho "$PPID $*" >> {folder}/{name}.log\nexec {command} "$@"\n'
KERNEL = """
import sys
import jupyter_hybrid as hy

def wait(gate):
    import os, time
    while not os.path.exists(gate):
        time.sleep(0.05)
    return 42

job = hy.Executor("hpc", time="10min").submit(wait, sys.argv[1])
print(job.id, flush=True)
print(job.result(), flush=True)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[PracticeSlurm]:
    missing = missing_commands()
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"no {', '.join(missing)}; apt-get install --no-install-recommends slurm-wlm slurm-client munge")
    # Not pytest's own folder: its path can be too long for sockets.
    practice = slurm_up(f"server{os.getpid()}", nodes=2, cpus=4, folder=tempfile.mkdtemp(prefix="hy-"), register=False)
    try:
        yield practice
    finally:
        practice.down()


@pytest.fixture
def asked(
    cluster: PracticeSlurm, tmp_path: Path, pools: Callable[[str], Path]
) -> Callable[[str], list[tuple[int, str]]]:
    """A pool ``hpc`` whose commands write down who calls them; returns what reads that: (process, arguments)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "sbatch"):
        (folder / name).write_text(LOGGING.format(folder=folder, name=name, command=shutil.which(name)))
        (folder / name).chmod(0o755)
    pools(
        "default: here\npools:\n  here: {kind: local}\n  hpc:\n    kind: slurm\n"
        f"    env: {{SLURM_CONF: {cluster.conf}, PATH: '{folder}:{os.environ['PATH']}'}}\n"
        "    limits: {poll_min: 0.5s, poll_max: 2s}\n"
    )

    def read(name: str) -> list[tuple[int, str]]:
        path = folder / f"{name}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(line.split(" ")[0]), line.partition(" ")[2]) for line in lines]

    return read


def until(holds: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE
    while not (found := holds()):
        assert time.monotonic() < end, f"{what}: not within {DEADLINE:g} s"
        time.sleep(0.05)
    return found


@pytest.mark.timeout(600)
def test_one_asks_for_all_and_a_new_server_asks_nothing_twice(
    asked: Callable[[str], list[tuple[int, str]]], server: Callable[[], Any], tmp_path: Path
) -> None:
    def queries() -> list[int]:
        return [process for process, words in asked("squeue") if "-O" in words]  # not those for the capacity

    gate, kernels = tmp_path / "gate", []
    first = server()
    try:
        for _ in range(3):
            argv = [sys.executable, "-W", "ignore", "-c", KERNEL, str(gate)]
            kernels.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        ids = [kernel.stdout.readline().strip() for kernel in kernels]
        jobs = until(
            lambda: (rows := first.get("jobs")["jobs"]) and {row["state"] for row in rows} == {"RUNNING"} and rows,
            "jobs",
        )
        assert {row["id"] for row in jobs} == set(ids)
        seen = len(queries())
        until(lambda: len(queries()) >= seen + 3, "three more questions")
        assert len(set(queries()[seen:])) == 1  # one of the four asks for all of them
        pools = {pool["name"]: pool for pool in first.get("pools")["pools"]}
        until(lambda: first.get("pools/hpc")["cpus_total"] == 8, "the capacity")
        assert pools["hpc"]["active"] == 3

        first.stop()
        second = server()
        assert {row["state"] for row in second.get("jobs")["jobs"]} == {"RUNNING"}
        gate.touch()
        assert [kernel.stdout.readline().strip() for kernel in kernels] == ["42"] * 3
        until(lambda: second.get("jobs")["counts"] == {"COMPLETED": 3}, "the end of all")
    finally:
        for kernel in kernels:
            kernel.kill()
            kernel.wait()
            kernel.stdout.close()
    assert len(asked("sbatch")) == 3
    assert all(len(default_store().submissions(job_id)) == 1 for job_id in ids)

    # All has ended: a third one has nothing to ask.
    until(lambda: not second.get("health")["tracking"], "the last round")
    second.stop()
    before = len(queries())
    third = server()
    assert third.get("jobs")["counts"] == {"COMPLETED": 3}
    job = hy.Executor("here").submit(pow, 2, 3)
    until(lambda: third.get(f"jobs/{job.id}")["ended"], "a job elsewhere")
    assert len(queries()) == before
    assert len(asked("sbatch")) == 3


async def test_hold_and_release_in_a_real_queue(api: Any, asked: Any) -> None:
    filler = hy.Executor("hpc", time="10min", cpus=4).array(_wait, [None, None])
    await api.job(filler.id, lambda job: job["running"] == 2)
    job = hy.Executor("hpc", time="1min").submit(pow, 2, 10)
    await api.job(job.id, lambda job: job["state"] == "PENDING")
    assert (await api(f"jobs/{job.id}/hold", method="POST"))["job"]["held"]
    await api.job(job.id, lambda job: "(held by" in job["reason"])
    await api(f"jobs/{filler.id}/cancel", method="POST")
    assert (await api.ended(filler.id))["state"] == "CANCELLED"
    assert (await api(f"jobs/{job.id}"))["held"]
    await api(f"jobs/{job.id}/release", method="POST")
    assert (await api.ended(job.id))["state"] == "COMPLETED"


def _wait(_: None) -> None:
    import time

    time.sleep(600)
