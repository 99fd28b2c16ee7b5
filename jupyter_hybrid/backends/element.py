"""One running element of the local pool, and how it ended."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ..spec import Cause, JobState
from . import proctree
from .slots import Request


@dataclass(eq=False)
class Element:
    """One running array element, or plain job.

    `file` is where its shim writes, and the mark of its processes. `clock` is its monotonic start: neither a jump of
    the wall clock nor a suspended laptop uses up walltime. `ending` is why it is made to end, `signalled` whether it
    was told so; `watch` is a descriptor that becomes readable when the shim ends.
    """

    request: Request
    index: int
    file: str
    clock: float
    boot: str
    oom: int
    devices: list[int]
    ending: Cause | None = None
    signalled: bool = False
    reason: str = ""
    pid: int | None = None
    watch: int | None = None
    child: subprocess.Popen[bytes] | None = None
    kill_at: float | None = None
    warned: bool = False
    ended: bool = False
    cpu: float = 0.0
    peak: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Native id and index."""
        return self.request.native_id, self.index


@dataclass(frozen=True)
class Outcome:
    """How an element ended."""

    state: JobState
    cause: Cause | None
    reason: str
    exit_code: int | None = None

    def values(self, ended: float) -> dict[str, object]:
        """Return the columns of the database that tell it."""
        return {
            "state": self.state.value,
            "cause": self.cause.value if self.cause else None,
            "reason": self.reason,
            "exit_code": self.exit_code,
            "ended": ended,
        }


def outcome_of(element: Element, words: Mapping[str, int], boot: str) -> Outcome | None:
    """Return how an element whose shim is gone has ended, from the words of the shim; ``None`` if it never started."""
    code = words.get("exit")
    if element.ending is not None and (element.signalled or "start" not in words):
        states = {Cause.TIMEOUT: JobState.TIMEOUT, Cause.CANCELLED: JobState.CANCELLED}
        reason = element.reason or "cancelled by its user"
        return Outcome(states.get(element.ending, JobState.FAILED), element.ending, reason, code)
    if code == 0:
        return Outcome(JobState.COMPLETED, None, "", 0)
    if code is None and element.boot != boot:
        return Outcome(JobState.FAILED, Cause.NODE_FAILURE, "the machine was restarted while it ran")
    if "start" not in words:
        return None
    if code in (128 + signal.SIGKILL, None) and proctree.oom_kills() > element.oom:
        return Outcome(JobState.FAILED, Cause.OUT_OF_MEMORY, "killed while the machine was out of memory", code)
    if code is None:
        return Outcome(JobState.FAILED, Cause.INFRASTRUCTURE, "killed from outside together with its shim")
    return Outcome(JobState.FAILED, None, f"exit status {code}", code)
