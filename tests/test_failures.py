"""What goes wrong around a job: files, disks, processes, clocks, schedulers. Nothing hangs, nothing is made up."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid import backends, launch, submitter, tracker
from jupyter_hybrid.backends.base import Observation, PoolSnapshot, Submission
from jupyter_hybrid.errors import ConfigError, JobFailed, PoolUnreachable, ResultLost, StoreError, SubmitRejected
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.spec import Cause, JobState
from jupyter_hybrid.store import JobRow

DEADLINE = 90.0


def until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def configure(text: str) -> None:
    folder = Path(os.environ["JUPYTER_CONFIG_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hybrid.yaml").write_text(text)


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python code in processes that are gone at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def holding(path: Path) -> Callable[[Any], Any]:
    """Return a function that writes its pid to ``<path>.pid`` and waits for `path` to be there."""
    where = str(path)

    def task(value: Any = None) -> Any:
        import os
        import time

        with open(where + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(where + ".new", where + ".pid")
        while not os.path.exists(where):
            time.sleep(0.01)
        return value

    return task


def pid_of(path: Path) -> int:
    until(Path(f"{path}.pid").exists)
    return int(Path(f"{path}.pid").read_text())


# --- result files -------------------------------------------------------------------------------------------------


def truncate(path: Path, offset: int, length: int) -> None:
    os.truncate(path, offset + length // 2)


def flip(path: Path, offset: int, length: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 0x10
    path.write_bytes(data)


def remove(path: Path, offset: int, length: int) -> None:
    path.unlink()


@pytest.mark.parametrize(("damage", "lost"), [(truncate, {4, 5}), (flip, {4}), (remove, {3, 4, 5})])
def test_damaged_results_are_found_and_run_again_alone(
    tmp_path: Path, damage: Callable[[Path, int, int], None], lost: set[int]
) -> None:
    def task(number: int) -> int:
        with open(marks, "ab", buffering=0) as file:
            file.write(b"%d\n" % number)
        return number * 1000

    marks = str(tmp_path / "marks")
    array = hy.Executor("local").array(task, range(9), batch=3)
    assert array.results(DEADLINE) == [i * 1000 for i in range(9)]
    until(lambda: array.state.final and (array.folder / "results" / "1.bin").exists())
    entry = array.run.progress.results[4].entry
    damage(array.folder / "results" / "1.bin", entry.offset, entry.length)
    again = hy.job(array.id)
    for number in range(9):
        if number in lost:
            with pytest.raises(ResultLost, match=rf"task {number} .*lost"):
                again[number].result(0)
        else:
            assert again[number].result(0) == number * 1000
    with pytest.raises(ResultLost):
        array.results(0)
    assert len(array.results(0, errors="skip")) == 9 - len(lost)
    again.retry()
    assert again.results(DEADLINE) == [i * 1000 for i in range(9)]
    counts = [Path(marks).read_text().split().count(str(i)) for i in range(9)]
    assert counts == [2 if i in lost else 1 for i in range(9)]


def test_damaged_payload_is_named(tmp_path: Path) -> None:
    ex = hy.Executor("local", cpus=len(os.sched_getaffinity(0)))
    first = ex.submit(holding(tmp_path / "go"))
    pid_of(tmp_path / "go")
    job = ex.submit(len, "abc")
    flip(job.folder / "payload.bin", 0, (job.folder / "payload.bin").stat().st_size)
    (tmp_path / "go").touch()
    first.result(DEADLINE)
    with pytest.raises(JobFailed, match=r"payload\.bin.*altered") as caught:
        job.result(DEADLINE)
    assert caught.value.cause is Cause.INFRASTRUCTURE
    assert "doctor" in str(caught.value)
    assert "End of the log" in str(caught.value)


# --- the Store ----------------------------------------------------------------------------------------------------


def rows() -> dict[str, tuple[Any, ...]]:
    def told(row: JobRow) -> tuple[Any, ...]:
        return (row.state, row.cause, row.reason, row.done, row.failed, row.tasks, row.attempt, row.native_id, row.name)

    return {row.id: told(row) for row in default_store().jobs()}


def drop_store() -> None:
    path = default_store().path
    default_store().close()
    for each in path.parent.glob(path.name + "*"):
        each.unlink()


def test_store_deleted_and_rebuilt(tmp_path: Path) -> None:
    ex = hy.Executor("local")
    good, bad = ex.submit(len, "abc"), ex.submit(int, "x")
    array = ex.array(lambda x: 1 // x, range(4), batch=2)
    late = hy.Executor("local", time="1s").submit(time.sleep, 600)
    killed = ex.submit(lambda: __import__("os").kill(__import__("os").getpid(), 9))
    waiting = hy.Executor("local", after=[bad]).submit(len, "abc")
    rejected = ex.submit(int, "y")
    until(lambda: rejected.state.final)
    rejected.retry(gpus=99)
    cancelled = ex.submit(time.sleep, 600)
    cancelled.cancel()
    for job in (good, bad, array, late, killed, waiting, rejected, cancelled):
        until(lambda job=job: job.state.final)
    before = rows()
    assert [str(before[j.id][1]) for j in (good, bad, late, killed, waiting, rejected, cancelled)] == [
        "None", "USER_ERROR", "TIMEOUT", "INFRASTRUCTURE", "DEPENDENCY_FAILED", "SUBMIT_REJECTED", "CANCELLED",
    ]  # fmt: skip
    drop_store()
    shutil.rmtree(Path(os.environ["JUPYTER_HYBRID_HOME"]) / "local", ignore_errors=True)  # the scheduler forgot, too
    assert launch.reindex() == 8
    assert rows() == before
    assert hy.job(good.id).result(0) == 3
    assert launch.reindex() == 8
    assert rows() == before


def test_store_deleted_while_jobs_run(tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]) -> None:
    ex = hy.Executor("local")
    job, array = ex.submit(holding(tmp_path / "go"), 7), ex.array(holding(tmp_path / "go"), range(3), batch=3)
    pid_of(tmp_path / "go")
    for again in (False, True):
        drop_store()
        if again:
            assert launch.reindex() == 2
        other = processes("import sys, jupyter_hybrid as hy; print(hy.job(sys.argv[1]).result(60))", job.id)
        if not again:
            until(lambda: job.state is not JobState.NEW)
            other.kill()
    (tmp_path / "go").touch()
    assert job.result(DEADLINE) == 7
    assert array.results(DEADLINE) == [0, 1, 2]
    assert other.communicate(timeout=DEADLINE)[0] == "7\n"
    until(lambda: rows()[job.id][0] is rows()[array.id][0] is JobState.COMPLETED)


def test_damaged_store_says_what_to_do() -> None:
    assert hy.submit(len, "abc").result(DEADLINE) == 3
    path = default_store().path
    drop_store()
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(StoreError, match="reindex"):
        hy.jobs()
    path.unlink()
    assert launch.reindex() == 1


# --- full disks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    point = tmp_path / "small disk"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_full_disk_at_submission(small_disk: Path) -> None:
    configure(f"pools:\n  local:\n    kind: local\n    storage: '{small_disk}'\n")
    ex = hy.Executor("local")
    assert ex.submit(len, "abc").result(DEADLINE) == 3
    with pytest.raises(StoreError, match="nothing was submitted"):
        ex.submit(len, os.urandom(4 << 20))
    names = {path.name for path in small_disk.iterdir()}
    assert len(names - {".worker"}) == 1
    assert len(hy.jobs()) == 1
    assert ex.submit(len, "abcd").result(DEADLINE) == 4


def test_full_disk_of_the_store(small_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    configure(f"pools:\n  local:\n    kind: local\n    storage: '{runs}'\n")
    monkeypatch.setenv("JUPYTER_HYBRID_HOME", str(small_disk / "data"))
    ex = hy.Executor("local")
    default_store()
    full = small_disk / "full"
    with contextlib.suppress(OSError), open(full, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

    def fill() -> None:
        for _ in range(100):  # pages that are free in the file may take some rows
            ex.submit(len, "abc")

    with pytest.raises(StoreError):
        fill()
    known = {row.id for row in default_store().jobs()}
    assert {path.name for path in runs.iterdir()} - {".worker"} == known
    full.unlink()
    jobs = [hy.job(each) for each in known] + [ex.submit(len, "abc")]
    assert {job.result(DEADLINE) for job in jobs} == {3}


def test_full_disk_on_the_node(small_disk: Path) -> None:
    configure(f"pools:\n  local:\n    kind: local\n    storage: '{small_disk}'\n")
    array = hy.Executor("local").array(lambda n: bytes([n]) * 500_000, range(8), batch=8)
    array.wait(DEADLINE)
    until(lambda: array.state.final)
    assert (array.state, array.cause) == (JobState.FAILED, Cause.INFRASTRUCTURE)
    assert "disk full" in array.reason or "No space" in array.reason
    states = array.states
    assert states[JobState.COMPLETED] >= 2
    for task in array:
        if task.state is JobState.COMPLETED:
            assert task.result(0) == bytes([task.index]) * 500_000
        else:
            with pytest.raises(JobFailed, match="INFRASTRUCTURE"):
                task.result(0)


# --- killed things ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, "auto", 2])
def test_worker_killed_without_a_word(batch: Any) -> None:
    def task(number: int) -> int:
        import os
        import signal

        print("about to die", flush=True)
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    ex = hy.Executor("local")
    if batch is None:
        job: Any = ex.submit(task, 1)
        with pytest.raises(JobFailed, match="signal 9") as caught:
            job.result(DEADLINE)
        assert caught.value.cause is Cause.INFRASTRUCTURE
        assert "about to die" in str(caught.value)
        assert "retry()" in str(caught.value)
    else:
        job = ex.array(task, range(2), batch=batch)
        job.wait(DEADLINE)
        with pytest.raises(JobFailed):
            job[1].result(DEADLINE)
        assert isinstance(job.results(0, errors="return")[1], JobFailed)
    until(lambda: job.state.final)
    assert (job.state, job.cause) == (JobState.FAILED, Cause.INFRASTRUCTURE)


@pytest.mark.parametrize("status", [0, 3])
def test_worker_that_just_exits(status: int) -> None:
    job = hy.Executor("local").submit(lambda: __import__("os")._exit(status))
    with pytest.raises(JobFailed, match=f"without a word, exit status {status}") as caught:
        job.result(DEADLINE)
    assert (job.state, caught.value.cause) == (JobState.FAILED, Cause.INFRASTRUCTURE)


def test_out_of_memory_and_walltime() -> None:
    def hungry() -> None:
        import time

        data = bytearray(500 << 20)
        data[::4096] = bytes(len(data) // 4096)
        time.sleep(600)

    memory = hy.Executor("local", memory="200M").submit(hungry)
    walltime = hy.Executor("local", time="2s").submit(time.sleep, 600)
    with pytest.raises(JobFailed, match="memory=") as caught:
        memory.result(DEADLINE)
    assert (memory.state, caught.value.cause) == (JobState.FAILED, Cause.OUT_OF_MEMORY)
    with pytest.raises(JobFailed, match="time=") as caught:
        walltime.result(DEADLINE)
    assert (walltime.state, caught.value.cause) == (JobState.TIMEOUT, Cause.TIMEOUT)


SUBMIT = """
import os, signal, sys, jupyter_hybrid as hy
from jupyter_hybrid.storage import RunFolder
from jupyter_hybrid.store import Store

