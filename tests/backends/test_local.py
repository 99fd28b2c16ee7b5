"""The local pool with real processes; every script is plain sh."""

import contextlib
import fcntl
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

from jupyter_hybrid import process
from jupyter_hybrid.backends import proctree
from jupyter_hybrid.backends.base import Backend, Submission
from jupyter_hybrid.backends.local import FAILED_STARTS, LocalBackend
from jupyter_hybrid.config import PoolConfig
from jupyter_hybrid.errors import PoolUnreachable, SubmitRejected
from jupyter_hybrid.spec import Cause, JobState, Resources

DEADLINE = 60.0
MEGABYTE = 1 << 20


def until(condition, what="condition"):
    """Return the first true value of a condition."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come true in {DEADLINE:g} s")


class Lab:
    """A spool folder with pools, scripts and what they wrote."""

    def __init__(self, folder):
        self.folder = folder
        self.spool = folder / "spool"
        self.notes = folder / "notes"
        self.backend = self.pool()
        self.tags = 0

    def pool(self, name="local", cpus=2, memory=1 << 30, gpus=0):
        return LocalBackend(self.spool, name, cpus, memory, gpus)

    def submission(self, text, *, count=None, after=(), tag=None, first=0, **resources):
        self.tags += 1
        script = self.folder / f"script{self.tags}"
        script.write_text(f"#!/bin/sh\n{text}\n".replace("NOTES", str(self.notes)).replace("DIR", str(self.folder)))
        script.chmod(0o755)
        return Submission(
            tag=tag or f"job{self.tags}.0.0",
            name="a 'name' with $(quotes)",
            script=script,
            logs=self.folder / "logs",
            first=first,
            count=count or 1,
            array=count is not None,
            resources=Resources.parse(**resources),
            after=tuple(after),
        )

    def submit(self, text, backend=None, **more):
        return (backend or self.backend).submit(self.submission(text, **more))

    def states(self, native_id):
        return [one.state for one in self.backend.query([native_id])]

    def end(self, native_id):
        """Wait for the end of a submission; return its observations."""
        until(lambda: all(state.final for state in self.states(native_id)), f"end of {native_id}")
        return self.backend.query([native_id])

    def runs(self, native_id):
        until(lambda: JobState.RUNNING in self.states(native_id), f"start of {native_id}")

    def noted(self):
        return self.notes.read_text().split() if self.notes.exists() else []

    def supervisor(self):
        """Return the process id of the supervisor, or None."""
        with contextlib.suppress(FileNotFoundError), open(self.spool / "supervisor.lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                words = lock.read().split()
                return int(words[0]) if len(words) == 1 else None
        return None

    def kill_supervisor(self):
        os.kill(until(self.supervisor, "supervisor"), signal.SIGKILL)
        until(lambda: not self.locked(), "its end")

    def locked(self):
        with contextlib.suppress(FileNotFoundError), open(self.spool / "supervisor.lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def sql(self, query, *values):
        with contextlib.closing(sqlite3.connect(self.spool / "spool.sqlite", timeout=30)) as database, database:
            return database.execute(query, values).fetchall()

    def processes(self):
        """Return all processes that carry the mark of a job of this spool."""
        marks = ((one.pid, proctree.mark_of(one.pid)) for one in proctree.processes())
        return [pid for pid, mark in marks if mark and mark.startswith(f"{self.spool}/")]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_SUPERVISOR_IDLE", "0.3")
    lab = Lab(tmp_path)
    yield lab
    if not (lab.spool / "spool.sqlite").exists():
        return
    for (native_id,) in lab.sql("SELECT native_id FROM submission"):
        lab.backend.release(str(native_id))
        lab.backend.cancel(str(native_id))
    try:
        until(lambda: not lab.processes(), "end of all processes")
    finally:
        for pid in lab.processes():
            os.kill(pid, signal.SIGKILL)
    until(lambda: not lab.locked(), "end of the supervisor")
    for log in lab.spool.glob("supervisor.log"):
        assert "Traceback" not in log.read_text()


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


BLOCK = "while [ ! -e DIR/go ]; do sleep 0.02; done"


# Plain running


def test_a_job_runs(lab):
    assert isinstance(lab.backend, Backend)
    os.environ["SOME_VALUE"] = "as submitted"
    native_id = lab.submit(
        'echo out; echo err >&2; echo "$SOME_VALUE,$HYBRID_LOCAL_JOB,${HYBRID_ARRAY_INDEX-none}"', first=7
    )
    del os.environ["SOME_VALUE"]
    (seen,) = lab.end(native_id)
    assert (seen.state, seen.cause, seen.exit_code, seen.index) == (JobState.COMPLETED, None, 0, None)
    assert seen.started <= seen.ended
    assert seen.cpu_seconds is not None
    assert (lab.folder / "logs/7.out").read_text() == f"out\nerr\nas submitted,{native_id},none\n"


def test_an_array_knows_its_indices_and_fails_by_element(lab):
    native_id = lab.submit("echo $HYBRID_ARRAY_INDEX; exit $HYBRID_ARRAY_INDEX", count=3, first=10)
    seen = lab.end(native_id)
    assert [one.index for one in seen] == [0, 1, 2]
    assert [one.exit_code for one in seen] == [0, 1, 2]
    assert [one.state for one in seen] == [JobState.COMPLETED, JobState.FAILED, JobState.FAILED]
    assert [one.cause for one in seen] == [None, None, None]
    assert [(lab.folder / f"logs/{10 + index}.out").read_text() for index in range(3)] == ["0\n", "1\n", "2\n"]


def test_a_signal_is_128_and_its_number(lab):
    (seen,) = lab.end(lab.submit("kill -SEGV $$"))
    assert (seen.state, seen.exit_code) == (JobState.FAILED, 139)


def test_slots_are_never_exceeded(lab):
    script = "echo + >>NOTES; sleep 0.02; echo - >>NOTES"
    seen = lab.end(lab.submit(script, count=50))
    assert all(one.state is JobState.COMPLETED for one in seen)
    level, levels = 0, []
    for word in lab.noted():
        level += 1 if word == "+" else -1
        levels.append(level)
    assert len(levels) == 100
    assert max(levels) <= 2


def test_memory_slots_are_kept(lab):
    first = lab.submit(BLOCK, memory="700M")
    second = lab.submit("exit 0", memory="700M")
    lab.runs(first)
    third = lab.submit("exit 0", memory="100M")
    lab.end(third)  # it passes the second, which does not fit
    assert lab.states(second) == [JobState.PENDING]
    (lab.folder / "go").touch()
    assert lab.end(second)[0].state is JobState.COMPLETED


def test_priority_then_order(lab):
    blocker = lab.submit(BLOCK, cpus=2)
    lab.runs(blocker)
    ids = [
        lab.submit(f"echo {name} >>NOTES", cpus=2, priority=priority)
        for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5))
    ]
    (lab.folder / "go").touch()
    for native_id in ids:
        lab.end(native_id)
    assert lab.noted() == ["high", "first", "second", "low"]


def test_pools_have_slots_of_their_own(lab):
    blocker = lab.submit(BLOCK, cpus=2)
    lab.runs(blocker)
    other = lab.submit("exit 0", lab.pool("other", cpus=1))
    lab.end(other)
    assert lab.states(blocker) == [JobState.RUNNING]
    snapshot = lab.backend.snapshot()
    assert (snapshot.total_cpus, snapshot.free_cpus, snapshot.running, snapshot.queued) == (2, 0, 1, 0)
    assert lab.pool("other", cpus=1).snapshot().free_cpus == 1


def test_each_job_sees_gpus_of_its_own(lab):
    pool = lab.pool("gpu", cpus=4, gpus=2)
    native_id = lab.submit(f"echo $CUDA_VISIBLE_DEVICES >>NOTES; {BLOCK}", pool, count=3, gpus=1)
    until(lambda: len(lab.noted()) == 2, "two jobs")
    assert sorted(lab.noted()) == ["0", "1"]
    assert (pool.snapshot().free_gpus, pool.snapshot().queued) == (0, 1)
    (lab.folder / "go").touch()
    assert all(one.state is JobState.COMPLETED for one in lab.end(native_id))


def test_hold_and_release(lab):
    lab.runs(lab.submit(BLOCK, cpus=2))
    native_id = lab.submit("exit 0")
    lab.backend.hold(native_id)
    (lab.folder / "go").touch()
    lab.end(lab.submit("exit 0"))
    (seen,) = lab.backend.query([native_id])
    assert (seen.state, seen.reason) == (JobState.PENDING, "held by its user")
    until(lambda: not lab.locked(), "end of the supervisor, which a held job does not keep")
    lab.backend.release(native_id)
    assert lab.end(native_id)[0].state is JobState.COMPLETED


def test_a_large_array_is_submitted_at_once(lab):
    before = time.perf_counter()
    lab.runs(lab.submit(BLOCK, cpus=2))
    native_id = lab.submit("exit 0", count=10_000)
    assert time.perf_counter() - before < DEADLINE
    assert Counter(lab.states(native_id)) == {JobState.PENDING: 10_000}
    lab.backend.cancel(native_id)
    assert Counter(lab.states(native_id)) == {JobState.CANCELLED: 10_000}


# Ends before their time


def test_memory_limit(lab):
    # tail keeps all it reads, and cannot write it to a reader that does not read
    native_id = lab.submit("head -c 400000000 /dev/zero | tail -c 300000000 | sleep 300", memory="64M")
    (seen,) = lab.end(native_id)
    assert (seen.state, seen.cause) == (JobState.FAILED, Cause.OUT_OF_MEMORY)
    assert seen.reason.endswith(" of 64M")
    assert seen.peak_memory > 64 * MEGABYTE
    until(lambda: not lab.processes(), "end of all its processes")


def test_walltime_of_a_script_that_ignores_the_signal(lab):
    script = "trap '' TERM; (setsid sleep 300) & setsid sleep 300 & echo $! >>NOTES; sleep 300; sleep 300"
    native_id = lab.submit(script, time="2s")
    pid = int(until(lab.noted)[0])
    (seen,) = lab.end(native_id)
    assert (seen.state, seen.cause) == (JobState.TIMEOUT, Cause.TIMEOUT)
    assert seen.reason == "walltime of 2 s used up"
    until(lambda: gone(pid) and not lab.processes(), "end of children with sessions of their own")


def test_walltime_signal_lets_a_script_clean_up(lab):
    native_id = lab.submit("trap 'echo cleaned >>NOTES; exit 0' TERM; while :; do sleep 0.02; done", time="1s")
    (seen,) = lab.end(native_id)
    assert (seen.state, seen.exit_code) == (JobState.TIMEOUT, 0)
    assert lab.noted() == ["cleaned"]


def test_warning_before_walltime_only_for_those_who_listen(lab):
    listens = lab.submit("trap 'exit 9' USR2; while :; do sleep 0.02; done", time="10s")
    deaf = lab.submit("sleep 300", time="1s")
    assert lab.end(deaf)[0].state is JobState.TIMEOUT
    (seen,) = lab.end(listens)
    assert (seen.state, seen.exit_code) == (JobState.FAILED, 9)


def test_cancel_waiting_and_running(lab):
    native_id = lab.submit("sleep 300", count=4)
    until(lambda: lab.states(native_id).count(JobState.RUNNING) == 2, "two running")
    lab.backend.cancel(native_id, [3])
    assert lab.states(native_id)[2:] == [JobState.PENDING, JobState.CANCELLED]
    lab.backend.cancel(native_id)
    seen = lab.end(native_id)
    assert {(one.state, one.cause) for one in seen} == {(JobState.CANCELLED, Cause.CANCELLED)}
    assert [one.started is not None for one in seen] == [True, True, False, False]
    lab.backend.cancel(native_id)
    lab.backend.cancel("999")


def test_background_processes_end_with_their_job(lab):
    (seen,) = lab.end(lab.submit("setsid sleep 300 & env -i sleep 300 & echo $! >>NOTES"))
    assert seen.state is JobState.COMPLETED
    until(lambda: not lab.processes() and gone(int(lab.noted()[0])), "end of what it left")


def test_dependencies(lab):
    first = lab.submit(BLOCK, count=2)
    after = lab.submit("exit 4", after=[first])
    last = lab.submit("exit 0", after=[after])
    very_last = lab.submit("exit 0", after=[first, last])
    (seen,) = lab.backend.query([after])
    assert (seen.state, seen.reason) == (JobState.PENDING, f"waits for job {first}")
    (lab.folder / "go").touch()
    assert lab.end(after)[0].exit_code == 4
    for native_id, cause in ((last, after), (very_last, last)):
        (seen,) = lab.end(native_id)
        assert (seen.state, seen.cause) == (JobState.CANCELLED, Cause.DEPENDENCY_FAILED)
        assert cause in seen.reason
    done = lab.submit("exit 0")
    lab.end(done)
    assert lab.end(lab.submit("exit 0", after=[done]))[0].state is JobState.COMPLETED


# Refusals


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"cpus": 3}, "3 cpus, it has 2"),
        ({"tasks_per_node": 3}, "3 cpus"),
        ({"memory": "2G"}, "memory 2G, it has 1G"),
        ({"gpus": 1}, "1 gpu, it has none"),
        ({"nodes": 2}, "it is one machine"),
    ],
)
def test_what_never_fits_is_refused(lab, resources, words):
    with pytest.raises(SubmitRejected, match=words):
        lab.submit("exit 0", **resources)


def test_unknown_dependency_is_refused(lab):
    with pytest.raises(SubmitRejected, match="does not know job 5"):
        lab.submit("exit 0", after=["5"])
    assert lab.backend.find(["job1.0.0"]) == {}


def test_a_pool_made_smaller_fails_what_no_longer_fits(lab):
    lab.runs(lab.submit(BLOCK, cpus=2))
    native_id = lab.submit("exit 0", cpus=2)
    lab.submit("exit 0", lab.pool(cpus=1))
    (seen,) = lab.end(native_id)
    assert (seen.state, seen.cause) == (JobState.FAILED, Cause.SUBMIT_REJECTED)


def test_what_cannot_be_started_fails_with_the_reason(lab):
    submission = lab.submission("exit 0")
    native_id = lab.backend.submit(submission)
    lab.end(native_id)
    for number, broken in enumerate(("missing", "no/folder/script")):
        wrong = Submission(f"x{number}", "", lab.folder / broken, submission.logs, 0, 1, False, Resources())
        (seen,) = lab.end(lab.backend.submit(wrong))
        assert seen.state is JobState.FAILED
    assert seen.cause is Cause.INFRASTRUCTURE
    assert "No such file" in seen.reason


def test_a_spool_that_cannot_be_opened(tmp_path):
    (tmp_path / "file").touch()
    backend = LocalBackend(tmp_path / "file" / "spool")
    for call in (lambda: backend.query(["1"]), lambda: backend.find(["a"]), backend.snapshot):
        with pytest.raises(PoolUnreachable):
            call()
    (tmp_path / "spool.sqlite").write_text("no database at all" * 100)
    with pytest.raises(PoolUnreachable, match="not a database"):
        LocalBackend(tmp_path).query(["1"])


def test_absence_is_no_answer(lab):
    assert lab.backend.query(["1", "nonsense"]) == []
    assert lab.backend.find(["a.0.0"]) == {}


def test_a_supervisor_that_does_not_come_up_is_told(lab, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    native_id = lab.submit("exit 0")

    def told():
        try:
            lab.backend.query([native_id])
        except PoolUnreachable as error:
            return str(error)
        return None

    assert "/nonexistent/python" in until(told, f"error after {FAILED_STARTS} starts")
    monkeypatch.undo()
    monkeypatch.setenv("HYBRID_SUPERVISOR_IDLE", "0.3")
    until(lambda: not lab.locked())
    with contextlib.suppress(PoolUnreachable):
        lab.backend.query([native_id])
    assert lab.end(native_id)[0].state is JobState.COMPLETED


def test_from_pool(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    backend = LocalBackend.from_pool(PoolConfig("mine", "local", options={"cpus": 3}))
    assert (backend.pool, backend.cpus, backend.folder.parent.name) == ("mine", 3, "local")


# Exactly once


def test_a_tag_is_submitted_once(lab):
    submission = lab.submission("echo x >>NOTES", tag="abc.0.0")
    native_id = lab.backend.submit(submission)
    assert lab.backend.submit(submission) == native_id
    lab.end(native_id)
    assert lab.backend.submit(submission) == native_id
    assert lab.backend.find(["abc.0.0", "abc.0.1"]) == {"abc.0.0": native_id}
    assert lab.noted() == ["x"]


SUBMITTER = """
import sys
from pathlib import Path
from jupyter_hybrid.backends.base import Submission
from jupyter_hybrid.backends.local import LocalBackend
from jupyter_hybrid.spec import Resources

