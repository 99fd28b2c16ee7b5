"""Arrays on the local pool: batches, failures, results as they come, retries, dependencies, limits."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.backends.spool import connect
from jupyter_hybrid.errors import HybridError, JobFailed
from jupyter_hybrid.handles import ArrayJob
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.spec import Cause, JobState

DEADLINE = 90.0


def until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def configure(home: Path, text: str) -> None:
    """Set fields of the local pool."""
    folder = Path(os.environ["JUPYTER_CONFIG_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hybrid.yaml").write_text(f"pools:\n  local:\n    kind: local\n    {text}\n")


def fails_at(bad: set[int], marks: Path) -> Callable[[int], int]:
    """Return a function that notes its run and raises for some arguments, until the file `<marks>.mended` is there."""
    where = str(marks)

    def task(number: int) -> int:
        import os

        with open(where, "ab", buffering=0) as file:
            file.write(b"%d\n" % number)
        if number in bad and not os.path.exists(where + ".mended"):
            raise ValueError(f"bad {number}")
        return -number

    return task


def ran(marks: Path) -> Counter[int]:
    return Counter(int(line) for line in marks.read_text().split())


@pytest.mark.parametrize("batch", ["auto", 1, 4, 100])
def test_batches(batch: int | str) -> None:
    array = hy.Executor("local").array(pow, range(10), [2] * 10, batch=batch)
    assert array.results(DEADLINE) == [i * i for i in range(10)]
    assert len(array) == 10
    assert array.done()
    assert array.states == {JobState.COMPLETED: 10}
    assert array.failed == []
    (attempt,) = array.run.folder.attempts()
    assert attempt.batches == {"auto": min(10, len(os.sched_getaffinity(0))), 1: 10, 4: 3, 100: 1}[batch]


@pytest.mark.parametrize("batch", [0, -1, 1.5, "many", True])
def test_wrong_batch(batch: Any) -> None:
    with pytest.raises(ValueError, match="batch"):
        hy.Executor("local").array(abs, [1], batch=batch)


def test_empty_and_single() -> None:
    ex = hy.Executor("local")
    with pytest.raises(ValueError, match="empty"):
        ex.array(abs, [])
    array = ex.array(abs, [-5])
    assert isinstance(array, ArrayJob)
    assert array.results(DEADLINE) == [5]
    assert isinstance(hy.job(array.id), ArrayJob)


def test_index_and_slice() -> None:
    array = hy.Executor("local").array(abs, range(5), batch=5)
    array.wait(DEADLINE)
    assert array[-1].result(0) == 4
    assert [task.index for task in array[1:4]] == [1, 2, 3]
    assert [task.result(0) for task in array[::-2]] == [4, 2, 0]
    assert [task.index for task in array] == [0, 1, 2, 3, 4]
    for wrong in (5, -6):
        with pytest.raises(IndexError, match="tasks 0 to 4"):
            array[wrong]


@pytest.mark.parametrize("batch", ["auto", 3, 10])
def test_failures_and_retry(tmp_path: Path, batch: int | str) -> None:
    marks = tmp_path / "marks"
    array = hy.Executor("local").array(fails_at({2, 7}, marks), range(10), batch=batch)
    array.wait(DEADLINE)
    until(lambda: array.state.final)
    assert array.states == {JobState.COMPLETED: 8, JobState.FAILED: 2}
    assert (array.state, array.cause, array.reason) == (JobState.FAILED, Cause.USER_ERROR, "ValueError: bad 2")
    assert [task.index for task in array.failed] == [2, 7]
    assert array[7].reason == "ValueError: bad 7"
    assert "ValueError: bad 7" in array[7].logs()
    assert array[6].logs() == ""
    with pytest.raises(ValueError, match="bad 2"):
        array.results()
    assert array.results(errors="skip") == [0, -1, -3, -4, -5, -6, -8, -9]
    assert [type(value) for value in array.results(errors="return")].count(ValueError) == 2
    Path(f"{marks}.mended").touch()
    assert array.retry() is array
    assert {task.index for task in array.as_completed(DEADLINE)} == set(range(10))
    assert array.results(DEADLINE) == [-i for i in range(10)]
    assert ran(marks) == {i: 2 if i in (2, 7) else 1 for i in range(10)}
    until(lambda: array.state.final)
    assert array.states == {JobState.COMPLETED: 10}
    assert default_store().job(array.id).done == 10
    array.retry()  # nothing is missing
    assert array.results(0) == [-i for i in range(10)]
    assert len(array.run.folder.attempts()) == 2


def test_no_retry_while_it_runs(tmp_path: Path) -> None:
    def task(value: int) -> int:
        import os
        import time

        while not os.path.exists(go):
            time.sleep(0.01)
        return value

    go = str(tmp_path / "go")
    array = hy.Executor("local").array(task, [1])
    with pytest.raises(HybridError, match="have ended"):
        array.retry()
    Path(go).touch()
    assert array.results(DEADLINE) == [1]


def test_results_come_while_the_batch_runs(tmp_path: Path) -> None:
    def task(number: int) -> int:
        import os
        import time

        while number and not os.path.exists(f"{folder}/seen-{number - 1}"):
            time.sleep(0.005)
        return number

    folder = str(tmp_path)
    array = hy.Executor("local").array(task, range(4), batch=4)
    seen = []
    for done in array.as_completed(DEADLINE):
        seen.append(done.result(0))
        assert array.states[JobState.COMPLETED] == len(seen)
        (tmp_path / f"seen-{done.index}").touch()  # only now can the next one end
    assert seen == [0, 1, 2, 3]


def test_as_completed_timeout(tmp_path: Path) -> None:
    def task(number: int) -> int:
        import os
        import time

        while number and not os.path.exists(go):
            time.sleep(0.005)
        return number

    go = str(tmp_path / "go")
    array = hy.Executor("local").array(task, range(2), batch=2)
    array[0].result(DEADLINE)
    tasks = array.as_completed(0.1)
    assert next(tasks).index == 0
    with pytest.raises(TimeoutError):
        next(tasks)
    Path(go).touch()
    assert array[1].result(DEADLINE) == 1


def test_two_thousand_tasks() -> None:
    array = hy.Executor("local").array(abs, range(-2000, 0))
    assert len({task.index for task in array.as_completed(DEADLINE)}) == 2000
    assert array.results(DEADLINE) == list(range(2000, 0, -1))


def test_cancel(tmp_path: Path) -> None:
    def task(number: int) -> int:
        import time

        if number:
            open(there, "w").close()
            time.sleep(600)
        return number

    there = str(tmp_path / "there")
    array = hy.Executor("local").array(task, range(4), batch=4)
    until(lambda: os.path.exists(there))
    assert array.cancel()
    array.wait(DEADLINE)
    until(lambda: array.state.final)
    assert (array.state, array.cause) == (JobState.CANCELLED, Cause.CANCELLED)
    assert array.states == {JobState.COMPLETED: 1, JobState.CANCELLED: 3}
    assert array[0].result(0) == 0
    with pytest.raises(JobFailed, match="CANCELLED"):
        array[1].result(0)
    assert not array.cancel()


def test_retry_with_more_memory() -> None:
    def task(number: int) -> int:
        import time

        if number:
            data = bytearray(400 << 20)
            data[::4096] = bytes(len(data) // 4096)
            end = time.monotonic() + 2
            while time.monotonic() < end:  # until it is measured
                time.sleep(0.01)
        return number

    array = hy.Executor("local", memory="200M").array(task, range(2), batch=1)
    array.wait(DEADLINE)
    until(lambda: array.state.final)
    assert (array.state, array.cause) == (JobState.FAILED, Cause.OUT_OF_MEMORY)
    assert array[1].cause is Cause.OUT_OF_MEMORY
    with pytest.raises(JobFailed, match="memory="):
        array[1].result(0)
    assert array.retry(memory="2G").results(DEADLINE) == [0, 1]


def test_dependencies(tmp_path: Path) -> None:
    ex, marks = hy.Executor("local"), tmp_path / "marks"
    first = ex.array(fails_at(set(), marks), range(6))
    second = hy.Executor("local", after=[first]).submit(lambda path: path.read_text().split(), marks)
    assert len(second.result(DEADLINE)) == 6
    done = hy.Executor("local", after=[second.id]).submit(len, "abcd")
    assert done.result(DEADLINE) == 4


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two slots")
def test_dependency_on_an_array_with_an_idle_batch(tmp_path: Path) -> None:
    def task() -> None:
        import os
        import time

        while not os.path.exists(go):
            time.sleep(0.01)

    go = str(tmp_path / "go")
    slots = len(os.sched_getaffinity(0))
    blocker = hy.Executor("local", cpus=slots - 1).submit(task)
    until(lambda: blocker.state is JobState.RUNNING)
    first = hy.Executor("local").array(abs, range(50))  # one batch runs all of it, the others wait for slots
    second = hy.Executor("local", after=[first]).submit(len, "abc")
    until(lambda: second.native_id)
    until(lambda: first.state is JobState.COMPLETED)
    Path(go).touch()
    assert second.result(DEADLINE) == 3


def test_failed_dependency(tmp_path: Path) -> None:
    ex, marks = hy.Executor("local"), tmp_path / "marks"
    first = ex.array(fails_at({1}, marks), range(3), batch=1)
    second = hy.Executor("local", after=[first]).submit(len, "abc")
    third = hy.Executor("local", after=[second]).array(abs, [1, 2])
    for job in (second, third):
        until(lambda job=job: job.state.final)
        assert job.cause is Cause.DEPENDENCY_FAILED
    with pytest.raises(JobFailed, match="DEPENDENCY_FAILED"):
        third.results(DEADLINE)
    late = hy.Executor("local", after=[first]).submit(len, "abc")
    with pytest.raises(JobFailed, match="which this one waits for"):
        late.result(DEADLINE)
    assert late.cause is Cause.DEPENDENCY_FAILED
    Path(f"{marks}.mended").touch()
    first.retry()
    assert first.results(DEADLINE) == [0, -1, -2]
    until(lambda: first.state is JobState.COMPLETED)
    assert second.retry().result(DEADLINE) == 3


def test_small_arrays_only(home: Path) -> None:
    configure(home, "limits: {max_array: 7}")
    array = hy.Executor("local").array(_say, range(20), batch=1)
    assert array.results(DEADLINE) == list(range(20))
    submissions = default_store().submissions(array.id)
    assert [(row.first, row.batches, row.state) for row in submissions] == [
        (0, 7, "submitted"), (7, 7, "submitted"), (14, 6, "submitted"),
    ]  # fmt: skip
    assert len({row.native_id for row in submissions}) == 3
    assert [array[i].logs() for i in range(20)] == [f"task {i}\n" for i in range(20)]
    assert [array.run.progress.results[i].batch for i in range(20)] == list(range(20))


_say: Callable[[int], int] = eval("lambda i: print('task', i) or i", {"__name__": "__main__"})


def test_never_more_jobs_than_allowed(home: Path, tmp_path: Path) -> None:
    configure(home, "limits: {max_jobs: 3, poll_min: 50ms, poll_max: 200ms}")
    ex = hy.Executor("local")
    array = ex.array(abs, range(8), batch=1)
    jobs = [ex.submit(abs, -i) for i in range(4)]
    refused = ex.submit(len, "never")
    refused.cancel()
    until(lambda: list((home / "local").rglob("spool.sqlite")))
    spool = next(iter((home / "local").rglob("spool.sqlite"))).parent
    most = 0
    while not (array.done() and all(job.done() for job in jobs)):
        database = connect(spool)
        live = database.execute("SELECT count(*) FROM element WHERE state IN ('PENDING', 'RUNNING')").fetchone()[0]
        database.close()
        most = max(most, live)
        time.sleep(0.002)
    assert array.results(0) == list(range(8))
    assert [job.result(0) for job in jobs] == [0, 1, 2, 3]
    assert 1 <= most <= 3
    until(lambda: refused.state is JobState.CANCELLED)