def mark(path, word):
    with open(path, "ab", buffering=0) as file:
        file.write(word.encode())
    assert os.path.exists(path + ".good"), "not yet"

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)

marks, where = sys.argv[1:3]
job = hy.Executor("local").submit(mark, marks, "a") if "attempt" in where else None
if job is not None:
    job.exception(60)
    print(job.id, flush=True)
    while not job.state.final: pass
owner, _, name = where.partition(".")
setattr({"Store": Store, "RunFolder": RunFolder}[owner], name.removesuffix("-attempt"), die)
if job is not None:
    open(marks + ".good", "w").close()
    job.retry()
hy.Executor("local").submit(mark, marks, "b")
"""


def test_submitter_killed_before_the_store_has_the_job(
    tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    marks = tmp_path / "marks"
    assert processes(SUBMIT, str(marks), "Store.add_job").wait(DEADLINE) == -signal.SIGKILL
    runs = Path(os.environ["JUPYTER_HYBRID_HOME"]) / "runs"
    assert len(list(runs.glob("*/spec.json"))) == 1
    assert launch.reindex() == 0  # nobody was promised that it runs, so it does not begin to some day
    drop_store()
    assert launch.reindex() == 0
    assert hy.jobs() == []
    assert hy.submit(len, "abc").result(DEADLINE) == 3  # so much time the tracker had
    assert not marks.exists()


def test_submitter_killed_when_the_store_has_the_job(
    tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    marks = tmp_path / "marks"
    Path(f"{marks}.good").touch()
    assert processes(SUBMIT, str(marks), "RunFolder.adopt").wait(DEADLINE) == -signal.SIGKILL
    (row,) = default_store().jobs()
    assert hy.job(row.id).result(DEADLINE) is None
    assert marks.read_text() == "b"
    until(lambda: hy.job(row.id).state is JobState.COMPLETED)
    drop_store()
    assert launch.reindex() == 1


@pytest.mark.parametrize("where", ["Store.add_attempt", "RunFolder.adopt-attempt"])
def test_killed_while_retrying(tmp_path: Path, processes: Callable[..., subprocess.Popen[str]], where: str) -> None:
    marks = tmp_path / "marks"
    killed = processes(SUBMIT, str(marks), where)
    out, _ = killed.communicate(timeout=DEADLINE)
    assert killed.returncode == -signal.SIGKILL
    job = hy.job(out.strip())
    if where == "Store.add_attempt":
        drop_store()
        assert launch.reindex() == 1
        assert hy.submit(len, "abc").result(DEADLINE) == 3  # so much time the tracker had
        assert (job.state, job.cause) == (JobState.FAILED, Cause.USER_ERROR)
        with pytest.raises(AssertionError, match="not yet"):
            job.result(DEADLINE)
        assert marks.read_text() == "a"
        job.retry()
    assert job.result(DEADLINE) is None
    assert marks.read_text() == "aa"
    until(lambda: job.state is JobState.COMPLETED)
    assert len(job.run.folder.attempts()) == 2


def test_store_deleted_while_jobs_wait_for_room(
    tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]
) -> None:
    configure("pools:\n  local:\n    kind: local\n    limits: {max_jobs: 1, poll_min: 50ms}\n")
    code = f"""
