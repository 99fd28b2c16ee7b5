"""``jupyter hybrid`` as its users run it: real processes, real jobs of the local pool."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.pool import default_store

DEADLINE = 120.0
COMMAND = str(Path(sys.executable).with_name("jupyter-hybrid"))

CONFIG = """\
pools:
  local:
    kind: local
    cpus: 2
    limits: {poll_min: 50ms}
  one:
    kind: local
    cpus: 1
"""


@pytest.fixture(autouse=True)
def pools(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pools.yaml"
    path.write_text(CONFIG)
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(path))
    return path


def cli(*argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [COMMAND, *argv], capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def answer(*argv: str, code: int = 0) -> Any:
    return json.loads(cli(*argv, "--json", code=code).stdout)


@contextlib.contextmanager
def started(*argv: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([COMMAND, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def say_and_wait(go: str) -> int:
    import os
    import time

    print("one é", flush=True)
    while not os.path.exists(go):
        time.sleep(0.01)
    print("two", flush=True)
    return 7


def needs(path: str) -> int:
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    return 3


def by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test's function so that it is pickled by value: the node cannot import this module."""
    function.__module__ = "__main__"
    return function


def running(go: Path, pool: str = "local") -> hy.Job:
    job = hy.Executor(pool).submit(by_value(say_and_wait), str(go))
    until(lambda: job.state is hy.JobState.RUNNING)
    return job


def done(value: Any = 1, **options: Any) -> hy.Job:
    job = hy.Executor("local", **options).submit(abs, value)
    assert job.result(DEADLINE) == abs(value)
    until(lambda: job.state.final)
    return job


# --- the command itself ---------------------------------------------------------------------------------------------


def test_help_loads_nothing_but_the_parser() -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "jupyter_hybrid", "--help"]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines() if line.startswith("import time:")}
    assert "practice" in shown.stdout
    assert {name for name in loaded if name.startswith("jupyter_hybrid")} <= {"jupyter_hybrid", "jupyter_hybrid.cli"}
    assert not loaded & {"yaml", "sqlite3", "IPython", "numpy", "pandas", "dask", "cloudpickle", "jupyter_core"}


def test_jupyter_finds_it() -> None:
    jupyter = Path(sys.executable).with_name("jupyter")
    environment = {**os.environ, "PATH": f"{jupyter.parent}{os.pathsep}{os.environ['PATH']}"}
    shown = subprocess.run(
        [jupyter, "hybrid", "--version"], capture_output=True, text=True, timeout=DEADLINE, env=environment, check=True
    )
    assert shown.stdout.strip() == hy.__version__


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, ""),
        (["jbos"], 2, "no verb 'jbos'; did you mean 'jobs'?"),
        (["jobs", "--stat", "running"], 2, "jobs: error: '--stat' is not understood; did you mean '--state'?"),
        (["retry", "x", "--memroy=5G"], 2, "did you mean '--memory'?"),
        (["jobs", "--state", "RUNING"], 1, "no state 'RUNING'; did you mean 'RUNNING'?"),
        (["clean", "--older-than", "0"], 1, "--yes confirms it"),
        (["jobs", "--limit", "0"], 2, "whole number"),
        (["jobs", "--state", "DONE"], 1, "states are NEW"),
        (["jobs", "--pool", "lokal"], 1, "did you mean 'local'"),
        (["logs", "nosuchjob"], 1, "no job 'nosuchjob'"),
        (["cancel"], 2, "ID"),
        (["wait", "x", "--timeout", "soon"], 1, "not a duration"),
        (["result", "../x"], 1, "no job"),
        (["doctor", "hpc"], 1, "no pool 'hpc'"),
        (["clean", "--state", "RUNNING", "--dry-run"], 1, "only finished jobs"),
        (["track", "--once", "--until-idle"], 2, "not allowed"),
        (["practice", "slurm", "status", "--name", "nosuch"], 1, "no practice cluster"),
    ],
)
def test_wrong_use_is_told_in_one_line(argv: Sequence[str], code: int, words: str) -> None:
    said = cli(*argv, code=code)
    assert words in said.stderr
    if code == 1:
        assert said.stderr.startswith("jupyter hybrid: ")
        assert len(said.stderr.splitlines()) == 1
        assert "Traceback" not in said.stderr


