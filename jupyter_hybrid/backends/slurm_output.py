"""What Slurm's commands print, and what it means: job states, reasons, the formats asked for and their parsers."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from ..spec import Cause, JobState
from .base import Observation, PartitionSnapshot, PoolSnapshot

_log = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------------------- states

_P, _R, _F, _C, _U = JobState.PENDING, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED, JobState.UNKNOWN
STATES: Mapping[str, tuple[JobState, Cause | None]] = {
    "PENDING": (_P, None),
    "RUNNING": (_R, None),
    "SUSPENDED": (_R, None),
    "COMPLETED": (JobState.COMPLETED, None),
    "CANCELLED": (_C, Cause.CANCELLED),
    "FAILED": (_F, Cause.USER_ERROR),
    "TIMEOUT": (JobState.TIMEOUT, Cause.TIMEOUT),
    "DEADLINE": (JobState.TIMEOUT, Cause.TIMEOUT),
    "OUT_OF_MEMORY": (_F, Cause.OUT_OF_MEMORY),
    # A job that is requeued goes from running to PENDING in one step: where squeue shows these two, they are final.
    "NODE_FAIL": (_F, Cause.NODE_FAILURE),
    "PREEMPTED": (_F, Cause.PREEMPTED),
    "BOOT_FAIL": (_F, Cause.INFRASTRUCTURE),
    # Flags, shown in place of the state below them. Those of a failed launch say "requeued, or held": never final.
    "COMPLETING": (_R, None),
    "CONFIGURING": (_P, None),
    "POWER_UP_NODE": (_P, None),
    "RESIZING": (_R, None),
    "SIGNALING": (_R, None),
    "STAGE_OUT": (_R, None),
    "STOPPED": (_R, None),
    "UPDATE_DB": (_R, None),
    "EXPEDITING": (_P, None),
    "REQUEUED": (_P, None),
    "REQUEUE_FED": (_P, None),
    "REQUEUE_HOLD": (_P, None),
    "RESV_DEL_HOLD": (_P, None),
    "SPECIAL_EXIT": (_P, None),
    "LAUNCH_FAILED": (_U, Cause.INFRASTRUCTURE),
    "RECONFIG_FAIL": (_U, Cause.INFRASTRUCTURE),
    "REVOKED": (_U, None),  # The job runs on another cluster of the federation.
}
"""Every base state and flag of Slurm (slurm.schedmd.com/job_state_codes.html)."""

_CODES = dict(
    re.findall(
        r"(\w+)=(\w+)",
        "PD=PENDING R=RUNNING S=SUSPENDED CD=COMPLETED CA=CANCELLED F=FAILED TO=TIMEOUT DL=DEADLINE OOM=OUT_OF_MEMORY "
        "NF=NODE_FAIL PR=PREEMPTED BF=BOOT_FAIL CG=COMPLETING CF=CONFIGURING PU=POWER_UP_NODE RS=RESIZING SI=SIGNALING "
        "SO=STAGE_OUT ST=STOPPED UD=UPDATE_DB EX=EXPEDITING RQ=REQUEUED RF=REQUEUE_FED RH=REQUEUE_HOLD "
        "RD=RESV_DEL_HOLD SE=SPECIAL_EXIT LF=LAUNCH_FAILED RV=REVOKED",
    )
)
_FAILURES = {
    "BadConstraints": Cause.SUBMIT_REJECTED,
    "SystemFailure": Cause.INFRASTRUCTURE,
    "NodeDown": Cause.NODE_FAILURE,
    "OutOfMemory": Cause.OUT_OF_MEMORY,
}
_NOT_THERE = 53
_SIGNALS = {_NOT_THERE: Cause.INFRASTRUCTURE, 125: Cause.OUT_OF_MEMORY}
"""Not real signals: Slurm's own marks of an output path or directory missing on the node, and of the OOM killer."""

