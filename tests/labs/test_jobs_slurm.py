"""Jobs, arrays and cells on a real Slurm, and what goes wrong there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid import launch
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.practice import PracticeSlurm


def wait_for(reached: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, [(row.name, row.state, row.reason) for row in default_store().jobs()]
        time.sleep(0.02)


def configure(cluster: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: str = "") -> str:
    config = tmp_path / "hybrid.yaml"
    config.write_text(
        f"default: hpc\npools:\n  hpc:\n    kind: slurm\n    env: {{SLURM_CONF: {cluster.conf}}}\n"
        f"    limits: {{poll_min: 300ms, poll_max: 2s{limits}}}\n"
    )
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(config))
    return "hpc"


@pytest.fixture
def pool(slurm: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return configure(slurm, tmp_path, monkeypatch)


def command(cluster: PracticeSlurm, *argv: str) -> str:
    environment = {**os.environ, **cluster.env}
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_function_runs_and_its_environment_is_slurms(pool: str) -> None:
    def where() -> tuple[str, str]:
        import os

        print("hello from the node")
        return os.environ["SLURM_JOB_ID"], os.environ["SLURM_CPUS_PER_TASK"]

    job = hy.Executor(pool, cpus=2, memory="200M", time="10min").submit(where)
    assert job.result(120) == (job.native_id, "2")
    assert "hello from the node" in job.logs()
    wait_for(lambda: job.state == "COMPLETED")
    assert "--cpus-per-task" not in job.script
    assert job.script.startswith("#!/bin/bash")


def test_arrays_in_all_batch_sizes(pool: str) -> None:
    def twice(x: int) -> int:
        return 2 * x

    ex = hy.Executor(pool, memory="100M")
    for batch in ("auto", 1, 7):
        array = ex.array(twice, range(30), batch=batch)
        assert array.results(180) == [2 * x for x in range(30)]
        assert array.states == Counter({hy.JobState.COMPLETED: 30})
    assert list(ex.map(twice, range(5), timeout=120)) == [0, 2, 4, 6, 8]


def test_an_array_above_the_sites_limit_is_cut_into_chunks(
    slurm: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = configure(slurm, tmp_path, monkeypatch, ", max_array: 9")

    def say(x: int) -> int:
        print("task", x)
        return x

    array = hy.Executor(pool, memory="100M").array(say, range(20), batch=1)
    assert array.results(180) == list(range(20))
    assert [len(row.native_id) > 0 for row in default_store().submissions(array.id)] == [True] * 3
    for task in (0, 8, 9, 19):
        assert array[task].logs() == f"task {task}\n"


def test_an_array_above_the_sites_own_limit_runs_as_several(
    slurm_limited: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = configure(slurm_limited, tmp_path, monkeypatch)

    def where(x: int) -> tuple[int, str, str]:
        import os

        print("task", x)
        return x, os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]

    array = hy.Executor(pool, memory="100M").array(where, range(12), batch=1)
    results = array.results(180)
    submissions = default_store().submissions(array.id)
    assert [(row.first, row.batches) for row in submissions] == [(0, 5), (5, 5), (10, 2)]
    assert results == [(x, submissions[x // 5].native_id, str(x % 5)) for x in range(12)]
    assert [array[x].logs() for x in range(12)] == [f"task {x}\n" for x in range(12)]
    wait_for(lambda: array.state == "COMPLETED")


@pytest.mark.parametrize("limit", ["maxsubmitjobs", "grpsubmitjobs"])
def test_what_the_account_may_not_submit_yet_waits_with_the_reason(
    slurm_enforcing: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    pool = configure(slurm_enforcing, tmp_path, monkeypatch)
    user, account = command(slurm_enforcing, "id", "-un").strip(), f"of{limit}"
    command(slurm_enforcing, "sacctmgr", "-i", "add", "account", account)
    whose = f"{limit}=3"
    command(slurm_enforcing, "sacctmgr", "-i", "add", "user", user, f"account={account}")
    if limit == "maxsubmitjobs":
        command(slurm_enforcing, "sacctmgr", "-i", "modify", "user", user, "where", f"account={account}", "set", whose)
    else:
        command(slurm_enforcing, "sacctmgr", "-i", "modify", "account", account, "set", whose)
    release, marks = tmp_path / "release", tmp_path / "marks"

    def task(x: int, release: str, marks: str) -> int:
        import os
        import time

        with open(marks, "ab", buffering=0) as file:
            file.write(b"%d\n" % x)
        while not os.path.exists(release):
            time.sleep(0.05)
        return x

    ex = hy.Executor(pool, memory="100M", account=account)
    jobs = [ex.submit(task, x, str(release), str(marks)) for x in range(5)]
    array = ex.array(task, range(5, 8), [str(release)] * 3, [str(marks)] * 3, batch=1)
    waiting = [*jobs[3:], array]
    wait_for(lambda: all("it can be taken later" in each.reason for each in waiting))
    assert "SubmitJob" in waiting[0].reason
    assert [bool(job.native_id) for job in jobs] == [True, True, True, False, False]
    assert {each.state for each in waiting} == {hy.JobState.NEW}
    assert "max_jobs" not in waiting[0].reason  # others of ours are in the queue: there will be room
    listed = command(slurm_enforcing, "squeue", "-h", "-r", "-A", account, "-t", "PD,R", "-o", "%i")
    assert len(listed.split()) == 3
    release.touch()
    assert [job.result(180) for job in jobs] == [0, 1, 2, 3, 4]
    assert array.results(180) == [5, 6, 7]
    assert Counter(marks.read_text().split()) == Counter(map(str, range(8)))
    assert waiting[0].reason == ""


def test_storage_that_the_node_does_not_see(
    slurm: PracticeSlurm, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The submitting process has the storage mounted, in a mount namespace of its own; the node has not."""
    storage = tmp_path / "storage"
    storage.mkdir()
    config = Path(os.environ["JUPYTER_HYBRID_CONFIG"])
    config.write_text(f"{config.read_text()}    storage: {storage}\n")
    code = """
import sys, time, jupyter_hybrid as hy
job = hy.Executor("hpc").submit(abs, -1)
try:
    job.result(120)
except hy.HybridError as error:
    print(error)
while not job.state.final:
    time.sleep(0.02)
print(job.state, job.cause)
"""
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"', "sh", str(storage)]
    if os.geteuid() != 0 or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run([*mount, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("FAILED INFRASTRUCTURE\n"), done.stdout + done.stderr
    assert "does it see the storage" in done.stdout
    assert "doctor" in done.stdout


def test_a_job_name_with_anything_in_it_is_only_a_name(pool: str, tmp_path: Path) -> None:
    name = f"a'b\"c\n$(touch {tmp_path}/pwned) `id` é名 |;&"
    job = hy.Executor(pool, name=name).submit(abs, -3)
    assert job.result(120) == 3
    assert job.name == name
    assert hy.job(job.id).name == name
    assert not (tmp_path / "pwned").exists()


def test_a_partition_that_does_not_exist_is_refused_in_slurms_words(pool: str) -> None:
    job = hy.Executor(pool, partition="nosuch").submit(abs, -1)
    with pytest.raises(hy.HybridError, match="invalid partition specified: nosuch") as caught:
        job.result(60)
    assert job.cause is hy.Cause.SUBMIT_REJECTED
    assert "retry(partition=" in str(caught.value)
    assert job.retry(partition="main").result(120) == 1


def test_scancel_from_outside_is_seen(slurm: PracticeSlurm, pool: str) -> None:
    def sleep() -> None:
        import time

        time.sleep(300)

    job = hy.Executor(pool).submit(sleep)
    wait_for(lambda: job.state == "RUNNING")
    command(slurm, "scancel", job.native_id)
    wait_for(lambda: job.state.final)
    assert (job.state, job.cause) == ("CANCELLED", hy.Cause.CANCELLED)


def test_cancel_of_a_running_and_of_a_waiting_job(slurm: PracticeSlurm, pool: str) -> None:
    def sleep() -> None:
        import time

        time.sleep(300)

    running = hy.Executor(pool).submit(sleep)
    wait_for(lambda: running.state == "RUNNING")
    waiting = hy.Executor(pool, extra={"begin": "now+1hour"}).submit(sleep)
    wait_for(lambda: waiting.native_id)
    for job in (running, waiting):
        assert job.cancel()
    for job in (running, waiting):
        wait_for(lambda job=job: job.state.final)
        assert (job.state, job.cause) == ("CANCELLED", hy.Cause.CANCELLED)
        assert job.cancelled()
    wait_for(lambda: command(slurm, "squeue", "-h", "-j", running.native_id, "-o", "%T", "-t", "all") == "CANCELLED\n")


def test_dependencies_are_slurms_own(slurm: PracticeSlurm, pool: str, tmp_path: Path) -> None:
    release = tmp_path / "release"

    def hold(path: str, good: bool) -> None:
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.05)
        assert good, "as asked"

    first, bad = (hy.Executor(pool).submit(hold, str(release), good) for good in (True, False))
    after = hy.Executor(pool, after=[first]).submit(abs, -1)
    never = hy.Executor(pool, after=[bad]).submit(abs, -1)
    wait_for(lambda: after.native_id and never.native_id)
    assert f"afterok:{first.native_id}" in command(slurm, "squeue", "-h", "-j", after.native_id, "-o", "%E")
    release.touch()
    assert after.result(120) == 1
    wait_for(lambda: never.state.final)
    assert never.cause is hy.Cause.DEPENDENCY_FAILED


def test_a_controller_that_is_down_changes_no_state(slurm: PracticeSlurm, pool: str, tmp_path: Path) -> None:
    release = tmp_path / "release"

    def hold(path: str) -> str:
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.05)
        return "done"

    ex = hy.Executor(pool)
    running = ex.submit(hold, str(release))
    wait_for(lambda: running.state == "RUNNING")
    slurm.stop_controller()
    try:
        new = ex.submit(abs, -5)
        wait_for(lambda: default_store().pool(pool).unreachable_since is not None)
        assert running.state == "RUNNING"
        assert new.state == "NEW"
        assert "unreachable since" in repr(hy.pools())
        release.touch()
        assert running.result(60) == "done"  # the run folder says so, whatever the controller does
    finally:
        slurm.start_controller()
    assert new.result(180) == 5
    wait_for(lambda: default_store().pool(pool).unreachable_since is None)