def test_a_malformed_configuration_is_told_with_its_line(pools: Path) -> None:
    pools.write_text("pools:\n  local:\n    kindd: local\n")
    assert f"{pools}:3: " in cli("pools", code=1).stderr


def test_a_closed_pipe_is_no_error() -> None:
    done()
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([COMMAND, "jobs"], stdout=write, stderr=subprocess.PIPE, timeout=DEADLINE, check=False)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, b"")


# --- looking --------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_and_filtered(tmp_path: Path) -> None:
    good = done(name="good one")
    bad = hy.Executor("one").submit(int, "x")
    assert isinstance(bad.exception(DEADLINE), ValueError)
    until(lambda: bad.state.final)
    listed = answer("jobs")
    assert [job["id"] for job in listed] == [bad.id, good.id]
    assert (listed[0]["state"], listed[0]["cause"], listed[1]["name"]) == ("FAILED", "USER_ERROR", "good one")
    for argv, ids in (
        (["--state", "completed"], [good.id]),
        (["--state", "failed,completed"], [bad.id, good.id]),
        (["--state", "FAILED", "--state", "RUNNING"], [bad.id]),
        (["--pool", "one"], [bad.id]),
        (["--name", "od o"], [good.id]),
        (["--limit", "1"], [bad.id]),
        (["--limit", "1", "--all"], [bad.id, good.id]),
    ):
        assert [job["id"] for job in answer("jobs", *argv)] == ids
    shown = cli("jobs", "--limit", "1")
    assert bad.id in shown.stdout
    assert good.id not in shown.stdout
    assert "1 of 2 jobs" in shown.stderr


def test_pools_scripts_and_reasons() -> None:
    found = {pool["name"]: pool for pool in answer("pools")}
    assert (found["one"]["snapshot"]["total_cpus"], found["one"]["reachable"]) == (1, True)
    assert "one" in cli("pools").stdout
    job = done()
    assert cli("script", job.id[:6]).stdout == job.script == answer("script", job.id)["script"]
    assert "cache=True" in cli("why", job.id).stdout
    assert len(answer("why", job.id)["why"]) == 1


def test_a_pool_that_cannot_be_reached_keeps_nothing_waiting(pools: Path) -> None:
    pools.write_text(CONFIG + "  away:\n    kind: slurm\n    env: {PATH: /nonexistent}\n")
    job = hy.Executor("away").submit(abs, 1)
    until(lambda: default_store().pool("away").unreachable_since is not None)
    said = cli("jobs", "--pool", "away")
    assert job.id in said.stdout
    assert "pool 'away' is unreachable since 2" in said.stderr
    assert answer("jobs")[0]["pool_unreachable_since"] is not None
    assert answer("jobs")[0]["state"] == "NEW"
    assert "CANCELLED" in cli("cancel", job.id).stdout  # no scheduler has it


# --- logs -----------------------------------------------------------------------------------------------------------


def test_logs_are_followed_to_the_end(tmp_path: Path) -> None:
    job = running(tmp_path / "go")
    with started("logs", "-f", job.id) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one é\n"
        assert process.poll() is None
        (tmp_path / "go").touch()
        assert process.stdout.read() == "two\n"
        assert process.wait(DEADLINE) == 0
    assert cli("logs", job.id).stdout == answer("logs", job.id)["log"] == "one é\ntwo\n"


def test_logs_of_single_tasks(tmp_path: Path) -> None:
    array = hy.Executor("local").array(print, ["a", "b", "c"], batch=2)
    array.results(DEADLINE)
    until(lambda: array.state.final)
    assert [cli("logs", array.id, "--task", str(task)).stdout for task in range(3)] == ["a\n", "b\n", "c\n"]
    assert cli("logs", "-f", array.id, "--task", "1").stdout == "b\n"
    assert cli("logs", "-f", array.id).stdout == "==> batch 0 <==\na\nb\n==> batch 1 <==\nc\n"
    assert "tasks 0 to 2, not 3" in cli("logs", array.id, "--task", "3", code=1).stderr


# --- acting ---------------------------------------------------------------------------------------------------------


def test_waiting_and_running_jobs_are_cancelled(tmp_path: Path) -> None:
    first = running(tmp_path / "go", "one")
    second = hy.Executor("one").submit(abs, 1)
    until(lambda: bool(second.native_id))
    ended = done()
    said = answer("cancel", first.id, second.id, ended.id)
    assert [(each["id"], each["state"]) for each in said] == [
        (first.id, "CANCELLED"),
        (second.id, "CANCELLED"),
        (ended.id, "COMPLETED"),
    ]
    assert "ended already" in said[2]["said"]


