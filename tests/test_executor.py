"""The Executor on the local pool: a concurrent.futures.Executor whose jobs outlive it and their process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.errors import CaptureError, ConfigError, JobFailed, JobNotFound, RemoteError, ResourceError
from jupyter_hybrid.spec import Cause, JobState

DEADLINE = 60.0


def until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def python(code: str, *arguments: str) -> str:
    """Run code in another process and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def waits_for(path: Path) -> Callable[..., Any]:
    """Return a function that says it is there (``<path>.there``), waits for a file and returns what it was given."""
    where = str(path)

    def task(value: Any = None) -> Any:
        import os
        import time

        open(where + ".there", "w").close()
        while not os.path.exists(where):
            time.sleep(0.01)
        return value

    return task


def test_is_an_executor() -> None:
    ex = hy.Executor("local")
    assert isinstance(ex, concurrent.futures.Executor)
    job = ex.submit(divmod, 7, 3)
    assert isinstance(job, concurrent.futures.Future)
    assert job.result(DEADLINE) == (2, 1)
    assert job.done()
    assert not job.running()
    assert not job.cancelled()
    assert job.exception(0) is None
    assert job.state is JobState.COMPLETED
    assert job.native_id
    assert "batch.py" in job.script
    assert ex.submit(dict, a=1, b=2).result(DEADLINE) == {"a": 1, "b": 2}


def test_functions_defined_here() -> None:
    captured = [1, 2]

    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

    assert hy.Executor("local").submit(lambda p: (p.x, captured), Point(5)).result(DEADLINE) == (5, [1, 2])


def test_map() -> None:
    ex = hy.Executor("local")
    assert list(ex.map(pow, range(6), [2] * 6, timeout=DEADLINE)) == [0, 1, 4, 9, 16, 25]
    assert list(ex.map(pow, range(6), [2] * 6, timeout=DEADLINE, chunksize=4)) == [0, 1, 4, 9, 16, 25]
    assert list(ex.map(pow, [], [])) == []
    results = ex.map(lambda x: 1 // x, [1, 0, 1], timeout=DEADLINE)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_timeout(tmp_path: Path) -> None:
    task = waits_for(tmp_path / "go")
    results = hy.Executor("local").map(task, [1, 2], timeout=0.1)
    with pytest.raises(TimeoutError):
        next(results)


def test_shutdown(tmp_path: Path) -> None:
    with hy.Executor("local") as ex:
        job = ex.submit(waits_for(tmp_path / "go"), 5)
        (tmp_path / "go").touch()
    assert job.done()
    assert job.result(0) == 5
    for use in (lambda: ex.submit(len, ""), lambda: ex.array(len, [""]), lambda: ex.map(len, [""])):
        with pytest.raises(RuntimeError, match="after shutdown"):
            use()


def test_shutdown_cancels_what_waits(tmp_path: Path) -> None:
    ex = hy.Executor("local", cpus=len(os.sched_getaffinity(0)))
    running = ex.submit(waits_for(tmp_path / "go"), 1)
    until((tmp_path / "go.there").exists)
    until(lambda: running.state is JobState.RUNNING)
    waiting = [ex.submit(len, "x") for _ in range(3)]
    ex.shutdown(wait=False, cancel_futures=True)
    concurrent.futures.wait(waiting, timeout=DEADLINE)
    assert all(job.cancelled() for job in waiting)
    (tmp_path / "go").touch()
    assert running.result(DEADLINE) == 1


def test_wait_and_as_completed(tmp_path: Path) -> None:
    ex = hy.Executor("local")
    late = ex.submit(waits_for(tmp_path / "go"), "late")
    early = [ex.submit(abs, -i) for i in range(3)]
    found = concurrent.futures.wait([late, *early], timeout=DEADLINE, return_when="FIRST_COMPLETED")
    assert late in found.not_done
    order = []
    for job in concurrent.futures.as_completed([late, *early], timeout=DEADLINE):
        order.append(job.result())
        if len(order) == 3:
            (tmp_path / "go").touch()
    assert sorted(order[:3]) == [0, 1, 2]
    assert order[3] == "late"


def test_callbacks() -> None:
    ex = hy.Executor("local")
    called: list[Any] = []
    done = threading.Event()

    def callback(future: concurrent.futures.Future[Any]) -> None:
        called.append(future.result())
        ex.submit(len, "from a callback").add_done_callback(lambda future: (called.append(future.result()), done.set()))

    job = ex.submit(len, "abc")
    job.add_done_callback(callback)
    assert done.wait(DEADLINE)
    assert called == [3, 15]
    job.add_done_callback(lambda future: called.append("late"))
    assert called[-1] == "late"


def test_exceptions() -> None:
    def fails() -> None:
        raise KeyError("the message")

    job = hy.Executor("local").submit(fails)
    with pytest.raises(KeyError, match="the message") as caught:
        job.result(DEADLINE)
    assert isinstance(caught.value.__cause__, RemoteError)
    assert 'raise KeyError("the message")' in str(caught.value.__cause__)
    assert "worker.py" not in str(caught.value.__cause__)
    assert isinstance(job.exception(), KeyError)
    assert (job.state, job.cause) == (JobState.FAILED, Cause.USER_ERROR)
    assert job.reason == "KeyError: 'the message'"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit])
