"""Jobs as plain data: states, causes, resources with real units, the specification of a job."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from enum import Enum
from typing import Any

from .errors import ResourceError, near_match

SCHEMA = 1
"""Version of every JSON file of a run folder."""


class JobState(str, Enum):
    """State of a job, a task or a batch."""

    NEW = "NEW"
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    UNKNOWN = "UNKNOWN"

    @property
    def final(self) -> bool:
        """Whether nothing further can happen without a retry; UNKNOWN never is final."""
        return self in _FINAL

    def __str__(self) -> str:
        return self.value


_FINAL = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.TIMEOUT})


class Cause(str, Enum):
    """Why a job ended badly."""

    USER_ERROR = "USER_ERROR"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    TIMEOUT = "TIMEOUT"
    NODE_FAILURE = "NODE_FAILURE"
    PREEMPTED = "PREEMPTED"
    CANCELLED = "CANCELLED"
    DEPENDENCY_FAILED = "DEPENDENCY_FAILED"
    SUBMIT_REJECTED = "SUBMIT_REJECTED"
    RESULT_LOST = "RESULT_LOST"
    INFRASTRUCTURE = "INFRASTRUCTURE"

    def __str__(self) -> str:
        return self.value


_MEMORY = re.compile(r"\s*(\d{1,30})(?:\.(\d{1,30}))?\s*(?:([KMGTP])(?:i?B)?|B)?\s*", re.IGNORECASE | re.ASCII)
_TIME_UNITS = {
    unit: seconds
    for units, seconds in (
        ("ms", 0.001),
        ("s sec secs second seconds", 1),
        ("m min mins minute minutes", 60),
        ("h hr hrs hour hours", 3600),
        ("d day days", 86400),
        ("w week weeks", 604800),
    )
    for unit in units.split()
}
_TIME_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")


def parse_memory(value: str | int | float) -> int:
    """Return bytes for ``"8G"``, ``"512 MiB"``, ``"1.5T"``, or a plain number of bytes.

    Units are powers of 1024, as in Slurm, PBS and HTCondor.

    Raises
    ------
    ResourceError
        The text is no positive amount of memory.
    """
    if isinstance(value, bool):
        raise ResourceError(f"memory {value!r} is not an amount; write it like 8G or 512M")
    if isinstance(value, str):
        match = _MEMORY.fullmatch(value)
        if match is None:
            raise ResourceError(f"memory {value!r} is not an amount; write it like 8G, 512M or 1.5T (K, M, G, T, P)")
        whole, part, prefix = match[1], match[2] or "", (match[3] or "").upper()
        unit: int = 1024 ** (" KMGTP".index(prefix) if prefix else 0)
        scale: int = 10 ** len(part)
        amount = int(whole + part) * unit // scale  # integers: a float is inexact beyond 8 PB
    else:
        try:
            amount = int(value)
        except (TypeError, ValueError, OverflowError):
            raise ResourceError(f"memory {value!r} is not an amount; write it like 8G or 512M") from None
    if amount <= 0:
        raise ResourceError(f"memory {value!r} must be more than zero")
    return amount


def format_memory(amount: int) -> str:
    """Return bytes as the shortest exact text that :func:`parse_memory` reads back (``"8G"``)."""
    for power, unit in ((5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if amount % 1024**power == 0:
            return f"{amount // 1024**power}{unit}"
    return str(amount)


def round_memory(amount: int) -> str:
    """Return bytes as a person says them, rounded down to a tenth: ``"23.5G"``; what is there is never said to be more.

    :func:`parse_memory` reads it back.
    """
    for power, unit in ((5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if amount >= 1024**power:
            return f"{10 * amount // 1024**power / 10:g}{unit}"
    return str(amount)


def parse_time(value: str | int | float | timedelta) -> timedelta:
    """Return a duration for ``"90min"``, ``"1h30m"``, ``"1:30:00"``, ``"2-00:00:00"`` or seconds.

    Two clock fields are hours and minutes after a day count (``1-12:00``) and minutes and seconds otherwise,
    as in Slurm; a bare number is seconds.

    Raises
    ------
    ResourceError
        The text is no positive duration.
    """
    if isinstance(value, bool):
        raise ResourceError(f"time {value!r} is not a duration; write it like 1h, 90min or 1:30:00")
    try:
        if isinstance(value, timedelta):
            duration = value
        elif isinstance(value, str):
            duration = _parse_time_text(value)
        else:
            duration = timedelta(seconds=float(value))
    except OverflowError:
        raise ResourceError(f"time {value!r} is too long") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(f"time {value!r} is not a duration; write it like 1h, 90min or 1:30:00") from None
    if duration <= timedelta(0):
        raise ResourceError(f"time {value!r} must be more than zero")
    return duration


def _parse_time_text(text: str) -> timedelta:
    wrong = ResourceError(f"time {text!r} is not a duration; write it like 90s, 30min, 1h30m, 1:30:00 or 2-00:00:00")
    stripped = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", stripped):
        return timedelta(seconds=float(stripped))
    clock = _CLOCK.fullmatch(stripped)
    if clock is not None:
        days, first, second, third = (int(part) if part is not None else None for part in clock.groups())
        if (second or 0) > 59 or (third or 0) > 59:
            raise wrong
        if days is not None:
            return timedelta(days=days, hours=first or 0, minutes=second or 0, seconds=third or 0)
        if third is not None:
            return timedelta(hours=first or 0, minutes=second or 0, seconds=third)
        return timedelta(minutes=first or 0, seconds=second or 0)
    seconds, position = 0.0, 0
    for part in _TIME_PART.finditer(stripped):
        unit = part[2].lower()
        if part.start() != position or unit not in _TIME_UNITS:
            raise wrong
        seconds += float(part[1]) * _TIME_UNITS[unit]
        position = part.end()
        while position < len(stripped) and stripped[position] in " ,":
            position += 1
    if position != len(stripped) or not stripped:
        raise wrong
    return timedelta(seconds=seconds)


def format_time(duration: timedelta) -> str:
    """Return a duration as ``D-HH:MM:SS`` or ``HH:MM:SS``, rounded up to a second."""
    total = -(-duration // timedelta(seconds=1))
    days, rest = divmod(total, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


RESOURCE_ALIASES = {"cpus_per_task": "cpus", "gpus_per_node": "gpus"}
"""Longer names by which two of the resources are also known."""


@dataclass(frozen=True)
class Resources:
    """What one batch of a job asks of its pool. ``None`` leaves the pool's or the site's default.

    Parameters
    ----------
    nodes : int
        Number of nodes.
    tasks_per_node : int
        Processes the scheduler starts on a node (MPI ranks).
    cpus : int
        CPU cores of each such process.
    gpus : int
        GPUs on each node.
    memory : int, optional
        Memory of each node, in bytes.
    time : datetime.timedelta, optional
        Walltime after which the scheduler ends the batch.
    partition, qos, account, constraint : str, optional
        The scheduler's own words, passed as they are (``partition`` is the queue in PBS).
    priority : int
        Larger starts earlier, among one's own jobs.
    extra : mapping of str to str or None
        Anything else the site has: ``{"reservation": "course"}`` becomes ``--reservation=course``;
        ``None`` is a bare flag.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    cpus: int = 1
    gpus: int = 0
    memory: int | None = None
    time: timedelta | None = None
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    priority: int = 0
    extra: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, base: Resources | None = None, /, **given: Any) -> Resources:
        """Return `base` (or the defaults) with what was given, from text or numbers; ``None`` means not given.

        ``cpus_per_task`` and ``gpus_per_node`` are accepted for ``cpus`` and ``gpus``.

        Raises
        ------
        ResourceError
            An unknown name (with the near match) or a value that does not fit.
        """
        known = [f.name for f in fields(cls)]
        values: dict[str, Any] = {}
        for given_name, value in given.items():
            name = RESOURCE_ALIASES.get(given_name, given_name)
            if name not in known:
                raise ResourceError(
                    f"unknown resource {given_name!r}{near_match(given_name, known)} "
                    f"(known: {', '.join(known)}; anything else of the site goes into extra=)"
                )
            if value is not None and name in values:
                raise ResourceError(f"{name} is given twice, once by its longer name")
            if value is not None:
                values[name] = _parse_field(name, value, base)
        return replace(base or cls(), **values)

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON mapping: memory in bytes, time in seconds."""
        data = asdict(replace(self, extra={}))
        data["extra"] = dict(self.extra)
        data["time"] = self.time.total_seconds() if self.time is not None else None
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Resources:
        """Return what :meth:`to_json` wrote; fields of later versions are ignored."""
        return cls.parse(**{f.name: data.get(f.name) for f in fields(cls)})

    @property
    def total_cpus(self) -> int:
        """CPU cores of one batch over all its nodes."""
        return self.nodes * self.tasks_per_node * self.cpus


_MINIMUM = {"nodes": 1, "tasks_per_node": 1, "cpus": 1, "gpus": 0}


def _parse_field(name: str, value: Any, base: Resources | None) -> Any:
    if name == "memory":
        amount = parse_memory(value)
        if amount < 1 << 20:
            raise ResourceError(f"memory {value!r} is only {amount} bytes; give a unit, like {value}G or {value}M")
        return amount
    if name == "time":
        return parse_time(value)
    if name == "extra":
        if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
            raise ResourceError(f"extra {value!r} must be a mapping of option names to values")
        return {**(base.extra if base else {}), **{key: None if v is None else str(v) for key, v in value.items()}}
    if name in _MINIMUM or name == "priority":
        try:
            number = int(value) if not isinstance(value, (bool, float)) else None
        except (TypeError, ValueError):
            number = None
        low = _MINIMUM.get(name)
        if number is None or (low is not None and number < low):
            bound = f" of at least {low}" if low is not None else ""
            raise ResourceError(f"{name} {value!r} is not a whole number{bound}")
        return number
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if not text or any(character in text for character in "\n\r\0"):
        raise ResourceError(
            f"{name} {value!r} is not a word of the scheduler: it is no text, empty or has a line break"
        )
    return text


_ID_LETTERS = "abcdefghjkmnpqrstvwxyz"
_ID_ALPHABET = "0123456789" + _ID_LETTERS
ID_PATTERN = re.compile(rf"[{_ID_LETTERS}][{_ID_ALPHABET}]{{9}}")
"""A job id: fit for a folder, a Slurm name and a Kubernetes name alike."""


def new_id() -> str:
    """Return a new random job id: 10 letters and digits, about 49 bits."""
    random = int.from_bytes(os.urandom(8), "big")
    text = _ID_LETTERS[random % len(_ID_LETTERS)]
    random //= len(_ID_LETTERS)
    for _ in range(9):
        random, digit = divmod(random, len(_ID_ALPHABET))
        text += _ID_ALPHABET[digit]
    return text


@dataclass(frozen=True)
class JobSpec:
    """The intent of one job, written to its run folder before any scheduler hears of it.

    Parameters
    ----------
    id : str
        The job's own id, see :func:`new_id`.
    name : str
        What a person reads; any text.
    pool : str
        Name of the pool.
    kind : {"function", "cell", "script"}
        What the payload is.
    tasks : int
        Number of tasks; 1 for a plain job.
    array : bool
        Whether it is an ArrayJob (which may have a single task).
    batch : int
        Tasks in a batch; 0 is "auto": batches pull tasks as they get free.
    resources : Resources
        What each batch asks for.
    created : float
        Seconds since the epoch.
    after : tuple of str
        Ids of the jobs that must complete first.
    out : tuple of str
        Names that the cell gives back.
    origin : mapping
        Where it came from: notebook path, cell id, user, host, directory.
    keys : mapping of str to str
        Fingerprints of the parts that decide a cached result.
    versions : mapping of str to str
        Python and package versions of the submitting kernel.
    settings : mapping
        What the worker needs: python, prologue, environment, container, working directory.
    """

    id: str
    name: str
    pool: str
    kind: str
    tasks: int
    array: bool
    batch: int
    resources: Resources
    created: float
    after: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON mapping with the schema version."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data.update(
            schema=SCHEMA,
            resources=self.resources.to_json(),
            after=list(self.after),
            out=list(self.out),
            origin=dict(self.origin),
            keys=dict(self.keys),
            versions=dict(self.versions),
            settings=dict(self.settings),
        )
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobSpec:
        """Return what :meth:`to_json` wrote; fields of later versions are ignored."""
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        values["resources"] = Resources.from_json(data["resources"])
        for name in ("after", "out"):
            values[name] = tuple(data.get(name, ()))
        return cls(**values)