folder = Path(sys.argv[1])
backend = LocalBackend(folder / "spool", "local", 2, 1 << 30)
for number in range(int(sys.argv[2])):
    script = folder / f"script{number}"
    tag = f"{sys.argv[3]}{number}"
    print(tag, backend.submit(Submission(tag, "", folder / "script1", folder / "logs", 0, 1, False, Resources())))
"""


def test_two_processes_submit_the_same(lab):
    lab.submission("echo $HYBRID_LOCAL_JOB >>NOTES")
    command = [sys.executable, "-c", SUBMITTER, str(lab.folder), "20", "same"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (one.communicate(timeout=DEADLINE)[0] for one in both)
    assert [one.returncode for one in both] == [0, 0]
    assert first == second
    ids = [line.split()[1] for line in first.splitlines()]
    for native_id in ids:
        lab.end(native_id)
    assert Counter(lab.noted()) == dict.fromkeys(ids, 1)


def test_submissions_while_the_supervisor_ends(lab, monkeypatch):
    monkeypatch.setenv("HYBRID_SUPERVISOR_IDLE", "0")
    for number in range(25):
        lab.end(lab.submit(f"echo {number} >>NOTES"))
    assert lab.noted() == [str(number) for number in range(25)]


def test_killed_supervisors_lose_and_double_nothing(lab):
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    # Some end while there is no supervisor, some live on into the next one's time.
    script = "echo $HYBRID_ARRAY_INDEX >>NOTES; sleep 0.$((HYBRID_ARRAY_INDEX % 4)); exit $((HYBRID_ARRAY_INDEX % 3))"
    native_id = lab.submit(script, count=100)
    kills = 0
    while kills < 30:
        with contextlib.suppress(PoolUnreachable):
            if all(state.final for state in lab.states(native_id)):
                break
        pid = lab.supervisor()
        if pid is not None:
            time.sleep(chance.random() * 0.1)  # any moment of its life
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills += 1
            until(lambda killed=pid: lab.supervisor() != killed)
    seen = lab.end(native_id)
    assert Counter(lab.noted()) == {str(index): 1 for index in range(100)}, f"seed {seed}"
    assert [one.exit_code for one in seen] == [index % 3 for index in range(100)], f"seed {seed}"
    assert kills >= 20


def test_the_next_supervisor_adopts_what_runs(lab):
    ends = lab.submit("echo start >>NOTES; sleep 300", time="3s")
    goes = lab.submit(f"{BLOCK}; exit 3")
    until(lambda: lab.states(ends) == lab.states(goes) == [JobState.RUNNING], "both running")
    lab.kill_supervisor()
    lab.backend.cancel(goes)
    assert lab.end(ends)[0].state is JobState.TIMEOUT
    assert lab.end(goes)[0].state is JobState.CANCELLED
    assert lab.noted() == ["start"]


def test_an_end_without_supervisor_is_known_later(lab):
    native_id = lab.submit(f"echo $$ >>NOTES; {BLOCK}; exit 3")
    pid = int(until(lab.noted)[0])
    lab.kill_supervisor()
    (lab.folder / "go").touch()
    until(lambda: gone(pid), "end of the script")
    (seen,) = lab.end(native_id)
    assert (seen.state, seen.exit_code) == (JobState.FAILED, 3)


def test_a_killed_shim_takes_its_script_along(lab):
    native_id = lab.submit("echo $$ $PPID >>NOTES; sleep 300")
    until(lambda: len(lab.noted()) == 2)
    script, parent = map(int, lab.noted())
    os.kill(parent, signal.SIGKILL)
    (seen,) = lab.end(native_id)
    assert (seen.state, seen.cause) == (JobState.FAILED, Cause.INFRASTRUCTURE)
    until(lambda: gone(script), "end of the script")


def test_a_restart_of_the_machine_fails_what_ran_and_keeps_what_waits(lab):
    runs = lab.submit("echo $PPID >>NOTES; sleep 300", cpus=2)
    waits = lab.submit("exit 0")
    pid = int(until(lab.noted)[0])
    lab.kill_supervisor()
    os.killpg(pid, signal.SIGKILL)
    until(lambda: gone(pid))
    lab.sql("UPDATE element SET boot = 'an earlier boot' WHERE native_id = ?", runs)
    (seen,) = lab.end(runs)
    assert (seen.state, seen.cause) == (JobState.FAILED, Cause.NODE_FAILURE)
    assert lab.end(waits)[0].state is JobState.COMPLETED


def test_a_job_submitted_by_a_job_outlives_it(lab):
    (lab.folder / "submitter.py").write_text(SUBMITTER)
    inner = lab.submission(f"{BLOCK}; echo inner >>NOTES", tag="unused")
    assert inner.script.name == "script1"
    outer = lab.submit(f"while [ ! -e DIR/submit ]; do sleep 0.02; done; {sys.executable} DIR/submitter.py DIR 1 inner")
    lab.runs(outer)
    lab.kill_supervisor()  # so that it is the job that starts the next one
    (lab.folder / "submit").touch()
    until(lambda: lab.backend.find(["inner0"]), "submission by the job")
    native_id = lab.backend.find(["inner0"])["inner0"]
    assert lab.end(outer)[0].state is JobState.COMPLETED
    lab.end(lab.submit("exit 0"))
    (lab.folder / "go").touch()
    assert lab.end(native_id)[0].state is JobState.COMPLETED
    assert lab.noted() == ["inner"]


# The supervisor's life


def test_it_ends_when_idle(lab):
    lab.end(lab.submit("exit 0"))
    until(lambda: not lab.locked(), "end of the supervisor")
    assert list((lab.spool / "run").iterdir()) == []


def test_it_ends_when_its_folder_is_removed(lab):
    lab.end(lab.submit("exit 0"))
    pid = until(lab.supervisor)
    lab.spool.rename(lab.folder / "elsewhere")
    until(lambda: gone(pid), "end of the supervisor")


def test_old_submissions_are_forgotten(lab):
    old, new = lab.submit("exit 0", tag="old"), lab.submit("exit 0", tag="new")
    lab.end(old)
    lab.end(new)
    until(lambda: not lab.locked())
    week = timedelta(days=8).total_seconds()
    lab.sql("UPDATE element SET ended = ended - ? WHERE native_id = ?", week, old)
    lab.sql("UPDATE submission SET submitted = submitted - ? WHERE native_id = ?", week, old)
    lab.end(lab.submit("exit 0"))
    assert lab.backend.find(["old", "new"]) == {"new": new}
    assert lab.backend.query([old]) == []


def test_ids_are_never_given_again(lab):
    first = lab.submit("exit 0")
    lab.end(first)
    until(lambda: not lab.locked())
    before = int(time.time())
    for path in lab.spool.glob("spool.sqlite*"):
        path.unlink()
    until(lambda: int(time.time()) > before + 1, "a later second")
    assert int(lab.submit("exit 0")) > int(first)


@pytest.fixture
def small_disk(lab):
    lab.spool.mkdir()
    options = ["-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(lab.spool)]
    if os.getuid() != 0 or process.run(["mount", *options]).code:
        pytest.skip("needs root to mount a small disk")
    return lab


def test_a_full_disk(small_disk):
    lab = small_disk
    try:
        runs = lab.submit(f"{BLOCK}; exit 3")
        lab.runs(runs)
        filler = lab.spool / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(PoolUnreachable, match="disk is full"):
            lab.submit("exit 0", tag="later", count=20_000)
        (lab.folder / "go").touch()
        until(lambda: not lab.processes(), "end of the script")
        filler.unlink()
        (seen,) = lab.end(runs)
        assert (seen.state, seen.exit_code) == (JobState.FAILED, 3)
        assert lab.end(lab.submit("exit 0", tag="later"))[0].state is JobState.COMPLETED
        until(lambda: not lab.locked(), "end of the supervisor")
    finally:
        log = (lab.spool / "supervisor.log").read_text()
        until(lambda: process.run(["umount", str(lab.spool)]).code == 0, f"unmount; {log}")