def test_no_job_is_cancelled_if_one_is_unknown(tmp_path: Path) -> None:
    job = running(tmp_path / "go")
    cli("cancel", job.id, "nosuch", code=1)
    (tmp_path / "go").touch()
    assert job.result(DEADLINE) == 7


def test_what_failed_is_run_again_with_other_resources(tmp_path: Path) -> None:
    wanted = tmp_path / "wanted"
    array = hy.Executor("local").array(by_value(needs), [str(tmp_path), str(wanted)], batch=1)
    until(lambda: array.state.final)
    failed = answer("wait", array.id, code=1)
    assert (failed[0]["state"], failed[0]["done"], failed[0]["failed"]) == ("FAILED", 1, 1)
    assert "FileNotFoundError" in cli("result", array.id, code=1).stderr
    for options in ([], ["--task", "1"]):
        said = answer("result", array.id, *options, code=1)
        assert (said["id"], said["cause"]) == (array.id, "USER_ERROR")
        assert f"FileNotFoundError: {wanted}" in said["error"]
    wanted.touch()
    assert answer("retry", array.id, "--time", "5min", "--memory", "1G")["tasks_run_again"] == 1
    assert "COMPLETED" in cli("wait", array.id, "--timeout", "2min").stdout
    assert answer("result", array.id) == [3, 3]
    assert answer("result", array.id, "--task", "1") == 3
    again = array.run.folder.attempt(2)
    assert (again.tasks, again.resources.memory) == (((1, 2),), 2**30)
    assert "nothing to run again" in cli("retry", array.id).stdout


def test_wait_tells_by_its_exit_status(tmp_path: Path) -> None:
    job, good = running(tmp_path / "go"), done()
    assert "RUNNING" in cli("wait", good.id, job.id, "--timeout", "100ms", code=1).stdout
    with started("wait", good.id, job.id) as process:
        (tmp_path / "go").touch()
        assert process.wait(DEADLINE) == 0
    cli("retry", job.id, "--memory", "8Q")  # nothing is missing, nothing is asked for
    assert "is not an amount" in cli("retry", hy.Executor("local").submit(int, "x").id, "--memory", "8Q", code=1).stderr


def test_results_are_shown_as_text_and_as_json(tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text(
        "class Point:\n    def __repr__(self): return 'a point'\ndef make(): return Point()\n"
    )
    import numpy as np

    executor = hy.Executor("local")
    sys.path.insert(0, str(tmp_path))
    try:
        import shapes  # type: ignore[import-not-found]

        point = executor.submit(shapes.make)
    finally:
        sys.path.remove(str(tmp_path))
    array, nan = executor.submit(np.arange, 3), executor.submit(float, "nan")
    for job in (point, array, nan):
        until(lambda: job.state.final)  # noqa: B023
    assert cli("result", point.id).stdout == "a point\n"
    assert "shapes.Point" in cli("result", point.id, "--json", code=1).stderr
    assert answer("result", array.id) == [0, 1, 2]
    assert "JSON cannot hold" in cli("result", nan.id, "--json", code=1).stderr
    waiting = running(tmp_path / "go")
    assert f"jupyter hybrid wait {waiting.id}" in cli("result", waiting.id, code=1).stderr
    said = answer("result", waiting.id, code=1)
    assert ("is RUNNING" in said["error"], said["cause"]) == (True, None)
    cli("cancel", waiting.id)
    assert "was cancelled" in cli("result", waiting.id, code=1).stderr


# --- upkeep ---------------------------------------------------------------------------------------------------------


def test_the_store_is_built_anew(home: Path) -> None:
    good, bad = done(-4), hy.Executor("local").submit(int, "x")
    until(lambda: bad.state.final)
    before = {job["id"]: job["state"] for job in answer("jobs")}
    for path in home.glob("store.sqlite*"):
        path.unlink()
    damaged = home / "runs" / "aaaaaaaaaa"
    damaged.mkdir()
    (damaged / "spec.json").write_text("{")
    assert answer("reindex") == {"jobs": 2}
    assert {job["id"]: job["state"] for job in answer("jobs")} == before
    assert answer("result", good.id) == 4


ABANDON = """
import os
from jupyter_hybrid import launch, executor
launch.follow = lambda *_: None
print(executor.Executor("local").submit(abs, -5).id, flush=True)
os._exit(0)
"""


def test_jobs_go_on_without_a_kernel() -> None:
    # The intent is on disk, and its process ends before the scheduler hears of it.
    argv = [sys.executable, "-c", ABANDON]
    job_id = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=True).stdout.strip()
    assert default_store().job(job_id).state is hy.JobState.NEW
    said = [json.loads(line) for line in cli("track", "--until-idle", "--json").stdout.splitlines()]
    assert {line["id"] for line in said} == {job_id}
    assert said[-1]["state"] == "COMPLETED"
    assert answer("result", job_id) == 5
    assert cli("track", "--once").stdout == ""