def test_a_worker_that_dies_without_a_word_is_no_silent_hang(pool: str) -> None:
    def die() -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    job = hy.Executor(pool).submit(die)
    with pytest.raises(hy.HybridError, match="INFRASTRUCTURE"):
        job.result(120)
    assert job.cause is hy.Cause.INFRASTRUCTURE


def test_memory_above_the_request_is_out_of_memory(pool: str) -> None:
    def fill() -> int:
        data = [bytearray(50 << 20) for _ in range(20)]
        import time

        time.sleep(60)
        return len(data)

    job = hy.Executor(pool, memory="200M").submit(fill)
    with pytest.raises(hy.HybridError, match=r"retry\(memory="):
        job.result(120)
    assert job.cause is hy.Cause.OUT_OF_MEMORY


def test_walltime_is_a_timeout_and_unstarted_tasks_are_left(pool: str) -> None:
    def sleep(x: int) -> int:
        import time

        time.sleep(300 if x else 0)
        return x

    array = hy.Executor(pool, time="1min").array(sleep, range(3), batch=3)
    wait_for(lambda: array.state.final, 240)
    assert array.cause is hy.Cause.TIMEOUT
    assert array[0].result(5) == 0
    assert {task.index for task in array.failed} == {1, 2}


def test_node_failure_is_seen_and_the_job_runs_elsewhere(slurm: PracticeSlurm, pool: str, tmp_path: Path) -> None:
    release, marks = tmp_path / "release", tmp_path / "marks"

    def hold(task: int, release: str, marks: str) -> int:
        import os
        import time

        with open(marks, "a") as file:
            file.write(f"{task}\n")
        while task and not os.path.exists(release):
            time.sleep(0.05)
        return task

    array = hy.Executor(pool).array(hold, range(2), [str(release)] * 2, [str(marks)] * 2, batch=2)
    wait_for(lambda: array.states[hy.JobState.RUNNING] == 1)
    node = command(slurm, "squeue", "-h", "-j", array.native_id, "-o", "%N").strip()
    slurm.kill_node(node)
    try:
        wait_for(lambda: array.state == "PENDING")  # requeued, and not shown as running on a dead node
        wait_for(lambda: marks.read_text().split().count("1") == 2)
        release.touch()
        assert array.results(180) == [0, 1]
    finally:
        slurm.start_node(node)
    assert Counter(marks.read_text().split()) == {"0": 1, "1": 2}  # the finished task was not run again