import os, time, jupyter_hybrid as hy
def hold():
    while not os.path.exists({str(tmp_path / "go")!r}): time.sleep(0.01)
    return 1
ex = hy.Executor("local")
first, second = ex.submit(hold), ex.submit(hold)
while not (str(first.state) == "RUNNING" and "limit" in second.reason): time.sleep(0.01)
print(first.id, second.id, flush=True)
time.sleep(600)
"""
    submitter = processes(code)
    assert submitter.stdout is not None
    ids = submitter.stdout.readline().split()
    submitter.kill()
    submitter.wait()
    drop_store()
    assert launch.reindex() == 2
    jobs = [hy.job(each) for each in ids]
    until(lambda: jobs[0].state is JobState.RUNNING and "limit" in jobs[1].reason)
    (tmp_path / "go").touch()
    assert [job.result(DEADLINE) for job in jobs] == [1, 1]


def test_supervisor_killed(tmp_path: Path) -> None:
    ex = hy.Executor("local")
    job = ex.submit(holding(tmp_path / "go"), 5)
    pid_of(tmp_path / "go")
    lock = next(iter((Path(os.environ["JUPYTER_HYBRID_HOME"]) / "local").rglob("supervisor.lock")))
    os.kill(int(lock.read_text()), signal.SIGKILL)
    other = ex.submit(len, "abc")
    assert other.result(DEADLINE) == 3
    (tmp_path / "go").touch()
    assert job.result(DEADLINE) == 5


def test_shim_killed(tmp_path: Path) -> None:
    job = hy.Executor("local").submit(holding(tmp_path / "go"))
    worker = pid_of(tmp_path / "go")
    with open(f"/proc/{worker}/stat") as file:
        shim = int(file.read().rpartition(")")[2].split()[1])
    os.kill(shim, signal.SIGKILL)
    with pytest.raises(JobFailed, match="killed from outside"):
        job.result(DEADLINE)
    assert (job.state, job.cause) == (JobState.FAILED, Cause.INFRASTRUCTURE)
    until(lambda: not Path(f"/proc/{worker}").exists())


def test_run_folder_removed(tmp_path: Path) -> None:
    ex = hy.Executor("local", cpus=len(os.sched_getaffinity(0)))
    running, waiting = ex.submit(holding(tmp_path / "go")), ex.submit(len, "abc")
    pid_of(tmp_path / "go")
    until(lambda: waiting.native_id)
    shutil.rmtree(waiting.folder)
    (tmp_path / "go").touch()
    assert running.result(DEADLINE) is None
    with pytest.raises(JobFailed):
        waiting.result(DEADLINE)
    assert waiting.state is JobState.FAILED
    assert ex.submit(len, "abcd").result(DEADLINE) == 4


def test_unknown_pool() -> None:
    with pytest.raises(ConfigError, match="local"):
        hy.Executor("nowhere")


# --- several processes on one Store -------------------------------------------------------------------------------

WAIT = """
import sys, jupyter_hybrid as hy
from jupyter_hybrid import submitter, tracker
tracker.LEASE, tracker.RENEW = 1.0, 0.2
jobs = [hy.job(id) for id in sys.argv[1:]]
print("ready", flush=True)
print([job.result(80) for job in jobs], flush=True)
"""

HOLD = """
import sys, time, jupyter_hybrid as hy
from jupyter_hybrid import submitter, tracker
tracker.LEASE, tracker.RENEW = 1.0, 0.2
hy.jobs()
pool_tracker = next(iter(tracker.tracker._pools.values()))
while not pool_tracker.holds: time.sleep(0.01)
print("holds", flush=True)
time.sleep(80)
"""


def test_two_processes_wait_for_the_same_jobs(tmp_path: Path, processes: Callable[..., subprocess.Popen[str]]) -> None:
    ex = hy.Executor("local")
    jobs = [ex.submit(holding(tmp_path / "go"), i) for i in range(3)]
    others = [processes(WAIT, *[job.id for job in jobs]) for _ in range(2)]
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    assert [job.result(DEADLINE) for job in jobs] == [0, 1, 2]
    for other in others:
        assert other.communicate(timeout=DEADLINE)[0] == "[0, 1, 2]\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lease_is_taken_over(
    tmp_path: Path, processes: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    submit = f"""
