"""A scheduler whose commands hang slows nothing but what needs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.server.threads import Busy, Threads

COMMANDS = ("squeue", "sinfo", "scontrol", "sbatch", "scancel", "sacct")
HANGING = """\
#!/bin/sh
echo "$$" >> {folder}/asked
exec sleep 1000
"""


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: Callable[[str], Path]) -> Iterator[Path]:
    """A pool of Slurm whose commands never answer, beside the local one; returns the file with who was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(HANGING.format(folder=folder))
        (folder / name).chmod(0o755)
    path = f"{folder}:/usr/bin:/bin"
    pools(f"default: here\npools:\n  here: {{kind: local}}\n  hpc:\n    kind: slurm\n    env: {{PATH: '{path}'}}\n")
    yield folder / "asked"
    for name in COMMANDS:
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
    for line in (folder / "asked").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line), signal.SIGKILL)


async def test_everything_else_goes_on(api: Any, hanging: Path) -> None:
    waiting = hy.Executor("hpc").submit(pow, 2, 3)
    begun = time.monotonic()
    pools = (await api("pools"))["pools"]  # and so both are asked for their capacity
    assert {pool["name"]: pool["cpus_total"] is not None for pool in pools} == {"here": True, "hpc": False}

    async def asked() -> bool:
        return hanging.exists()

    await api.until(asked, "a command that hangs")
    job = hy.Executor("here").submit(pow, 2, 10)
    assert (await api.ended(job.id))["state"] == "COMPLETED"
    row = await api(f"jobs/{waiting.id}")
    assert row["state"] == "NEW"
    slowest = 0.0
    for _ in range(20):
        for path in (
            "health",
            "pools",
            "jobs",
            f"jobs/{job.id}",
            f"jobs/{waiting.id}",
            "checkpoints",
        ):
            start = time.monotonic()
            await api(path)
            slowest = max(slowest, time.monotonic() - start)
    assert slowest < 20.0  # a command is given a minute; each of these would have waited for it
    assert (await api(f"jobs/{waiting.id}/cancel", method="POST"))["job"]["reason"] == "being cancelled"
    # All of this while the very first command still hangs.
    pids = [int(line) for line in hanging.read_text().split()]
    if time.monotonic() - begun < 20.0:
        assert Path(f"/proc/{pids[0]}").exists()


async def test_a_concern_that_hangs_is_told_and_does_not_pile_up() -> None:
    import threading

    gate, threads = threading.Event(), Threads("the thing", 2, 0.05)
    try:
        with pytest.raises(Busy, match="the thing has not answered within"):
            await threads(gate.wait)
        calls = [asyncio.ensure_future(threads(gate.wait)) for _ in range(150)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, Busy) for answer in answers)
        assert any("requests wait for it" in str(answer) for answer in answers)
        gate.set()
        threads.seconds = 60.0

        while threads.waiting:  # what nobody waits for any more is passed over
            await asyncio.sleep(0.01)
        assert await threads(len, "abc") == 3
    finally:
        gate.set()
        threads.stop(60)
    assert not [thread for thread in threading.enumerate() if thread.name == "hybrid-server the thing"]


async def test_an_exception_in_a_thread_reaches_who_waits() -> None:
    threads = Threads("the thing", 1, 60.0)
    try:
        with pytest.raises(ZeroDivisionError):
            await threads(lambda: 1 / 0)
        with pytest.raises(TimeoutError, match="its own"):
            await threads(_raise, TimeoutError("its own"))
    finally:
        threads.stop(60)


def _raise(error: Exception) -> None:
    raise error