def test_node_failure_without_requeue_is_node_failure(slurm: PracticeSlurm, pool: str) -> None:
    def sleep() -> None:
        import time

        time.sleep(300)

    job = hy.Executor(pool, extra={"no-requeue": None}).submit(sleep)
    wait_for(lambda: job.state == "RUNNING")
    node = command(slurm, "squeue", "-h", "-j", job.native_id, "-o", "%N").strip()
    slurm.kill_node(node)
    try:
        wait_for(lambda: job.state.final, 180)
        assert job.cause is hy.Cause.NODE_FAILURE
    finally:
        slurm.start_node(node)
    wait_for(lambda: set(slurm.status()["nodes"].values()) == {"idle"}, 60)


def test_preemption_is_not_the_end(slurm: PracticeSlurm, pool: str, tmp_path: Path) -> None:
    release = tmp_path / "release"

    def hold(path: str) -> int:
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.05)
        return 1

    low = hy.Executor(pool, partition="low", cpus=8, extra={"exclusive": None}).submit(hold, str(release))
    other = hy.Executor(pool, partition="low", cpus=8, extra={"exclusive": None}).submit(hold, str(release))
    wait_for(lambda: low.state == "RUNNING" and other.state == "RUNNING")
    high = hy.Executor(pool, partition="high", cpus=8, extra={"exclusive": None}).submit(abs, -1)
    assert high.result(120) == 1
    release.touch()
    assert [low.result(180), other.result(180)] == [1, 1]