import sys, cloudpickle, jupyter_hybrid as hy
def task(value):
    import os, time
    while not os.path.exists({str(tmp_path / "go")!r}): time.sleep(0.01)
    return value
print(hy.Executor("local").submit(task, 5).id)
"""
    job, _ = processes(submit).communicate(timeout=DEADLINE)
    holder = processes(HOLD)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holds\n"
    watcher = processes(WAIT, job.strip())
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "ready\n"
    owner = default_store().pool("local").owner
    holder.send_signal(number)
    (tmp_path / "go").touch()
    assert watcher.communicate(timeout=DEADLINE)[0] == "[5]\n"
    final = processes(WAIT.replace("job.result(80)", "(job.result(80), wait(job))").replace("print(\"ready", """
import time
def wait(job):
    while not job.state.final: time.sleep(0.01)
    return str(job.state)
print(\"ready"""), job.strip())  # fmt: skip
    assert final.communicate(timeout=DEADLINE)[0] == "ready\n[(5, 'COMPLETED')]\n"
    assert default_store().pool("local").owner != owner
    if number is signal.SIGSTOP:
        holder.send_signal(signal.SIGCONT)  # it finds that it holds nothing any more
        until(lambda: default_store().jobs()[0].state is JobState.COMPLETED)


@pytest.mark.parametrize("jump", [86400.0, -86400.0])
def test_clock_jumps(tmp_path: Path, processes: Callable[..., subprocess.Popen[str]], jump: float) -> None:
    code = f"""
import sys, time, jupyter_hybrid as hy
from jupyter_hybrid import submitter, tracker
tracker.LEASE, tracker.RENEW = 1.0, 0.2
real, jump = time.time, 0.0
time.time = lambda: real() + jump
def task(value):
    import os, time
    open({str(tmp_path / "there")!r}, "w").close()
    while not os.path.exists({str(tmp_path / "go")!r}): time.sleep(0.01)
    return value
ex = hy.Executor("local", time="1h")
job, array = ex.submit(task, 1), ex.array(task, [2, 3])
while str(job.state) != "RUNNING": time.sleep(0.01)
jump = {jump}
states = set()
end = time.monotonic() + 2.5
while time.monotonic() < end:
    states |= {{str(job.state), str(array.state)}}
    time.sleep(0.01)
print(sorted(states - {{"RUNNING", "PENDING", "NEW"}}))
open({str(tmp_path / "go")!r}, "w").close()
print(job.result(60), array.results(60), ex.submit(len, "abc").result(60))
"""
    assert processes(code).communicate(timeout=DEADLINE)[0] == "[]\n1 [2, 3] 3\n"


