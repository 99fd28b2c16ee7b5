"""What is told of tasks that fail, and of those that end their process; on the local pool."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.errors import JobFailed, ResultLost
from jupyter_hybrid.spec import Cause, JobState

DEADLINE = 90.0


def until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def shown(error: BaseException) -> str:
    """Return what Python prints of an exception and its causes."""
    return "".join(traceback.format_exception(error))


# --- tasks that end their process -----------------------------------------------------------------------------------


def dies_at_3(marks: Path, how: str) -> Callable[[int], int]:
    """Return a function that ends its process for the argument 3, until the file `<marks>.mended` is there."""
    where = str(marks)

    def task(number: int) -> int:
        import ctypes
        import os
        import signal

        with open(where, "ab", buffering=0) as file:
            file.write(b"%d\n" % number)
        print("runs", number, flush=True)
        if number == 3 and not os.path.exists(where + ".mended"):
            if how == "exit":
                os._exit(3)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            ctypes.string_at(0)
        return number * number

    return task


@pytest.mark.parametrize("batch", [10, "auto"])
@pytest.mark.parametrize(
    ("how", "cause", "words"),
    [
        ("exit", Cause.USER_ERROR, "exit status 3"),
        ("kill", Cause.INFRASTRUCTURE, r"killed by signal 9 \(SIGKILL\)"),
        ("segfault", Cause.USER_ERROR, r"killed by signal 11 \(SIGSEGV\)"),
    ],
)
def test_a_task_that_ends_its_process_has_no_share_in_its_mates(
    tmp_path: Path, how: str, cause: Cause, words: str, batch: int | str
) -> None:
    marks = tmp_path / "marks"
    array = hy.Executor("local").array(dies_at_3(marks, how), range(10), batch=batch)
    array.wait(DEADLINE)
    until(lambda: array.state.final)
    assert [task.index for task in array.failed] == [3]
    assert array.states == {JobState.COMPLETED: 9, JobState.FAILED: 1}
    assert (array.state, array.cause, array[3].cause) == (JobState.FAILED, cause, cause)
    assert array.results(errors="skip") == [i * i for i in range(10) if i != 3]
    with pytest.raises(JobFailed, match=rf"(?s)task 3 of job .* with arguments \(3,\) .*{words}.*runs 3") as caught:
        array.results()
    assert caught.value.cause is cause
    assert "runs 4" not in str(caught.value)
    assert array[3].logs().startswith("runs 3\n")
    Path(f"{marks}.mended").touch()
    array.retry()
    assert array.results(DEADLINE) == [i * i for i in range(10)]
    counts = Counter(int(line) for line in marks.read_text().split())
    assert counts == {i: 1 + (i == 3) for i in range(10)}


def test_a_cell_that_ends_its_process(tmp_path: Path) -> None:
    from IPython.testing.globalipapp import get_ipython, start_ipython

    shell = start_ipython() or get_ipython()
    shell.run_line_magic("load_ext", "jupyter_hybrid")
    try:
        cell = "import os\nprint('begins', seed)\nif seed == 1:\n    os._exit(7)\nscore = seed * 2"
        shell.run_cell_magic("local", "--array seed=range(4) --batch 4 --out score --as dying", cell)
        array = shell.user_ns["dying"]
        array.wait(DEADLINE)
        assert array.results(errors="skip") == [0, 4, 6]
        with pytest.raises(JobFailed, match=r"task 1 of job \S+ with seed=1 .*exit status 7"):
            array[1].result(0)
    finally:
        shell.run_line_magic("unload_ext", "jupyter_hybrid")


def holding_child(where: str) -> Callable[[int], None]:
    """Return a function that starts a child, tells both process ids and never ends."""

    def task(number: int) -> None:
        import os
        import subprocess
        import threading

        child = subprocess.Popen(["sleep", "600"])
        with open(where + ".new", "w") as file:
            file.write(f"{os.getpid()} {os.getppid()} {child.pid}")
        os.rename(where + ".new", where)
        while True:
            threading.Event().wait(60)

    return task


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", [Cause.CANCELLED, Cause.TIMEOUT])
def test_the_end_of_a_batch_is_that_of_all_its_processes(tmp_path: Path, end: Cause) -> None:
    ex = hy.Executor("local", time="3s" if end is Cause.TIMEOUT else None)
    array = ex.array(holding_child(str(tmp_path / "pids")), range(4), batch=4)
    if end is Cause.CANCELLED:
        until((tmp_path / "pids").exists)
        array.cancel()
    until(lambda: array.state.final)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    until(lambda: not any(map(alive, pids)))
    assert array.cause is end
    assert {task.cause for task in array} == {end}
    assert array.run.progress.batches[0].why == "terminated"


def test_the_memory_limit_still_is_the_cause() -> None:
    def hungry(number: int) -> None:
        import threading

        data = bytearray(500 << 20)
        data[::4096] = bytes(len(data) // 4096)
        threading.Event().wait(600)

    array = hy.Executor("local", memory="200M").array(hungry, range(3), batch=3)
    until(lambda: array.state.final)
    assert array.cause is Cause.OUT_OF_MEMORY
    assert {task.cause for task in array} == {Cause.OUT_OF_MEMORY}


# --- arguments in errors --------------------------------------------------------------------------------------------


def test_a_failed_task_says_what_it_was_given() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise ValueError("no words")

    def task(rate: Any, name: str) -> None:
        raise KeyError("nothing there")

    odd, long = Odd(), "x" * 10_000
    array = hy.Executor("local").array(task, [0.3, np.arange(10_000), odd, 1], ["a", "b", "c", long], batch=4)
    array.wait(DEADLINE)
    texts = []
    for number in range(4):
        with pytest.raises(KeyError) as caught:
            array[number].result(0)
        texts.append(shown(caught.value))
        assert f"in task {number} of job {array.id} with arguments (" in texts[number]
        assert len(texts[number]) < 5000
    assert "with arguments (0.3, 'a')" in texts[0]
    assert "array([" in texts[1]
    assert "<Odd instance" in texts[2]
    assert "with arguments (1, 'xxx" in texts[3]
    errors = array.results(errors="return")
    assert "with arguments (0.3, 'a')" in shown(errors[0])


def test_what_cannot_be_loaded_is_not_told(tmp_path: Path) -> None:
    class Fragile:
        def __reduce__(self) -> Any:
            return _only_on_a_node, (str(tmp_path), os.getpid())

    def task(fragile: Any) -> None:
        raise ValueError(f"given {fragile}")

    array = hy.Executor("local").array(task, [Fragile()], batch=1)
    with pytest.raises(ValueError, match="given something") as caught:
        array.results(DEADLINE)
    text = shown(caught.value)
    assert f"in task 0 of job {array.id}\n" in text
    assert "arguments" not in text.rpartition("in task 0")[2]


def _only_on_a_node(folder: str, kernel: int) -> str:
    if os.getpid() == kernel:
        raise OSError("not here")
    return "something"


def test_a_plain_job_raises_what_it_raised() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        hy.Executor("local").submit(divmod, 1, 0).result(DEADLINE)
    assert "in task" not in shown(caught.value)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes are of Python 3.11")
def test_notes_do_not_grow() -> None:
    array = hy.Executor("local").array(divmod, [1], [0])
    array.wait(DEADLINE)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            array[0].result(0)
        assert len(getattr(caught.value, "__notes__", ())) == 1


# --- many large results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8])
def test_large_results_are_loaded_and_damage_is_found(batch: int) -> None:
    def task(number: int) -> Any:
        import numpy as np

        if number == 5:
            raise ValueError("bad 5")
        return np.full(300_000, number)

    array = hy.Executor("local").array(task, range(8), batch=batch)
    array.wait(DEADLINE)
    until(lambda: array.state.final)
    found = array.results(errors="return")
    assert [type(value).__name__ for value in found] == ["ndarray"] * 5 + ["ValueError"] + ["ndarray"] * 2
    assert all((found[i] == i).all() for i in range(8) if i != 5)
    result = array.run.progress.results[2]
    path = array.folder / "results" / f"{result.batch}.bin"
    until(path.exists)
    data = bytearray(path.read_bytes())
    data[result.entry.offset + 1_000_000] ^= 1
    path.write_bytes(data)
    found = array.results(errors="return")
    assert isinstance(found[2], ResultLost)
    assert [i for i in range(8) if not isinstance(found[i], Exception)] == [0, 1, 3, 4, 6, 7]
    with pytest.raises(ResultLost, match="task 2"):
        array[2].result(0)


def test_signals_of_crashes_are_known() -> None:
    from jupyter_hybrid.progress import BatchProgress, ending
    from jupyter_hybrid.store import BatchRow

    def cause_of(number: int) -> Cause | None:
        loss = ending(
            BatchProgress(started=1.0), BatchRow(0, JobState.FAILED, None, "", "", 128 + number, 0, None, None, None)
        )
        return loss.cause if loss else None

    assert cause_of(signal.SIGSEGV) is Cause.USER_ERROR
    assert cause_of(signal.SIGKILL) is Cause.INFRASTRUCTURE