def test_the_store_can_be_deleted_while_jobs_run(pool: str, tmp_path: Path) -> None:
    release = tmp_path / "release"

    def hold(path: str) -> int:
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.05)
        return 1

    job = hy.Executor(pool).submit(hold, str(release))
    wait_for(lambda: job.state == "RUNNING")
    code = "from jupyter_hybrid import launch; print(launch.reindex())"
    store = default_store()
    from jupyter_hybrid.tracker import tracker

    tracker.pool(hy.Executor(pool)._pool).leave()
    store.close()
    for ending in ("", "-wal", "-shm"):
        Path(f"{store.path}{ending}").unlink(missing_ok=True)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "1\n"
    release.touch()
    code = f"import jupyter_hybrid as hy; print(hy.job({job.id!r}).result(60))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_scripts_find_their_index(slurm: PracticeSlurm, pool: str, tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text('echo "$HYBRID_ARRAY_INDEX $SLURM_ARRAY_TASK_ID $1"\ntest $HYBRID_ARRAY_INDEX != 6\n')
    array = hy.submit_script(script, "word", pool=pool, array=range(5, 8))
    wait_for(array.done)
    assert [task.logs() for task in array] == [f"{i} {i} word\n" for i in (5, 6, 7)]
    assert [task.index for task in array.failed] == [1]
    assert launch.missing_tasks(array.run) == [1]
