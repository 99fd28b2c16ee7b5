"""Speed of imports, the Store and results, as ratios to floors or in absolute bounds where the issue names them."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_hybrid.spec import JobState
from jupyter_hybrid.store import JobRow, Store

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

HEAVY = ("dask", "pandas", "jupyter_server", "numpy", "yaml", "ipywidgets")


def milliseconds(code: str, before: str) -> float:
    """Return the median time of a statement in a fresh interpreter that has run `before`."""
    program = (
        f"{before}\nimport sys, time\nstart = time.perf_counter()\n{code}\n"
        "print(1000 * (time.perf_counter() - start))\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\nassert not loaded, loaded\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    return statistics.median(
        float(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(9)
    )


def test_imports_are_light(table: Any) -> None:
    table.hold("import jupyter_hybrid", milliseconds("import jupyter_hybrid", ""), 30, " ms")
    shell = "from IPython.core.interactiveshell import InteractiveShell\nshell = InteractiveShell.instance()"
    load = "shell.run_line_magic('load_ext', 'jupyter_hybrid')"
    table.hold("%load_ext jupyter_hybrid", milliseconds(load, shell), 100, " ms")


def test_a_store_of_a_hundred_thousand_jobs(table: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")
    choose = random.Random(1)
    states = [state.value for state in JobState]
    with store.write() as db:
        db.executemany(
            f"INSERT INTO jobs ({', '.join(JobRow._fields)}) VALUES ({','.join('?' * len(JobRow._fields))})",
            (
                (f"job{i:07d}", i, f"name{i % 100}", f"pool{i % 5}", "function", choose.choice(states), None, "", 0, 1,
                 0, 0, 0, 1, 1.7e9 + i, None, None, None, None, 1, None, None, str(i), "/folder", "", "f")
                for i in range(100_000)
            ),
        )  # fmt: skip
    questions: dict[str, Callable[[], object]] = {
        "newest 1,000 listed": lambda: store.jobs(limit=1000),
        "failed on one pool filtered": lambda: store.jobs(states=[JobState.FAILED], pool="pool3", limit=1000),
        "name filtered": lambda: store.jobs(name="name42", limit=1000),
        "counted by state": store.count,
        "a page from the middle": lambda: store.jobs(before=(1.7e9 + 50_000, "job0050000"), limit=1000),
    }
    for what, question in questions.items():
        took = []
        for _ in range(7):
            start = time.perf_counter()
            assert question()
            took.append(1000 * (time.perf_counter() - start))
        table.hold(f"Store of 100,000 jobs: {what}", statistics.median(took), 100, " ms")