_GLOSSES = (
    (r"None$", "not looked at yet"),
    (r"Resources$", "waits for free nodes"),
    (r"Priority$", "jobs of higher priority come first"),
    (r"Dependency$", "waits for other jobs"),
    (r"DependencyNeverSatisfied$", "a job it waits for has failed"),
    (r"BeginTime$", "may not start yet; a requeued job waits two minutes"),
    (r"JobHeldUser$", "held by you"),
    (r"JobHeldAdmin$", "held by an administrator"),
    (r"JobArrayTaskLimit$", "enough tasks of this array run"),
    (r"Licenses$", "waits for a licence"),
    (r"PartitionTimeLimit$", "asks for more time than the partition gives: will never start"),
    (r"PartitionNodeLimit$", "asks for more nodes than the partition has: will never start"),
    (r"PartitionConfig$", "does not fit the partition: will never start"),
    (r"Partition(?:Down|Inactive)$", "the partition is closed"),
    (r"ReqNodeNotAvail.*", "nodes it needs are down, drained or reserved"),
    (r"Reserv.*", "waits for a reservation"),
    (r"QOSMaxWallDurationPerJobLimit$", "asks for more time than the QOS gives: will never start"),
    (r"(?:QOS|Assoc)\w*PerUserLimit$", "you have as much running as you may"),
    (r"QOS\w*$", "a limit of the QOS is reached"),
    (r"Assoc\w*$", "a limit of the account is reached"),
    (r"(?i:.*requeued.*held.*)", "held after a failed start; release it or cancel it"),
)
_unknown_states: set[str] = set()


def waiting_reason(reason: str) -> str:
    """Return why a job waits: Slurm's own word, and in brackets what it means."""
    gloss = next((text for pattern, text in _GLOSSES if re.match(pattern, reason)), "")
    return f"{reason} ({gloss})" if gloss else reason


def outcome(text: str, reason: str = "", exit_status: str = "") -> tuple[JobState, Cause | None, int | None]:
    """Return state, cause and exit code for what ``squeue`` or ``sacct`` says of one batch.

    Parameters
    ----------
    text : str
        The state, long or compact, also as ``CANCELLED by 1000``.
    reason : str
        Slurm's reason.
    exit_status : str
        ``code:signal``, or the status of wait(2) as a number (``squeue -O exit_code``).
    """
    word = text.split(" ")[0].rstrip("+").upper()
    word = _CODES.get(word, word)
    if word not in STATES:
        if word not in _unknown_states:
            _unknown_states.add(word)
            _log.warning("unknown Slurm job state %r: shown as UNKNOWN", text)
        return JobState.UNKNOWN, None, None
    state, cause = STATES[word]
    code, signal = _exit(exit_status)
    if state is JobState.FAILED and cause is Cause.USER_ERROR:
        cause = _SIGNALS.get(signal) or _FAILURES.get(reason) or cause
    elif state is JobState.CANCELLED and reason == "DependencyNeverSatisfied":
        cause = Cause.DEPENDENCY_FAILED
    if state is not JobState.COMPLETED and cause is not Cause.USER_ERROR:
        return state, cause, None
    return state, cause, 128 + signal if signal else code


def _ended(word: str, reason: str, exit_status: str) -> str:
    text = word if reason in ("", "None") else f"{word}, {reason}"
    if _exit(exit_status)[1] == _NOT_THERE:
        text += " (the node could not enter the run folder or write its log: does it see the storage?)"
    return text


def _exit(text: str) -> tuple[int, int]:
    if re.fullmatch(r"\d+:\d+", text):
        code, signal = text.split(":")
        return int(code), int(signal)
    status = int(text) if re.fullmatch(r"\d+", text) else 0
    return status >> 8 & 0xFF if not status & 0x7F else 0, status & 0x7F


def _epoch(text: str) -> float | None:
    if text.isdecimal():
        return float(text) or None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None  # N/A, None, NONE, Unknown


def _seconds(text: str) -> float | None:
    """Return seconds for ``[days-][[hours:]minutes:]seconds[.fraction]``; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", text)
    return int(float(match[1]) * 1024 ** " KMGTP".index(match[2] or " ")) or None if match else None


# -------------------------------------------------------------------------------------------------------------- parsing


def _columns(names: str) -> str:
    # No width after the colon: a field is as long as its value. Without the colon it would be cut at 20 characters.
    return ",".join(f"{name}:|" for name in names.split(","))


SQUEUE_FORMAT = _columns("ArrayJobID,ArrayTaskID,State,exit_code,RestartCnt,StartTime,EndTime,NodeList,Reason")
"""``-O``, since ``-o`` has neither exit status nor restarts. The job's name is left out: it may hold anything."""
SACCT_FORMAT = "JobID,State,ExitCode,Start,End,NodeList,TotalCPU,MaxRSS,AllocTRES,Reason"
"""``AllocTRES`` for the memory: ``ReqMem`` is nonsense ("16?") in the first moments after a job's end."""
SINFO_FORMAT = _columns("NodeList,Partition,Available,Time,StateLong,CPUsState,Memory,Gres,GresUsed,AllocMem")