# --- odd names ----------------------------------------------------------------------------------------------------

NAMES = [
    'it\'s "quoted"',
    "two\nlines",
    "$(touch {0})`touch {0}`; touch {0} #",
    "Größe 数 🎉",
    "x" * 10_000,
    "\udcff",
    "-n",
]


@pytest.mark.parametrize("name", NAMES)
def test_job_names(tmp_path: Path, name: str) -> None:
    name = name.format(tmp_path / "pwned")
    job = hy.Executor("local", name=name).submit(len, "abc")
    assert job.result(DEADLINE) == 3
    assert not (tmp_path / "pwned").exists()
    assert job.spec.name == name.encode(errors="replace").decode()
    assert repr(hy.jobs())
    assert name.encode(errors="replace").decode() == hy.job(job.id).name


def test_environment_values_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'it\'s a "folder" $(touch pwned)'
    folder.mkdir()
    monkeypatch.chdir(folder)
    values = {"PLAIN": "a b", "QUOTES": 'it\'s "so" $(touch pwned) `x` \\', "LINES": "one\ntwo\n", "EMPTY": ""}
    text = "".join(f"      {name}: {_yaml(value)}\n" for name, value in values.items())
    configure(
        f"pools:\n  local:\n    kind: local\n    storage: {_yaml(str(folder / 'run s'))}\n    environment:\n{text}"
    )

    def task() -> tuple[str, list[str]]:
        import os

        return os.getcwd(), [os.environ[name] for name in ("PLAIN", "QUOTES", "LINES", "EMPTY")]

    assert hy.Executor("local").submit(task).result(DEADLINE) == (str(folder), list(values.values()))
    assert hy.Executor("local").array(lambda x: x, [1, 2]).results(DEADLINE) == [1, 2]
    assert not list(tmp_path.rglob("pwned"))