def test_what_would_end_the_caller_does_not(kind: type[BaseException]) -> None:
    def fails() -> None:
        raise kind(1)

    job = hy.Executor("local").submit(fails)
    with pytest.raises(JobFailed, match=kind.__name__):
        job.result(DEADLINE)

    async def main() -> None:
        await asyncio.wait_for(job, DEADLINE)

    with pytest.raises(JobFailed, match=kind.__name__):
        asyncio.run(main())


def test_timeouts(tmp_path: Path) -> None:
    job = hy.Executor("local").submit(waits_for(tmp_path / "go"), 1)
    array = hy.Executor("local").array(waits_for(tmp_path / "go"), [1, 2])
    late = (TimeoutError, concurrent.futures.TimeoutError)
    for wait in (job.result, job.exception, array.results, array[0].result):
        with pytest.raises(late, match=r"not ended within 0\.05 s: it is [A-Z]+.* on pool 'local'.*cancel") as caught:
            wait(0.05)
        assert (job.id if wait in (job.result, job.exception) else array.id) in str(caught.value)
    assert "0 of its 2 tasks have ended" in str(caught.value)
    (tmp_path / "go").touch()
    assert job.result(DEADLINE) == 1
    assert array.results(DEADLINE) == [1, 2]


def test_await_and_gather() -> None:
    ex = hy.Executor("local")

    async def main() -> list[Any]:
        return list(await asyncio.gather(ex.submit(len, "ab"), ex.array(abs, [-1, -2]), ex.submit(int, "x"),
                                         return_exceptions=True))  # fmt: skip

    first, second, third = asyncio.run(main())
    assert (first, second) == (2, [1, 2])
    assert isinstance(third, ValueError)


def test_who_stops_waiting_cancels_nothing(tmp_path: Path) -> None:
    ex = hy.Executor("local")
    task = waits_for(tmp_path / "go")
    job, array = ex.submit(task, 1), ex.array(task, [2])

    async def main() -> None:
        for each in (job, array):
            with pytest.raises((TimeoutError, asyncio.TimeoutError)):
                await asyncio.wait_for(_awaited(each), 0.05)

    asyncio.run(main())
    (tmp_path / "go").touch()
    assert job.result(DEADLINE) == 1
    assert array.results(DEADLINE) == [2]


async def _awaited(what: Any) -> Any:
    return await what


def test_await_does_not_block_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowToLoad:
        def __reduce__(self) -> Any:
            def load() -> str:
                import sys

                gate = sys.modules["hybrid_test_gate"]
                gate.loading.set()
                return "loaded" if gate.go.wait(20) else "the event loop stood still"

            return load, ()

    gate: Any = types.ModuleType("hybrid_test_gate")
    gate.loading, gate.go = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "hybrid_test_gate", gate)
    job = hy.Executor("local").submit(SlowToLoad)

    async def main() -> Any:
        waiting = asyncio.ensure_future(_awaited(job))
        while not gate.loading.is_set():
            await asyncio.sleep(0.005)
        gate.go.set()
        return await waiting

    assert asyncio.run(main()) == "loaded"


def test_cancel_running_and_waiting(tmp_path: Path) -> None:
    ex = hy.Executor("local", cpus=len(os.sched_getaffinity(0)))
    running = ex.submit(waits_for(tmp_path / "never"))
    until((tmp_path / "never.there").exists)
    waiting = ex.submit(len, "abc")
    for job in (waiting, running):
        assert job.cancel()
        with pytest.raises(concurrent.futures.CancelledError, match=rf"job {job.id} .* was cancelled; retry\(\)"):
            job.result(DEADLINE)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(_awaited(job))
        assert job.cancelled()
        assert (job.state, job.cause) == (JobState.CANCELLED, Cause.CANCELLED)
        assert not job.cancel()
    (tmp_path / "never").touch()
    assert waiting.retry().result(DEADLINE) == 3
    assert not waiting.cancelled()
    done = ex.submit(len, "")
    assert done.result(DEADLINE) == 0
    assert not done.cancel()