_Key = tuple[str, "int | None"]


def elements(text: str) -> list[int | None]:
    """Return the array indices of ``"0-3,7,10-20:2%5"``; a plain job's ``"N/A"`` is one ``None``."""
    indices: list[int | None] = []
    for word in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7})(?::([1-9]\d{0,6}))?)?", word)
        if match:
            indices += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    return indices or [None]


def parse_squeue(text: str) -> list[Observation]:
    """Parse ``squeue -h -O SQUEUE_FORMAT``; the ids are those of the array or plain job, without its cluster.

    The waiting elements of an array are one line. ``squeue -r`` would give them one by one, but Slurm 22.05 leaves the
    last one out where they have a stride (``1-999:2``).
    """
    seen = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|", 8)]
        if len(fields) < 9 or not fields[0].isdecimal():
            continue
        number, tasks, word, status, restarts, start, end, host = fields[:8]
        reason = fields[8].rstrip("|").strip()
        state, cause, code = outcome(word, reason, status)
        said = "" if reason == "None" else reason
        if word == "PENDING":
            said = waiting_reason(reason)
        elif word != "RUNNING":
            said = _ended(word, reason, status)
        observation = Observation(
            native_id=number,
            index=None,
            state=state,
            cause=cause,
            reason=said,
            host=host,
            exit_code=code,
            # A job cancelled while it waited shows that moment as its start, too: only a node proves a start.
            started=_epoch(start) if host else None,
            ended=_epoch(end) if state.final else None,
            estimated_start=_epoch(start) if state is JobState.PENDING else None,
            restarts=int(restarts) if restarts.isdecimal() else 0,
        )
        seen += [replace(observation, index=index) for index in elements(tasks)]
    return seen


def parse_sacct(text: str) -> dict[_Key, Observation]:
    """Parse ``sacct -D -n -P --format=SACCT_FORMAT`` with its steps: the last record of each batch.

    ``-D`` shows every run of a requeued job, in order. What the steps add: peak memory, and an OOM kill that the job's
    own state does not tell, be it the step's state or a peak above the job's memory.
    """
    seen: dict[_Key, Observation] = {}
    limits: dict[_Key, int | None] = {}
    for line in text.splitlines():
        fields = line.split("|")
        match = re.fullmatch(r"(\d+)(?:_(\d+))?(\..+)?", fields[0])
        if match is None or len(fields) < 10:
            continue  # Waiting elements of an array are one record, "12_[3-9]"; squeue lists them one by one.
        key = match[1], int(match[2]) if match[2] else None
        word, status, start, end, nodes, cpu, memory, tres, reason = fields[1:10]
        known = seen.get(key)
        if match[3]:
            if known is not None:
                peak = max(known.peak_memory or 0, _bytes(memory) or 0) or None
                oom = word.startswith("OUT_OF_ME") or (peak or 0) > (limits[key] or math.inf)
                cause = Cause.OUT_OF_MEMORY if oom and known.cause is Cause.USER_ERROR else known.cause
                seen[key] = replace(known, peak_memory=peak, cause=cause)
            continue
        state, cause, code = outcome(word, reason, status)
        ran = nodes != "None assigned"
        if word == "CANCELLED" and not ran:
            cause = Cause.DEPENDENCY_FAILED  # A person's scancel says "by <uid>"; this is --kill-on-invalid-dep.
        elif cause is Cause.USER_ERROR and not ran:
            cause, code = Cause.SUBMIT_REJECTED, None  # What a refused sbatch leaves behind.
        granted = re.search(r"(?:^|,)mem=([^,]+)", tres)
        limits[key] = _bytes(granted[1]) if granted else None
        seen[key] = Observation(
            native_id=key[0],
            index=key[1],
            state=state,
            cause=cause,
            reason=_ended(word, reason, status),
            host=nodes if ran else "",
            exit_code=code,
            started=_epoch(start) if ran else None,
            ended=_epoch(end) if state.final else None,
            cpu_seconds=_seconds(cpu) if ran else None,
            restarts=known.restarts + 1 if known else 0,
        )
    return seen


