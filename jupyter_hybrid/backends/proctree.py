"""Which processes belong to a job of the local pool, what they use, and how to end all of them.

A process belongs to a job if it carries the job's mark in its environment, is in the session of the job's shim, or has
a parent that belongs to it. So a child that made a process group or a session of its own, or whose parent has gone, is
still found. Linux only: everything is read from ``/proc``, see proc(5).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MARK = "HYBRID_LOCAL_RUN"
"""Environment variable that marks the processes of a job; whoever sets it to something else leaves the job."""

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """One line of ``/proc/PID/stat``: times in clock ticks (start since boot), `rss` in pages."""

    pid: int
    parent: int
    session: int
    start: int
    cpu: int
    rss: int


def processes() -> list[Process]:
    """Return all live user processes, oldest first."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        text = _read(f"/proc/{name}/stat")
        fields = text[text.rfind(b")") + 2 :].split()
        # Session 0 is the kernel's own threads (and a container's init); zombies and the dead hold nothing.
        if len(fields) < 22 or fields[3] == b"0" or fields[0] in b"ZXx":
            continue
        cpu = int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])
        found.append(Process(int(name), int(fields[1]), int(fields[3]), int(fields[19]), cpu, int(fields[21])))
    found.sort(key=lambda process: (process.start, process.pid))
    return found


def boot_ticks() -> int:
    """Return now in the unit of :attr:`Process.start`."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS)


def mark_of(pid: int) -> str | None:
    """Return the mark in the environment that a process was started with; ``None`` if it has none."""
    for entry in _read(f"/proc/{pid}/environ").split(b"\0"):
        if entry.startswith(MARK.encode() + b"="):
            return os.fsdecode(entry[len(MARK) + 1 :])
    return None


class Census:
    """Repeated look at the processes of many jobs; the environment of each process is read once."""

    def __init__(self) -> None:
        self._marks: dict[tuple[int, int], str | None] = {}

    def take(self, shims: Mapping[int, tuple[str, int | None]]) -> dict[str, list[Process]]:
        """Return the processes of each job by its mark, the shims themselves left out.

        Parameters
        ----------
        shims : mapping of int to (str, int or None)
            Process id of each shim: its job's mark, and when it was seen to have ended (boot ticks). What started
            later in a session of that number is somebody else's, for process ids are used again.
        """
        marks: dict[tuple[int, int], str | None] = {}
        owners: dict[int, str] = {}
        members: dict[str, list[Process]] = {}
        me = os.getpid()
        for process in processes():
            identity = (process.pid, process.start)
            mark = self._marks[identity] if identity in self._marks else mark_of(process.pid)
            marks[identity] = mark
            if mark is None:
                mark, ended = shims.get(process.session, (None, None))
                if mark is None or (ended is not None and process.start > ended):
                    mark = owners.get(process.parent)
            if not mark or process.pid == me:
                continue
            owners[process.pid] = mark
            shim = shims.get(process.pid)
            if shim is None or shim[1] is not None:
                members.setdefault(mark, []).append(process)
        self._marks = marks
        return members


def send(number: int, members: Iterable[Process], mark: str) -> None:
    """Send a signal to the processes of one job.

    Each is looked at once more: what was seen between its fork and its exec may have left the job since.
    """
    for process in members:
        text = _read(f"/proc/{process.pid}/stat")
        fields = text[text.rfind(b")") + 2 :].split()
        if len(fields) > 19 and int(fields[19]) == process.start and mark_of(process.pid) in (None, mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler of its own for a signal."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def memory(members: Iterable[Process], above: int) -> int:
    """Return the bytes that processes hold; only if resident pages are more than `above` the exact figure.

    Exact is their share of anonymous and shared memory: pages shared by forked workers count once, mapped files, which
    the kernel can drop at any time, not at all.
    """
    members = list(members)
    resident = sum(process.rss for process in members) * PAGE
    return resident if resident <= above else sum(_share(process) for process in members)


def _share(process: Process) -> int:
    amounts = {}
    for line in _read(f"/proc/{process.pid}/smaps_rollup").splitlines():
        name, _, value = line.partition(b":")
        if name in (b"Pss_Anon", b"Pss_Shmem"):
            amounts[name] = int(value.split()[0]) * 1024
    return sum(amounts.values()) if amounts else process.rss * PAGE


def oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since boot."""
    for line in _read("/proc/vmstat").splitlines():
        if line.startswith(b"oom_kill "):
            return int(line.split()[1])
    return 0


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""