def test_same_job_in_this_process(tmp_path: Path) -> None:
    job = hy.Executor("local").submit(waits_for(tmp_path / "go"), 1)
    other = hy.job(job.id)
    (tmp_path / "go").touch()
    assert other.result(DEADLINE) == 1
    assert job.result(DEADLINE) == 1
    assert hy.job(job.id[:6]).id == job.id
    with pytest.raises(JobNotFound):
        hy.job("zzzzz")


def test_same_result_in_another_process() -> None:
    job = hy.Executor("local").submit(lambda: {"a": 1})
    code = "import sys, jupyter_hybrid as hy; print(hy.job(sys.argv[1]).result(60))"
    assert python(code, job.id) == "{'a': 1}"
    assert job.result(DEADLINE) == {"a": 1}
    assert python(code, job.id) == "{'a': 1}"


def test_state_and_result_by_who_only_watches() -> None:
    code = """
import sys, time, jupyter_hybrid as hy
from jupyter_hybrid.spec import JobState
jobs = [hy.job(id) for id in sys.argv[1:]]
for job in jobs:
    while job.state is not JobState.COMPLETED:
        time.sleep(0.001)
    print(job.result(0))
"""
    ex = hy.Executor("local")
    jobs = [ex.submit(abs, -i) for i in range(4)]
    assert python(code, *[job.id for job in jobs]).split() == ["0", "1", "2", "3"]


def test_deleting_the_handle_changes_nothing(tmp_path: Path) -> None:
    ex = hy.Executor("local")
    job = ex.submit(waits_for(tmp_path / "go"), 1)
    called: list[Any] = []
    job.add_done_callback(lambda future: called.append(future.result()))
    name, alive = job.id, weakref.ref(job)
    del job, ex
    gc.collect()
    (tmp_path / "go").touch()
    until(lambda: called == [1])
    assert hy.job(name).result(DEADLINE) == 1
    until(lambda: gc.collect() is not None and alive() is None)


def test_script_that_submits_and_exits(tmp_path: Path) -> None:
    code = f"""
import jupyter_hybrid as hy
def mark(): open({str(tmp_path / "mark")!r}, "w").close()
print(hy.submit(mark).id)
"""
    names = [python(code) for _ in range(4)]
    until((tmp_path / "mark").exists)  # no tracker runs here: it was submitted before the process ended
    for name in names:
        hy.job(name).result(DEADLINE)


def test_forked_child_waits_and_submits(tmp_path: Path) -> None:
    code = f"""
import os, sys, jupyter_hybrid as hy
from pathlib import Path
go = {str(tmp_path / "go")!r}
def task():
    import os, time
    while not os.path.exists(go): time.sleep(0.01)
    return 5
ex = hy.Executor("local")
job, array = ex.submit(task), ex.array(abs, [-1])
child = os.fork()
if child == 0:
    Path(go).touch()
    good = (job.result(50), array.results(50), ex.submit(len, "abc").result(50)) == (5, [1], 3)
    os._exit(0 if good else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), job.result(50), array.results(50))
"""
    assert python(code) == "0 5 [1]"


def test_many_threads_submit() -> None:
    ex = hy.Executor("local")
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        jobs = list(threads.map(lambda i: ex.submit(abs, -i), range(24)))
        assert list(threads.map(lambda job: job.result(DEADLINE), jobs)) == list(range(24))


def test_no_threads_or_descriptors_are_left() -> None:
    ex = hy.Executor("local")

    def work() -> None:
        jobs = [ex.submit(abs, -1) for _ in range(3)]
        array = ex.array(abs, [-1, -2])
        assert [job.result(DEADLINE) for job in jobs] == [1, 1, 1]
        assert array.results(DEADLINE) == [1, 2]
        until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("hybrid-")])

    work()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        work()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="local"):
        hy.Executor("loca")
    with pytest.raises(ResourceError, match="memory"):
        hy.Executor("local", memroy="8G")
    with pytest.raises(ResourceError, match="8Q"):
        hy.Executor("local", memory="8Q")
    ex = hy.Executor("local", limit="1M")
    with pytest.raises(CaptureError, match="lock"):
        ex.submit(id, threading.Lock())
    with pytest.raises(CaptureError):
        ex.submit(len, b"x" * 2_000_000)
    assert not hy.jobs()


