"""What every test gets: data, configuration and working folder of its own, and nothing of it left running."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

DEADLINE = 60.0

# Time limits on examples fail on a busy machine; pytest-timeout bounds each test.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, max_examples=100, database=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Data folder of this test alone; at its end jobs of the local pool are cancelled and its supervisor is gone."""
    # Not below pytest's own folder, whose paths can be too long for sockets.
    top = Path(tempfile.mkdtemp(prefix="hy-"))
    folder = top / "data"
    monkeypatch.setenv("JUPYTER_HYBRID_HOME", str(folder))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(top / "config"))
    # Not the test's alone: an InteractiveShell writes its history when the process ends.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.getbasetemp() / "ipython"))
    monkeypatch.setenv("HYBRID_SUPERVISOR_IDLE", "1")
    monkeypatch.delenv("JUPYTER_HYBRID_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    yield folder
    used = {folder, Path(os.environ.get("JUPYTER_HYBRID_HOME", folder))}  # a test may have chosen another
    try:
        for each in used:
            _end_trackers(each)
            for spool in (each / "local").glob("*/spool.sqlite"):
                _end_local(spool.parent)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _until(reached: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end, f"{what} after {DEADLINE:g} s"
        time.sleep(0.01)


def _end_trackers(folder: Path) -> None:
    """End the threads that follow the jobs of this data folder; the jobs of a scheduler are its own."""
    if "jupyter_hybrid.tracker" not in sys.modules:
        return
    from jupyter_hybrid import pool
    from jupyter_hybrid.tracker import tracker

    store = folder / "store.sqlite"
    for key in [key for key in tracker._pools if key[0] == str(store)]:
        followed = tracker._pools.pop(key)
        # A thread ends when it has nothing to follow; rows that its own round loads anew are dropped again.
        while (thread := followed.thread) is not None and thread.is_alive():
            with followed.lock:
                followed.runs.clear()
                followed.own.clear()
            followed.wake.set()
            thread.join(0.05)
    if store in pool._stores:
        pool._stores.pop(store).close()
    for name in [name for name in pool._pools if name.startswith(f"{folder} ")]:
        del pool._pools[name]


def _end_local(spool: Path) -> None:
    """Cancel what runs or waits in a spool folder of the local pool, wait for its end, then end its supervisor."""
    from jupyter_hybrid.backends.local import LocalBackend
    from jupyter_hybrid.backends.spool import LIVE

    def live() -> list[str]:
        with contextlib.closing(sqlite3.connect(spool / "spool.sqlite", timeout=30)) as database:
            rows = database.execute(f"SELECT DISTINCT native_id FROM element WHERE state IN {LIVE}")
            return [str(row[0]) for row in rows]

    backend = LocalBackend(spool)
    for native_id in live():
        backend.cancel(native_id)
    _until(lambda: not live(), "jobs of the local pool run on")
    path = spool / "supervisor.lock"
    if path.exists():  # there was a supervisor
        with open(path, "rb") as lock:
            while _held(lock.fileno()):
                _kill_holder(path, lock.fileno())
                time.sleep(0.01)


def _held(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _kill_holder(path: Path, descriptor: int) -> None:
    words = path.read_text().split()
    if len(words) != 1:  # it has not come up yet
        return
    if _held(descriptor):  # so the number is still the supervisor's
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(words[0]), signal.SIGKILL)