def _yaml(text: str) -> str:
    import json

    return json.dumps(text)


def test_data_folder_with_an_odd_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    odd = home.parent / 'it\'s "data" $(x)'
    odd.symlink_to(home)  # so that what runs there ends with the test
    home.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("JUPYTER_HYBRID_HOME", str(odd))
    assert hy.Executor("local").submit(len, "abc").result(DEADLINE) == 3


# --- a scheduler that says what it likes --------------------------------------------------------------------------


class Scripted:
    """A scheduler that says what the test makes it say."""

    kind = "scripted"
    index_variable = "SCRIPTED_INDEX"
    idempotent = False

    def __init__(self) -> None:
        self.said: dict[str, list[Observation]] = {}
        self.submitted: list[Submission] = []
        self.cancelled: list[str] = []
        self.queries = 0
        self.down: Exception | None = None
        self.refuses: Callable[[Submission], str] = lambda submission: ""

    def _answer(self) -> None:
        if self.down is not None:
            raise self.down

    def check(self, resources: hy.Resources) -> Sequence[str]:
        return []

    def submit(self, submission: Submission) -> str:
        self._answer()
        words = self.refuses(submission)
        if words:
            raise SubmitRejected(words)
        self.submitted.append(submission)
        return str(len(self.submitted))

    def find(self, tags: Iterable[str]) -> Mapping[str, str]:
        self._answer()
        known = {each.tag: str(number) for number, each in enumerate(self.submitted, 1)}
        return {tag: known[tag] for tag in tags if tag in known}

    def query(self, native_ids: Sequence[str]) -> Sequence[Observation]:
        self.queries += 1
        self._answer()
        return [each for native_id in native_ids for each in self.said.get(native_id, [])]

    def cancel(self, native_id: str, indices: Sequence[int] | None = None) -> None:
        self._answer()
        self.cancelled.append(native_id)

    def hold(self, native_id: str) -> None: ...

    def release(self, native_id: str) -> None: ...

    def snapshot(self) -> PoolSnapshot:
        self._answer()
        return PoolSnapshot(free_cpus=4, total_cpus=4, nodes=1)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    backend = Scripted()
    monkeypatch.setitem(backends._OWN, "slurm", lambda config: backend)
    monkeypatch.setattr(tracker, "ABSENT", 1.0)
    configure("pools:\n  odd:\n    kind: slurm\n    limits: {poll_min: 50ms, poll_max: 100ms, max_array: 2}\n")
    return backend


def say(folder: Path, batch: int, text: str) -> None:
    with open(folder / "status" / f"{batch}.jsonl", "a") as file:
        file.write(text + "\n")


START = '{"e":"start","t":1,"host":"n","pid":1,"python":"3","native":"1"}'
BEAT = '{"e":"beat","t":1,"rss":1,"task":null}'


def asked(backend: Scripted, times: int) -> None:
    """Wait until the scheduler has been asked so many times more."""
    before = backend.queries
    until(lambda: backend.queries >= before + times)


def test_absent_is_unknown_until_nothing_is_heard(scripted: Scripted) -> None:
    job = hy.Executor("odd").submit(len, "abc")
    until(lambda: job.state is JobState.UNKNOWN)
    say(job.folder, 0, START)
    end = time.monotonic() + 2.5 * tracker.ABSENT
    while time.monotonic() < end:
        say(job.folder, 0, BEAT)
        time.sleep(0.05)
        assert job.state is JobState.UNKNOWN
        assert not job.done()
    with pytest.raises(JobFailed, match="without a word"):
        job.result(DEADLINE)
    assert (job.state, job.cause) == (JobState.FAILED, Cause.INFRASTRUCTURE)