def test_environment_of_an_outer_scheduler_is_not_taken_for_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_TASK_ID", "PBS_ARRAY_INDEX", "HYBRID_ARRAY_INDEX"):
        monkeypatch.setenv(name, "5")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "PBS_JOBID", "HYBRID_LOCAL_JOB"):
        monkeypatch.setenv(name, "77")
    job = hy.Executor("local").submit(lambda: __import__("os").environ["HYBRID_NATIVE_ID"])
    assert job.result(DEADLINE) == job.native_id


def test_what_a_pool_can_never_run_is_refused_before_submission(tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("true")
    for asked, words in (
        ({"cpus": 4096}, "'local' can never run this: it asks for 4096 cpus, it has "),
        ({"tasks_per_node": 4096}, r"4096 cpus \(4096 processes of 1\), it has "),
        ({"memory": "900T"}, r"memory 900T, it has [\d.]+[GT]\. "),
        ({"gpus": 1}, "1 gpu, it has none.*say how many as 'gpus:' of pool 'local' in hybrid.yaml"),
        ({"gpus": 2, "nodes": 2}, "2 nodes, it is one machine; and for 2 gpus, it has none"),
    ):
        for use in (hy.Executor, lambda **asked: hy.submit_script("script.sh", **asked)):
            with pytest.raises(ResourceError, match=words):
                use(**asked)
    assert not hy.jobs()


def test_what_one_machine_does_not_have_is_ignored_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("true")
    with pytest.warns(UserWarning, match="partition, extra: ignored, .* on pool 'local'") as warned:
        ex = hy.Executor("local", partition="gpu", extra={"reservation": "course"})
    assert warned[0].filename == __file__
    assert ex.submit(len, "abc").result(DEADLINE) == 3
    with pytest.warns(UserWarning, match="account: ignored") as warned:
        hy.submit_script("script.sh", account="me").result(DEADLINE)
    assert warned[0].filename == __file__


def test_keywords_of_the_executor_are_not_handed_on_in_silence() -> None:
    def area(radius: float) -> float:
        return 3 * radius

    words = r"hands pool, cpus on to area\(\).*hy\.Executor\(pool='hpc', cpus=4\)\.submit\(area, \.\.\.\)"
    with pytest.raises(TypeError, match=words):
        hy.submit(area, 1, pool="hpc", cpus=4)
    assert not hy.jobs()
    assert hy.submit(dict, pool="hpc").result(DEADLINE) == {"pool": "hpc"}
    assert hy.submit(lambda **rest: rest, memory=1).result(DEADLINE) == {"memory": 1}
    assert isinstance(hy.submit(area, redius=1).exception(DEADLINE), TypeError)  # as any executor does


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "file").touch()
    assert hy.Executor("local", directory="below").submit(os.getcwd).result(DEADLINE) == str(tmp_path / "below")
    for name, words in (("nosuch", "nosuch does not exist: make it"), ("file", "file is no folder")):
        with pytest.raises(hy.HybridError, match=words):
            hy.Executor("local", directory=name)
        with pytest.raises(hy.HybridError, match=words):
            hy.submit_script("file", directory=name)
    assert len(hy.jobs()) == 1


def test_efficiency_is_the_share_of_what_was_asked_for() -> None:
    def work() -> int:
        import time

        block = bytearray(200 << 20)
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        return len(block)

    job = hy.Executor("local", memory="1G").submit(work)
    assert job.efficiency() == {"cpu": None, "memory": None}
    job.result(DEADLINE)
    until(lambda: job.state.final and job.efficiency()["cpu"])  # what was used is told after the result
    shares, row = job.efficiency(), job.row()
    (batch,) = job.run.progress.batches.values()
    assert row.cpu_seconds >= 0.3
    assert shares["cpu"] == pytest.approx(min(1.0, row.cpu_seconds / (batch.ended - batch.started)))
    assert shares["memory"] == row.peak_memory / 2**30
    assert 0.2 < shares["memory"] < 0.9
    array = hy.Executor("local").array(abs, [1, 2], batch=1)
    array.wait(DEADLINE)
    until(lambda: array.state.final and array.efficiency()["cpu"])
    assert array.efficiency()["memory"] is None  # nothing was asked for
    assert array.efficiency()["cpu"] <= 1