def test_tracking_ends_with_ctrl_c_and_takes_up_new_jobs(tmp_path: Path) -> None:
    with started("track", "--json") as process:
        assert process.stdout is not None
        job = running(tmp_path / "go")
        assert json.loads(process.stdout.readline())["id"] == job.id
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
    (tmp_path / "go").touch()
    assert job.result(DEADLINE) == 7


def test_only_finished_jobs_are_cleaned(tmp_path: Path) -> None:
    go = tmp_path / "go"
    active, first, second = running(go), done(), done()
    bad = hy.Executor("local").submit(int, "x")
    until(lambda: bad.state.final)
    dependent = hy.Executor("one", after=[active, first]).submit(abs, 1)
    assert answer("clean", "--yes")["found"] == []  # nothing is 30 days old
    found = answer("clean", "--older-than", "0s", "--dry-run")
    assert [each["id"] for each in found["found"]] == [second.id, bad.id]  # the first is waited for
    assert found["bytes"] > 0
    assert found["removed"] == []
    assert "is RUNNING; only finished" in cli("clean", active.id, "--yes", code=1).stderr
    assert f"{dependent.id} waits for it" in cli("clean", first.id, "--yes", code=1).stderr
    cli("clean", "--older-than", "0", "--state", "failed", code=1)  # nobody can be asked
    assert bad.folder.exists()
    assert answer("clean", "--older-than", "0", "--state", "failed", "--yes")["removed"] == [bad.id]
    assert not bad.folder.exists()
    assert second.folder.exists()
    go.touch()
    assert dependent.result(DEADLINE) == 1
    until(lambda: dependent.state.final and active.state.final)
    assert "removed 4" in cli("clean", "--older-than", "0", "--yes").stdout
    assert answer("jobs") == []
    assert not [path for path in first.folder.parent.iterdir() if path.name != ".worker"]


@pytest.mark.parametrize(("reply", "left"), [("n\n", 1), ("y\n", 0)])
def test_cleaning_asks_on_a_terminal(reply: str, left: int) -> None:
    done()
    keyboard, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            [COMMAND, "clean", "--older-than", "0"], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            os.write(keyboard, reply.encode())
            _, err = process.communicate(timeout=DEADLINE)
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert process.returncode == 0
    assert b"Remove 1 finished job with all results? [y/N]" in err
    assert len(answer("jobs")) == left


def test_a_removed_job_holds_up_no_other_process() -> None:
    gone, kept = done(), done()
    watcher = hy.job(kept.id)
    answer("clean", gone.id, "--yes")
    assert done(9).result(DEADLINE) == 9
    assert watcher.result(DEADLINE) == 1
    with pytest.raises(hy.HybridError, match="no job"):
        hy.job(gone.id)


def test_progress_is_shown_on_a_terminal_only() -> None:
    job = done()
    assert cli("wait", job.id).stderr == ""
    screen, terminal = pty.openpty()
    try:
        process = subprocess.run(
            [COMMAND, "jobs"], stdout=subprocess.PIPE, stderr=terminal, timeout=DEADLINE, check=True
        )
        assert b"asking the pools" in os.read(screen, 4096)
    finally:
        os.close(screen)
        os.close(terminal)
    assert job.id.encode() in process.stdout


def test_the_doctor_reports_by_its_exit_status(pools: Path) -> None:
    assert answer("doctor", "local")["ok"] is True
    assert "1 pool working" in cli("doctor", "one").stdout
    pools.write_text("pools:\n  bad:\n    kind: local\n    python: /nonexistent/python\n")
    assert answer("doctor", "bad", code=1)["ok"] is False
    assert "not working: bad" in cli("doctor", code=1).stdout
