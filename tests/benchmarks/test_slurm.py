"""Speed on a real Slurm, as ratios to its bare commands."""

from __future__ import annotations

import os
import resource
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy

pytestmark = [pytest.mark.benchmark, pytest.mark.slurm, pytest.mark.timeout(900)]


def sbatch(script: Path, *options: str) -> str:
    command = ["sbatch", "--parsable", "--output=/dev/null", *options, str(script)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def wait_for(reached: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


def quiet() -> None:
    """Wait until nothing of what ran before is left: Slurm starts nothing on a node that still cleans up."""

    def idle() -> bool:
        jobs = subprocess.run(["squeue", "-h"], capture_output=True, check=True, text=True).stdout
        nodes = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, check=True, text=True).stdout
        return not jobs and set(nodes.split()) == {"idle"}

    wait_for(idle)


def write_script(path: Path, *lines: str) -> Path:
    path.write_text("#!/bin/bash\n" + "\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_submitting_a_function_and_a_cell(pool: str, table: Any, tmp_path: Path) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "jupyter_hybrid")
    ex = hy.Executor(pool)
    script = write_script(tmp_path / "job.sh", "true")
    seconds: dict[str, list[float]] = {"bare": [], "function": [], "cell": []}
    jobs = []
    for round_ in range(12):
        bare = timed(lambda: sbatch(script))
        function = timed(lambda: jobs.append(ex.submit(abs, -1)))
        cell = timed(lambda: shell.run_cell_magic("slurm", "--as j", "y = 1 + 1"))
        jobs[-1].result(120)
        shell.user_ns["j"].result(120)
        if round_ >= 3:
            for key, value in (("bare", bare), ("function", function), ("cell", cell)):
                seconds[key].append(value)
    floor = statistics.median(seconds["bare"])
    for key in ("function", "cell"):
        took = statistics.median(seconds[key])
        note = f"{1000 * took:.1f} ms, bare sbatch {1000 * floor:.1f} ms"
        table.hold(f"submit a {key} (1.5 x sbatch + 10 ms)", took / (1.5 * floor + 0.010), 1.0, note=note)


def test_one_function_from_call_to_result(pool: str, table: Any, tmp_path: Path) -> None:
    ex = hy.Executor(pool)
    bare, ours = [], []
    for round_ in range(9):
        done = tmp_path / f"done{round_}"
        script = write_script(tmp_path / f"{round_}.sh", f"{sys.executable} -c pass", f"touch {done}")

        def floor(script: Path = script, done: Path = done) -> None:
            sbatch(script)
            wait_for(done.exists)

        def call() -> None:
            assert ex.submit(abs, -1).result(120) == 1

        # Slurm schedules at intervals: the order changes, so that neither always meets the same moment of one.
        first, second = (floor, call) if round_ % 2 else (call, floor)
        took = {first: timed(first), second: timed(second)}
        if round_:
            bare.append(took[floor])
            ours.append(took[call])
    floor_time, our_time = statistics.median(bare), statistics.median(ours)
    note = f"{1000 * our_time:.0f} ms, bare {1000 * floor_time:.0f} ms"
    table.hold("call to result (1.15 x bare + 50 ms)", our_time / (1.15 * floor_time + 0.050), 1.0, note=note)


def test_a_thousand_trivial_tasks(pool: str, table: Any, tmp_path: Path) -> None:
    ex = hy.Executor(pool)
    bare, ours = [], []
    for round_ in range(5):
        done = tmp_path / f"done{round_}"
        done.mkdir()
        script = write_script(
            tmp_path / f"{round_}.sh", f"{sys.executable} -c pass", f"touch {done}/$SLURM_ARRAY_TASK_ID"
        )

        def floor(script: Path = script, done: Path = done) -> None:
            sbatch(script, "--array=0-999")
            wait_for(lambda: len(os.listdir(done)) == 1000)

        quiet()
        bare.append(timed(floor))
        quiet()
        ours.append(timed(lambda: ex.array(abs, range(1000)).results(300)))
    floor_time, our_time = statistics.median(bare), statistics.median(ours)
    note = f"{our_time:.2f} s, bare array {floor_time:.2f} s"
    table.hold("1,000 tasks, batch auto / bare array", our_time / floor_time, 0.2, note=note)


DASK = """
import sys, time
start = time.perf_counter()
from dask_jobqueue import SLURMCluster
from distributed import Client
with SLURMCluster(cores=1, memory="1GB", processes=1, log_directory=sys.argv[1]) as cluster, Client(cluster) as client:
    cluster.scale(jobs=1)
    client.submit(abs, -1).result()
    print(time.perf_counter() - start)
"""
OURS = """
import time
start = time.perf_counter()
import jupyter_hybrid as hy
assert len(hy.Executor("hpc").array(abs, range(200)).results(120)) == 200
print(time.perf_counter() - start)
"""


ROUNDS = 11
PERIOD = 1.0  # seconds between two looks of slurmctld at its queue


def test_two_hundred_tasks_from_cold_against_dask(pool: str, table: Any, tmp_path: Path) -> None:
    # As for any user, bytecode is kept: whoever compiles anew at each start measures the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(code: str, shift: float) -> float:
        quiet()
        time.sleep((shift - time.time()) % PERIOD)
        command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
        return float(subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout)

    took: dict[str, list[float]] = {DASK: [], OURS: []}
    for code in took:
        run(code, 0)
    for round_ in range(3 * ROUNDS):
        # A job waits up to a second for slurmctld to look at its queue, which it does at fixed moments of the clock:
        # the rounds begin evenly spread over that second, for both the same. The order changes, so that neither always
        # meets what the other has left behind.
        for code in (DASK, OURS) if round_ % 2 else (OURS, DASK):
            took[code].append(run(code, PERIOD * round_ / ROUNDS))
        if round_ % ROUNDS == ROUNDS - 1:
            floor, median = statistics.median(took[DASK]), statistics.median(took[OURS])
            if median < 0.9 * floor:  # else it is too near to tell from so few
                break
    note = f"{median:.2f} s, Dask's first result {floor:.2f} s"
    table.hold("200 tasks from cold / Dask's cold start", median / floor, 1.0, note=note)


def counting_commands(folder: Path) -> Path:
    """Put commands before Slurm's that write each call to a file; return the file."""
    folder.mkdir()
    log = folder / "calls"
    log.touch()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "scancel"):
        real = subprocess.run(["which", name], capture_output=True, check=True, text=True).stdout.strip()
        fake = write_script(folder / name, f'echo "{name} $*" >> {log}', f'exec {real} "$@"')
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return log


def test_ten_thousand_tasks_are_one_submission(
    pool: str, table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ex = hy.Executor(pool)
    ex.array(abs, range(2)).results(120)
    log = counting_commands(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{log.parent}:{os.environ['PATH']}")
    script = write_script(tmp_path / "job.sh", "true")
    floor = statistics.median(timed(lambda: sbatch(script)) for _ in range(5))
    log.write_text("")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    arrays = []
    for _ in range(5):
        times.append(timed(lambda: arrays.append(ex.array(abs, range(10_000)))))
        assert sum(arrays[-1].results(300)) == 49_995_000
    submissions = [line for line in log.read_text().splitlines() if line.startswith("sbatch")]
    assert len(submissions) == len(arrays)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    took = statistics.median(times)
    table.hold(
        "10,000 tasks: submission (1 s + sbatch)", took / (1 + floor), 1.0, note=f"{1000 * took:.0f} ms, one sbatch"
    )
    table.hold("10,000 tasks: client memory growth", grown, 50, " MB", "five arrays, results loaded")


WAITER = """
import sys, time
import jupyter_hybrid as hy
jobs = [hy.job(i) for i in open(sys.argv[1]).read().split()]
print("ready", flush=True)
time.sleep(60)
print(sum(job.state == "RUNNING" for job in jobs), flush=True)
"""


@pytest.mark.timeout(900)
def test_three_kernels_wait_on_a_thousand_running_jobs(
    pool: str, table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "release"

    def hold(path: str) -> None:
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.5)

    # 32 cores hold 1,000 tasks at once only as an array whose batches run many tasks: here, 20 jobs of 50 tasks.
    ex = hy.Executor(pool)
    arrays = [ex.array(hold, [str(release)] * 50, batch=50) for _ in range(20)]
    wait_for(lambda: all(array.state == "RUNNING" for array in arrays))
    log = counting_commands(tmp_path / "bin")
    ids = tmp_path / "ids"
    ids.write_text("\n".join(array.id for array in arrays))
    monkeypatch.setenv("PATH", f"{log.parent}:{os.environ['PATH']}")
    waiters = [
        subprocess.Popen([sys.executable, "-c", WAITER, str(ids)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    try:
        for waiter in waiters:
            assert waiter.stdout is not None
            assert waiter.stdout.readline() == "ready\n"
        log.write_text("")
        for waiter in waiters:
            assert waiter.stdout is not None
            assert waiter.stdout.readline() == "20\n"
        calls = log.read_text().splitlines()
    finally:
        for waiter in waiters:
            waiter.kill()
            waiter.communicate()
        release.touch()
    table.hold("scheduler commands in 60 s of three kernels", len(calls), 15, note="1,000 tasks in 20 running jobs")
    for array in arrays:
        array.wait(120)
