"""cache=True: what has run is not run again, whoever asks; what has changed is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.spec import JobState

DEADLINE = 60.0


def until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


CODE = """
import sys
import jupyter_hybrid as hy

def square(path, x):
    with open(path, "a") as file:
        file.write(f"{x}\\n")
    return x * x FACTOR

ex = hy.Executor("local", cache=True)
array = ex.array(square, [MARKS] * len(XS), XS)
print(array.results(60), array.id)
job = ex.submit(square, MARKS, 100)
print(job.result(60), job.id)
"""


def python(marks: Path, numbers: list[int], factor: str = "") -> list[str]:
    """Run a script in a process of its own; return what it prints."""
    code = CODE.replace("MARKS", repr(str(marks))).replace("XS", repr(numbers)).replace("FACTOR", factor)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def ran(marks: Path) -> Counter[int]:
    return Counter(int(line) for line in marks.read_text().split()) if marks.exists() else Counter()


def test_only_what_is_new_runs_in_any_process(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    first = python(marks, [1, 2, 3])
    assert first[0].startswith("[1, 4, 9]")
    assert ran(marks) == {1: 1, 2: 1, 3: 1, 100: 1}
    again = python(marks, [1, 2, 3])
    assert again[0].startswith("[1, 4, 9]")
    assert ran(marks) == {1: 1, 2: 1, 3: 1, 100: 1}
    job = hy.job(again[0].split()[-1])
    assert job.state is JobState.COMPLETED
    assert hy.why(job) == ["nothing changed: all results were reused"]
    more = python(marks, [3, 5, 1])
    assert more[0].startswith("[9, 25, 1]")
    assert ran(marks) == {1: 1, 2: 1, 3: 1, 5: 1, 100: 1}
    (sentence,) = hy.why(more[0].split()[-1])
    assert "2 of 3 results were reused" in sentence
    changed = python(marks, [1, 2], "+ 1")
    assert changed[0].startswith("[2, 5]")
    assert ran(marks) == {1: 2, 2: 2, 3: 1, 5: 1, 100: 2}
    assert "the code of the function changed" in hy.why(changed[0].split()[-1])[0]


def test_closures_globals_and_arguments_count(tmp_path: Path) -> None:
    def function(factor: int, marks: str) -> Callable[[int], int]:
        def scale(x: int) -> int:
            with open(marks, "a") as file:
                file.write(f"{x}\n")
            return x * factor

        return scale

    marks = tmp_path / "marks"
    ex = hy.Executor("local", cache=True)
    assert ex.submit(function(2, str(marks)), 5).result(DEADLINE) == 10
    assert ex.submit(function(2, str(marks)), 5).result(DEADLINE) == 10
    assert ran(marks) == {5: 1}
    job = ex.submit(function(3, str(marks)), 5)
    assert job.result(DEADLINE) == 15
    assert ran(marks) == {5: 2}
    assert "factor" in " ".join(job.why())
    assert ex.submit(function(3, str(marks)), 6).result(DEADLINE) == 18
    assert ran(marks) == {5: 2, 6: 1}
    plain = hy.Executor("local").submit(function(3, str(marks)), 6)
    assert plain.result(DEADLINE) == 18
    assert ran(marks) == {5: 2, 6: 2}
    assert "not submitted with cache=True" in plain.why()[0]


def marking(marks: Path) -> Callable[[int], int]:
    where = str(marks)

    def task(number: int) -> int:
        import os

        with open(where, "a") as file:
            file.write(f"{number}\n")
        if os.path.exists(where + ".bad"):
            raise ValueError("bad")
        return -number

    return task


@pytest.mark.parametrize("batch", ["auto", 2])
def test_source_folder_removed(tmp_path: Path, batch: int | str) -> None:
    task, ex = marking(tmp_path / "marks"), hy.Executor("local", cache=True)
    first = ex.array(task, range(4), batch=batch)
    assert first.results(DEADLINE) == [0, -1, -2, -3]
    second = ex.array(task, range(4), batch=batch)
    assert second.results(DEADLINE) == [0, -1, -2, -3]
    shutil.rmtree(first.folder)
    default_store().remove_job(first.id)
    assert hy.job(second.id).results(DEADLINE) == [0, -1, -2, -3]
    third = ex.array(task, range(4), batch=batch)
    assert third.results(DEADLINE) == [0, -1, -2, -3]
    assert ran(tmp_path / "marks") == dict.fromkeys(range(4), 1)


def test_damaged_result_runs_again(tmp_path: Path) -> None:
    task, ex = marking(tmp_path / "marks"), hy.Executor("local", cache=True)
    first = ex.array(task, range(4), batch=4)
    assert first.results(DEADLINE) == [0, -1, -2, -3]
    until((first.folder / "results" / "0.bin").exists)
    path, entry = first.folder / "results" / "0.bin", first.run.progress.results[2].entry
    data = bytearray(path.read_bytes())
    data[entry.offset + entry.length // 2] ^= 4
    path.write_bytes(data)
    second = ex.array(task, range(4), batch=4)
    assert second.results(DEADLINE) == [0, -1, -2, -3]
    assert ran(tmp_path / "marks") == {0: 1, 1: 1, 2: 2, 3: 1}


def test_failures_are_not_reused(tmp_path: Path) -> None:
    task, ex = marking(tmp_path / "marks"), hy.Executor("local", cache=True)
    (tmp_path / "marks.bad").touch()
    assert isinstance(ex.submit(task, 1).exception(DEADLINE), ValueError)
    (tmp_path / "marks.bad").unlink()
    assert ex.submit(task, 1).result(DEADLINE) == -1
    assert ex.submit(task, 1).result(DEADLINE) == -1
    assert ran(tmp_path / "marks") == {1: 2}


def test_found_again_after_the_store_was_rebuilt(tmp_path: Path) -> None:
    from jupyter_hybrid import launch

    task, ex = marking(tmp_path / "marks"), hy.Executor("local", cache=True)
    assert ex.submit(task, 1).result(DEADLINE) == -1
    default_store().close()
    default_store().path.unlink()
    assert launch.reindex() == 1
    assert ex.submit(task, 1).result(DEADLINE) == -1
    assert ran(tmp_path / "marks") == {1: 1}
