"""Processes are killed at random moments; afterwards every intent must have run exactly once (promise 1)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from jupyter_hybrid import launch
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.practice import PracticeSlurm
from jupyter_hybrid.spec import JobState
from jupyter_hybrid.store import JobRow

pytestmark = pytest.mark.campaign

SUBMITTER = """
import os, random, sys
import jupyter_hybrid as hy
from jupyter_hybrid import capture, launch
from jupyter_hybrid.pool import get_pool

def mark(path, task):
    with open(path, "ab", buffering=0) as file:
        file.write(f"{os.environ['HYBRID_ID']}.{task}\\n".encode())

CELL = '''
import os
with open(marks, "ab", buffering=0) as file:
    written = file.write(f"{os.environ['HYBRID_ID']}.0\\\\n".encode())
'''

pool, marks, acknowledged, jobs, seed = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
moments = random.Random(seed)
ex = hy.Executor(pool)
print("ready", flush=True)
for _ in range(jobs):
    kind = moments.choices(["function", "array", "cell"], [12, 6, 1])[0]
    if kind == "function":
        id = ex.submit(mark, marks, 0).id
    elif kind == "array":
        id = ex.array(mark, [marks] * 3, range(3), batch=moments.choice(["auto", 2])).id
    else:  # as a magic does it
        cell = capture.collect(CELL, {"marks": marks}, outputs=["written"])
        resources = get_pool(pool).config.resources
        id = launch.launch(
            get_pool(pool), kind="cell", name="cell", payload=cell.frames, items=None, resources=resources, out=cell.out
        ).row.id
    with open(acknowledged, "ab", buffering=0) as file:
        file.write(id.encode() + b"\\n")
import time
time.sleep(60)  # until it is killed: the tracker thread goes on submitting
"""

TRACKER = """
from jupyter_hybrid.tracker import watch_all
import time
print("ready", flush=True)
while True:
    watch_all()
    time.sleep(0.05)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def kill(process: subprocess.Popen[bytes], after: float) -> None:
    """Kill a process after some seconds, in the middle of whatever it does."""
    time.sleep(after)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def settle(deadline: float) -> list[JobRow]:
    """Rebuild the Store, let one tracker finish everything, and return the rows of all jobs."""
    launch.reindex()
    handles = [launch.load_run(row.id) for row in default_store().jobs()]
    end = time.monotonic() + deadline
    while not all(run.settled and run.row.state.final for run in handles):
        assert time.monotonic() < end, Counter(default_store().job(run.row.id).state for run in handles)
        time.sleep(0.05)
    return default_store().jobs()


def campaign(pool: str, kills: int, tmp_path: Path, jobs: int, disturb: Callable[[], None] | None = None) -> None:
    """Kill submitters, then check that each whole intent ran once."""
    marks, acknowledged = tmp_path / "marks", tmp_path / "acknowledged"
    marks.touch()
    acknowledged.touch()
    moments = random.Random(20240229)
    tracker = start(TRACKER)
    running: list[subprocess.Popen[bytes]] = []
    for number in range(kills):
        running.append(start(SUBMITTER, pool, str(marks), str(acknowledged), str(jobs), str(number)))
        if len(running) == 2:
            kill(running.pop(0), moments.random() * 0.06)
        if disturb is not None and moments.random() < 0.2:
            disturb()
        if moments.random() < 0.2:
            kill(tracker, 0)
            tracker = start(TRACKER)
    for process in [*running, tracker]:
        kill(process, 0)
    rows = settle(180)
    ran = Counter(marks.read_text().split())
    assert set(acknowledged.read_text().split()) <= {row.id for row in rows}
    assert {task: count for task, count in ran.items() if count != 1} == {}
    assert set(ran) == {f"{row.id}.{task}" for row in rows for task in range(row.tasks)}
    assert {row.state for row in rows} == {JobState.COMPLETED}
    assert len(rows) > kills / 4, "hardly a submitter got as far as an intent: the kills come too early"
    assert {(row.kind, row.array) for row in rows} == {("function", False), ("function", True), ("cell", False)}


def kill_supervisor() -> None:
    """Kill the local pool's supervisor, if one runs."""
    for lock in (Path(os.environ["JUPYTER_HYBRID_HOME"]) / "local").glob("*/supervisor.lock"):
        pid = lock.read_text().strip()
        with contextlib.suppress(OSError, ValueError):
            if b"jupyter_hybrid.backends.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


@pytest.mark.timeout(600)
def test_local_pool_runs_every_intent_once_whoever_is_killed(tmp_path: Path) -> None:
    campaign("local", 120, tmp_path, 2, kill_supervisor)


@pytest.mark.timeout(600)
def test_slurm_runs_every_intent_once_whoever_is_killed(
    slurm: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "hybrid.yaml"
    config.write_text(
        f"default: hpc\npools:\n  hpc:\n    kind: slurm\n    env: {{SLURM_CONF: {slurm.conf}}}\n"
        "    resources: {memory: 100M}\n"
    )
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(config))
    campaign("hpc", 120, tmp_path, 2)