def test_unreachable_changes_nothing_and_heals(scripted: Scripted) -> None:
    job = hy.Executor("odd").submit(len, "abc")
    until(lambda: job.native_id)
    scripted.said["1"] = [Observation("1", None, JobState.PENDING, reason="Priority")]
    until(lambda: job.reason == "Priority")
    scripted.down = PoolUnreachable("the controller is away")
    until(lambda: default_store().pool("odd").unreachable_since is not None)
    since = default_store().pool("odd").unreachable_since
    asked(scripted, 3)
    end = time.monotonic() + 2 * tracker.ABSENT
    until(lambda: time.monotonic() > end)
    assert (job.state, job.reason) == (JobState.PENDING, "Priority")
    row = default_store().pool("odd")
    assert (row.unreachable_since, row.error) == (since, "the controller is away")
    assert "unreachable since" in str(next(row for row in hy.pools() if row["name"] == "odd")["state"])
    scripted.down = None
    until(lambda: default_store().pool("odd").unreachable_since is None)
    assert job.state is JobState.PENDING


def test_results_are_seen_while_the_scheduler_thinks(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = threading.Event(), []

    def query(native_ids: Sequence[str]) -> Sequence[Observation]:
        asked.append(native_ids)
        answers.wait(DEADLINE)
        return []

    monkeypatch.setattr(scripted, "query", query)
    job = hy.Executor("odd").submit(len, "abc")
    until(lambda: asked)
    say(job.folder, 0, START)
    until(lambda: job.state is JobState.RUNNING)
    say(job.folder, 0, '{"e":"done","task":0,"o":0,"l":0,"c":0,"s":0.1,"t":2}')
    say(job.folder, 0, '{"e":"end","t":2,"why":"done","cpu":0.1,"rss":1}')
    until(lambda: job.state is JobState.COMPLETED)
    assert job.done()
    assert len(asked) == 1
    answers.set()


def test_absence_does_not_grow_while_the_scheduler_is_silent(scripted: Scripted) -> None:
    job = hy.Executor("odd").submit(len, "abc")
    until(lambda: job.state is JobState.UNKNOWN)
    scripted.down = PoolUnreachable("away")
    end = time.monotonic() + 2.5 * tracker.ABSENT
    while time.monotonic() < end:
        assert job.state is JobState.UNKNOWN
        time.sleep(0.02)
    scripted.said["1"] = [Observation("1", None, JobState.RUNNING)]
    scripted.down = None
    until(lambda: job.state is JobState.RUNNING)


def test_a_strange_state_is_no_end(scripted: Scripted) -> None:
    scripted.said["1"] = [Observation("1", None, JobState.UNKNOWN, reason="ODDLY_QUEUED")]
    job = hy.Executor("odd").submit(len, "abc")
    until(lambda: job.state is JobState.UNKNOWN)
    end = time.monotonic() + 2.5 * tracker.ABSENT
    until(lambda: time.monotonic() > end)
    assert (job.state, job.reason) == (JobState.UNKNOWN, "ODDLY_QUEUED")


def test_completed_by_the_scheduler_alone_is_not_completed(scripted: Scripted) -> None:
    scripted.said["1"] = [Observation("1", None, JobState.COMPLETED, exit_code=0)]
    job = hy.Executor("odd").submit(len, "abc")
    with pytest.raises(JobFailed, match="before its worker began"):
        job.result(DEADLINE)
    assert job.state is JobState.FAILED


def test_unreachable_at_submission(scripted: Scripted) -> None:
    scripted.down = PoolUnreachable("the controller is away")
    job = hy.Executor("odd").submit(len, "abc")
    until(lambda: job.reason == "the controller is away")
    assert job.state is JobState.NEW
    scripted.down = None
    until(lambda: job.native_id == "1")
    assert len(scripted.submitted) == 1


def test_refused_in_the_middle(scripted: Scripted) -> None:
    scripted.refuses = lambda submission: "no third one" if submission.first == 4 else ""
    array = hy.Executor("odd").array(abs, range(8), batch=1)
    until(lambda: array.state.final)
    assert (array.state, array.cause, array.reason) == (JobState.FAILED, Cause.SUBMIT_REJECTED, "no third one")
    assert scripted.cancelled == ["1", "2"]
    wanted = ["submitted", "submitted", "rejected", "cancelled"]
    until(lambda: [row.state for row in default_store().submissions(array.id)] == wanted)


def test_killed_after_it_heard_the_refusal(scripted: Scripted) -> None:
    scripted.down = PoolUnreachable("away")
    job = hy.Executor("odd").submit(len, "abc")
    job.run.folder.record_submission(f"{job.id}.1.0", state="rejected", reason="not here")
    scripted.down = None
    with pytest.raises(JobFailed, match="not here"):
        job.result(DEADLINE)
    assert job.cause is Cause.SUBMIT_REJECTED
    assert not scripted.submitted


def test_killed_while_submitting(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitter, "UNSETTLED", 0.5)
    scripted.down = PoolUnreachable("away")
    ex = hy.Executor("odd")
    taken, lost = ex.submit(len, "a"), ex.submit(len, "b")
    until(lambda: default_store().pool("odd").unreachable_since is not None)  # it is not tried for a second
    for job in (taken, lost):  # as a process leaves it that is killed after the intent to submit
        with job.run.folder.submitting() as descriptor:
            assert descriptor is not None
            os.pwrite(descriptor, f"{job.id}.1.0\n".encode(), 0)
    scripted.submitted.append(Submission(f"{taken.id}.1.0", "", Path(), Path(), 0, 1, False, taken.spec.resources))
    scripted.down = None
    until(lambda: taken.native_id and lost.native_id)
    assert (taken.native_id, lost.native_id) == ("1", "2")
    assert [each.tag for each in scripted.submitted] == [f"{taken.id}.1.0", f"{lost.id}.1.0"]


def test_cancel_of_what_could_not_be_submitted(scripted: Scripted) -> None:
    scripted.down = PoolUnreachable("away")
    job = hy.Executor("odd").submit(len, "abc")
    until(lambda: default_store().pool("odd").unreachable_since is not None)
    job.cancel()
    scripted.down = None
    until(lambda: job.state is JobState.CANCELLED)
    assert not scripted.submitted


def test_cancel_of_a_job_whose_pool_is_not_configured_any_more(scripted: Scripted) -> None:
    job = hy.Executor("odd").submit(len, "abc")
    until(lambda: job.native_id)
    text = (Path(os.environ["JUPYTER_CONFIG_DIR"]) / "hybrid.yaml").read_text()
    configure("pools:\n  other: {kind: local}\n")
    for ask in (job.cancel, lambda: hy.job(job.id)):
        with pytest.raises(ConfigError, match="'odd' is not in the configuration any more: put it back, or cancel 1"):
            ask()
    assert job.reason != "being cancelled"
    assert not job.run.cancelled
    configure(text)
    assert job.cancel()
    until(lambda: scripted.cancelled == ["1"])


def test_one_broken_job_does_not_hold_up_the_others(scripted: Scripted) -> None:
    scripted.down = PoolUnreachable("away")
    ex = hy.Executor("odd")
    removed, torn, good = ex.submit(len, "a"), ex.submit(len, "b"), ex.submit(len, "c")
    shutil.rmtree(removed.folder)
    (torn.folder / "attempt-1.json").write_text('{"number":')
    say(good.folder, 0, '{"e":"don')
    say(good.folder, 0, START)
    scripted.down = None
    until(lambda: good.native_id)
    until(lambda: removed.state is JobState.FAILED)
    assert removed.cause is Cause.RESULT_LOST


def test_a_job_that_this_kind_of_scheduler_cannot_take_holds_up_no_other(tmp_path: Path, monkeypatch: Any) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, said in (("sbatch", "7"), ("squeue", ""), ("sinfo", ""), ("scontrol", "")):
        (commands / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/calls\necho {said}\n")
        (commands / name).chmod(0o755)
    config = tmp_path / "hybrid.yaml"
    config.write_text("pools:\n  hpc: {kind: slurm}\n")
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(config))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    bad = hy.Executor("hpc", extra={"output": "elsewhere"}).submit(abs, -1)
    good = hy.Executor("hpc").submit(abs, -1)
    until(lambda: good.native_id == "7" and bad.state.final)
    assert bad.cause is hy.Cause.SUBMIT_REJECTED
    assert "'output' is set by jupyter_hybrid itself" in bad.reason


def test_arguments_of_all_tasks_together_have_a_limit() -> None:
    with pytest.raises(hy.HybridError, match=r"first 2 of 3 tasks have .* the limit is 1M.*limit="):
        hy.Executor("local", limit="1M").array(len, [b"x" * 600_000] * 3)
    assert hy.jobs() == []
