"""The Backend protocol: how one kind of scheduler is spoken to.

A backend is one file with pure ``…_command`` and ``parse_…`` functions, a table of the scheduler's states, and a thin
class over them that satisfies :class:`Backend`. It knows nothing of payloads, results, Stores or Jupyter: it is handed
a script that is already on the pool's storage, and answers in :class:`Observation` objects.

Rules that every backend keeps:

* Every method may block, and may be called from several threads: what a pool's tracker asks and what it submits, what
  a user asks for a preview, the doctor; never from a kernel's or a server's loop.
* A scheduler that cannot be reached raises :class:`~jupyter_hybrid.errors.PoolUnreachable`, never an empty answer.
* A refusal raises :class:`~jupyter_hybrid.errors.SubmitRejected` with the scheduler's own words.
* A submission that broke off half-way raises :class:`~jupyter_hybrid.errors.SubmitUnclear`; the caller then asks
  :meth:`Backend.find` before it tries again.
* A batch that the scheduler no longer knows is left out of what :meth:`Backend.query` returns: absence is no answer.
* An unknown state text maps to ``JobState.UNKNOWN`` and is logged once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..spec import Cause, JobState, Resources


@dataclass(frozen=True)
class Submission:
    """One call of the scheduler's submit command: a plain job, or one array of batches.

    Parameters
    ----------
    tag : str
        ``<job id>.<attempt>.<chunk>``: unique for ever, travels with the submission, and is what
        :meth:`Backend.find` looks for. Only ``[a-z0-9.]``.
    name : str
        The job's readable name, any text; the backend makes it fit.
    script : pathlib.Path
        Script of the submission, on the pool's storage, executable, begins with ``#!``.
    logs : pathlib.Path
        Folder for the scheduler's output files.
    first : int
        Number of the first batch.
    count : int
        Number of batches. Array index ``i`` (from 0) runs batch ``first + i``.
    array : bool
        Whether to submit an array even if `count` is 1.
    resources : Resources
        What each batch asks for.
    after : tuple of str
        Native ids that must have ended well before it starts.
    """

    tag: str
    name: str
    script: Path
    logs: Path
    first: int
    count: int
    array: bool
    resources: Resources
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observation:
    """What a scheduler says of one batch (one array element, or the plain job).

    Parameters
    ----------
    native_id : str
        Id of the submission, as :meth:`Backend.submit` returned it.
    index : int or None
        Index in the array, from 0; ``None`` for a plain job.
    state : JobState
        What the scheduler says. ``COMPLETED`` means only that it says so; the run folder decides.
    cause : Cause, optional
        Why it ended badly, as far as the scheduler can know.
    reason : str
        Why it waits, or how it ended, in the scheduler's words.
    host : str
        Node(s) it runs or ran on.
    exit_code : int, optional
        Exit status of the script; 128 + n for signal n.
    started, ended : float, optional
        Seconds since the epoch.
    cpu_seconds : float, optional
        CPU time used.
    peak_memory : int, optional
        Bytes.
    estimated_start : float, optional
        When the scheduler expects to start it, seconds since the epoch.
    restarts : int
        How often the scheduler itself has started it anew.
    """

    native_id: str
    index: int | None
    state: JobState
    cause: Cause | None = None
    reason: str = ""
    host: str = ""
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    estimated_start: float | None = None
    restarts: int = 0


@dataclass(frozen=True)
class PartitionSnapshot:
    """Capacity of one partition or queue; `time` is its walltime limit in seconds."""

    name: str
    free_cpus: int
    total_cpus: int
    nodes: int
    free_gpus: int = 0
    total_gpus: int = 0
    memory: int | None = None
    time: float | None = None
    available: bool = True
    default: bool = False


@dataclass(frozen=True)
class PoolSnapshot:
    """What a pool has at one moment.

    Memory is in bytes, `memory` that of the largest node; `max_array` is the most elements of one array.
    """

    free_cpus: int
    total_cpus: int
    nodes: int
    queued: int = 0
    running: int = 0
    free_gpus: int = 0
    total_gpus: int = 0
    memory: int | None = None
    free_memory: int | None = None
    total_memory: int | None = None
    max_array: int | None = None
    version: str = ""
    partitions: tuple[PartitionSnapshot, ...] = field(default=())


@runtime_checkable
class Backend(Protocol):
    """One kind of scheduler. See the module's rules."""

    kind: str
    index_variable: str
    """Environment variable with the array index (from 0) in a running batch, e.g. ``SLURM_ARRAY_TASK_ID``."""

    idempotent: bool
    """Whether a tag submitted twice is one submission; if not, :meth:`find` is asked before a second try."""

    def check(self, resources: Resources) -> Sequence[str]:
        """Return the names of what is asked for and has no meaning here; it is ignored. No command is run for it.

        Raises
        ------
        ResourceError
            It asks for more than there can ever be, as far as that is known without asking.
        """

    def submit(self, submission: Submission) -> str:
        """Hand one submission to the scheduler and return its native id."""

    def find(self, tags: Iterable[str]) -> Mapping[str, str]:
        """Return the native id of each tag that the scheduler knows, in whatever state."""

    def query(self, native_ids: Sequence[str]) -> Sequence[Observation]:
        """Return what the scheduler says of all batches of these submissions, in as few commands as there can be."""

    def cancel(self, native_id: str, indices: Sequence[int] | None = None) -> None:
        """Cancel a submission, or only these array indices; what has ended already is no error."""

    def hold(self, native_id: str) -> None:
        """Keep a waiting submission from starting."""

    def release(self, native_id: str) -> None:
        """Undo :meth:`hold`."""

    def snapshot(self) -> PoolSnapshot:
        """Return the pool's capacity now."""