def parse_names(text: str, tags: Iterable[str], local: str = "") -> dict[str, str]:
    """Return the id of each tag, from lines of ``id|state|what|name`` with the reason or the nodes as third.

    A cluster in front of the id becomes part of it (``id;cluster``), unless it is the local one. A refused ``sbatch``
    may leave a FAILED record that never started. It is no submission.
    """
    wanted = set(tags)
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(?:([\w-]*)\|)?(\d+)[^|]*\|([^|]*)\|([^|]*)\|(.*)", line)
        if match is None or (match[3] == "FAILED" and match[4] in ("BadConstraints", "None assigned")):
            continue
        tag = ".".join(match[5].split(".")[-3:])
        if tag in wanted:
            away = match[1] if match[1] != local else ""
            found.setdefault(tag, f"{match[2]};{away}" if away else match[2])
    return found


def parse_config(text: str) -> dict[str, str]:
    """Parse ``scontrol show config``."""
    return {m[1]: m[2].strip() for m in re.finditer(r"^(\w+)[ \t]*=(.*)$", text, re.MULTILINE)}


_USABLE = frozenset({"idle", "mixed", "allocated", "completing", "planned"})


def _gpus(gres: str) -> int:
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu:(?:[^:,()]+:)?(\d+)", gres))


@dataclass(frozen=True)
class _Node:
    free_cpus: int
    cpus: int
    free_gpus: int
    gpus: int
    memory: int
    free_memory: int


def _total(nodes: Sequence[_Node]) -> _Node:
    return _Node(
        free_cpus=sum(node.free_cpus for node in nodes),
        cpus=sum(node.cpus for node in nodes),
        free_gpus=sum(node.free_gpus for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        memory=max((node.memory for node in nodes), default=0),
        free_memory=sum(node.free_memory for node in nodes),
    )


def parse_sinfo(text: str) -> PoolSnapshot:
    """Parse ``sinfo -h -N -O SINFO_FORMAT``: a line for each node in each partition; a node counts once in the total.

    Nothing is free on a node that is down, drained, reserved or silent, or in a closed partition.
    """
    nodes: dict[str, _Node] = {}
    members: dict[str, list[_Node]] = {}
    shown: dict[str, tuple[bool, float | None, bool]] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) < 9 or fields[5].count("/") != 3:
            continue
        name, partition, availability, limit, state, cpus, memory, gres, used = fields[:9]
        allocated = fields[9] if fields[9:] else ""
        available = availability == "up"
        usable = available and state.rstrip("~#+-") in _USABLE
        _, idle, _, total = (int(count) for count in cpus.split("/"))
        node = _Node(
            free_cpus=idle if usable else 0,
            cpus=total,
            free_gpus=max(0, _gpus(gres) - _gpus(used)) if usable else 0,
            gpus=_gpus(gres),
            memory=int(memory.rstrip("+")) * 2**20,
            free_memory=(int(memory.rstrip("+")) - int(allocated or 0)) * 2**20 if usable else 0,
        )
        if name not in nodes or usable:
            nodes[name] = node
        members.setdefault(partition.rstrip("*"), []).append(node)
        shown[partition.rstrip("*")] = available, _seconds(limit), partition.endswith("*")
    partitions = []
    for partition, inside in members.items():
        part, (available, time, default) = _total(inside), shown[partition]
        partitions.append(
            PartitionSnapshot(
                name=partition,
                free_cpus=part.free_cpus,
                total_cpus=part.cpus,
                nodes=len(inside),
                free_gpus=part.free_gpus,
                total_gpus=part.gpus,
                memory=part.memory or None,
                time=time,
                available=available,
                default=default,
            )
        )
    whole = _total(list(nodes.values()))
    return PoolSnapshot(
        free_cpus=whole.free_cpus,
        total_cpus=whole.cpus,
        nodes=len(nodes),
        free_gpus=whole.free_gpus,
        total_gpus=whole.gpus,
        memory=whole.memory or None,
        free_memory=whole.free_memory,
        total_memory=sum(node.memory for node in nodes.values()),
        partitions=tuple(partitions),
    )
