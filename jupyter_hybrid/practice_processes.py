"""The processes of a practice cluster: how they are found, and how they are ended.

All of them carry ``SLURM_CONF=<its slurm.conf>`` in their environment, the jobs' processes too. That, and no list of
numbers that could be stale, is how they are found after whatever has happened to the process that started them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from .errors import HybridError

_STOP_TIMEOUT = 30.0
_DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd", "slurmdbd", "mariadbd")
children: list[Popen[bytes]] = []
"""Daemons that are this process's own children, to be reaped when they have ended."""


@dataclass(frozen=True)
class Process:
    """One process of a cluster; `node` is that of a slurmd, a step daemon or a job."""

    conf: Path
    pid: int
    name: str
    node: str | None


def role(process: Process) -> str:
    """Return the name of its log and of its line in a status: the node for slurmd, else the program."""
    return process.node if process.name == "slurmd" and process.node else process.name


def _inspect(pid: int, conf: Path) -> Process | None:
    """Return what a process is if it is the cluster's: one of its daemons, or started by a job on one of its nodes."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = (entry.partition(b"=") for entry in file.read().split(b"\0"))
            variables = {key: value for key, _, value in pairs}
        node = variables.get(b"SLURMD_NODENAME")
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
        name = program.removesuffix(" (deleted)").removesuffix("-wlm")
        if name == "slurmstepd" and node is None:  # Slurm 24.11 gives the name to the job's processes only
            node = _node_of_children(pid)
        if name in _DAEMONS:
            # Slurm's daemons write their title over much of their environment, but they work in the log's folder.
            ours = variables.get(b"SLURM_CONF") == os.fsencode(conf) or os.readlink(f"/proc/{pid}/cwd") == str(
                conf.parent / "log"
            )
        else:  # without a node it is a shell or a kernel of the user, which merely talks to the cluster
            ours = node is not None and variables.get(b"SLURM_CONF") == os.fsencode(conf)
    except OSError:  # it has ended, or is another user's
        return None
    return Process(conf, pid, name, None if node is None else node.decode(errors="replace")) if ours else None


def _node_of_children(pid: int) -> bytes | None:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = file.read().split()
    for child in children:
        with contextlib.suppress(OSError), open(f"/proc/{child}/environ", "rb") as file:
            for entry in file.read().split(b"\0"):
                if entry.startswith(b"SLURMD_NODENAME="):
                    return entry.partition(b"=")[2]
    return None


def find_processes(conf: Path) -> list[Process]:
    """Return the processes of the cluster with this slurm.conf."""
    found = (_inspect(int(entry), conf) for entry in os.listdir("/proc") if entry.isdigit())
    return [process for process in found if process is not None]


def end(find: Callable[[], list[Process]], first: signal.Signals, what: str) -> None:
    """End the processes that `find` finds, and what they start meanwhile: first politely, after 5 s with SIGKILL."""
    begin = time.monotonic()
    while processes := find():
        elapsed = time.monotonic() - begin
        if elapsed > _STOP_TIMEOUT:
            left = ", ".join(f"{process.name} ({process.pid})" for process in processes)
            raise HybridError(f"could not end {what}: {left}")
        _signal_and_wait(processes, first if elapsed < 5 else signal.SIGKILL, 5.0)
    for child in children[:]:
        if child.poll() is not None:
            children.remove(child)


def end_all(conf: Path, what: str) -> None:
    """End a cluster: first what could start further jobs, then the jobs, politely, then the rest."""
    end(lambda: [p for p in find_processes(conf) if p.name in ("slurmctld", "slurmd")], signal.SIGKILL, what)
    end(lambda: [p for p in find_processes(conf) if p.name not in _DAEMONS], signal.SIGTERM, what)
    end(lambda: find_processes(conf), signal.SIGKILL, what)


def _signal_and_wait(processes: list[Process], number: signal.Signals, timeout: float) -> None:
    waiting: dict[int, int] = {}
    poll = select.poll()
    try:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process.pid)
                waiting[descriptor] = process.pid
                poll.register(descriptor, select.POLLIN)
                # The number may have gone to another process since; from here on the descriptor holds this one.
                if _inspect(process.pid, process.conf) == process:
                    signal.pidfd_send_signal(descriptor, number)
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000):
                poll.unregister(descriptor)
                del waiting[descriptor]
                os.close(descriptor)
    finally:
        for descriptor in waiting:
            os.close(descriptor)
