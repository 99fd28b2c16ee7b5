"""Lists of jobs: what is asked for, pages by a cursor, rows as JSON has them."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ..errors import HybridError
from ..pool import default_store
from ..results import ADVICE
from ..spec import JobState
from ..store import JobRow
from .pools import Pools

_CELL = re.compile(r"cell:([0-9a-f]{8}(?:-[0-9a-f]{4}){0,3}(?:-[0-9a-f]{12})?)")
_HELD = re.compile(r"\bheld\b")  # "held by its user", "JobHeldUser (held by you)"
_NUMBER = 2**53
_ORDERS = {"created": "created", "name": "name", "state": "state"}
_KEPT = 64
MOST = 1000
"""Rows of a page."""


class BadRequest(HybridError):
    """A parameter of a request is wrong."""


def integer(arguments: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """Return a whole number from the arguments of a request."""
    text = arguments.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,16}", text) or not low <= int(text) <= high:
        raise BadRequest(f"{name}={text[:40]!r} is no whole number from {low} to {high}")
    return int(text)


def _moment(arguments: Mapping[str, str], name: str) -> float | None:
    text = arguments.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadRequest(f"{name}={text[:40]!r} is no time in seconds since the epoch")
    return value


def _states(text: str | None) -> list[JobState]:
    words = [word.strip().upper() for word in (text or "").split(",") if word.strip()]
    try:
        return list(dict.fromkeys(JobState(word) for word in words))
    except ValueError:
        known = ", ".join(state.value for state in JobState)
        raise BadRequest(f"state={(text or '')[:80]!r}: states are {known}") from None


def cursor(order: str, value: float | str, job_id: str) -> str:
    """Return what a client sends back to get the next page."""
    return base64.urlsafe_b64encode(json.dumps([order, value, job_id]).encode()).decode()


def _beyond(text: str | None, order: str) -> tuple[float | str, str] | None:
    if text is None:
        return None
    try:
        of, value, job_id = json.loads(base64.urlsafe_b64decode(text.encode()))
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _NUMBER
        good = of == order and isinstance(job_id, str) and (number or isinstance(value, str))
        good = good and number is (order.lstrip("-") in ("created", "seq"))
    except (ValueError, TypeError, UnicodeError, RecursionError):
        good = False
    if not good:
        raise BadRequest("this cursor is of another list; begin without one")
    return value, job_id


class Rows:
    """Answers questions for lists of jobs; all methods may be called from any thread."""

    def __init__(self, pools: Pools, root: str = "") -> None:
        self._pools = pools
        self._roots = [each.rstrip("/") + "/" for each in dict.fromkeys((root, os.path.realpath(root))) if root]
        self._counts: OrderedDict[Any, tuple[int, float, dict[JobState, int]]] = OrderedDict()

    def list(self, arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return a page of jobs, and how many there are in each state, as the arguments of a request ask."""
        order = arguments.get("sort", "-created")
        if order.lstrip("-") not in _ORDERS or order.startswith("--"):
            raise BadRequest(f"sort={order[:40]!r}: sort by {', '.join(_ORDERS)}, with - before it the other way round")
        states = _states(arguments.get("state"))
        chosen: dict[str, Any] = {
            "pool": arguments.get("pool"),
            "name": arguments.get("name"),
            "notebook": arguments.get("notebook"),
            "since": _moment(arguments, "after"),
            "until": _moment(arguments, "before"),
        }
        limit = integer(arguments, "limit", 100, 1, MOST)
        beyond = _beyond(arguments.get("cursor"), order)
        store = default_store()
        seq = store.sequence()  # first: what changes meanwhile is told as a change after it
        column = _ORDERS[order.lstrip("-")]
        rows = store.page(
            order=column, descending=order.startswith("-"), beyond=beyond, limit=limit + 1, states=states, **chosen
        )
        following = None
        if len(rows) > limit:
            rows = rows[:limit]
            following = cursor(order, getattr(rows[-1], column), rows[-1].id)
        counts = self._count(seq, chosen)
        total = sum(number for state, number in counts.items() if not states or state in states)
        return {
            "jobs": [self.json(row) for row in rows],
            "next": following,
            "total": total,
            "counts": {state.value: number for state, number in counts.items()},
            "seq": seq,
        }

    def changed(self, since: int, limit: int, text: str | None) -> dict[str, Any]:
        """Return a page of the jobs changed after a sequence number, in the order of their changes."""
        store = default_store()
        seq = store.sequence()
        beyond = _beyond(text, "seq") or (since, "{")  # "{" comes after every id
        rows = store.page(order="seq", descending=False, beyond=beyond, limit=limit + 1)
        following = None
        if len(rows) > limit:
            rows = rows[:limit]
            following = cursor("seq", rows[-1].seq, rows[-1].id)
        counts = self._count(seq, {})
        return {
            "jobs": [self.json(row) for row in rows],
            "next": following,
            "total": sum(counts.values()),
            "counts": {state.value: number for state, number in counts.items()},
            "seq": seq,
        }

    def _count(self, seq: int, chosen: dict[str, Any]) -> dict[JobState, int]:
        """Return the number of jobs in each state; what takes long to count is not counted anew at every change."""
        key = tuple(chosen.items())
        kept = self._counts.get(key)
        now = time.monotonic()
        if kept is not None and (kept[0] == seq or now < kept[1]):
            return kept[2]
        counts = default_store().count(**chosen)
        cost = time.monotonic() - now
        self._counts[key] = (seq, now + 10 * cost, counts)
        while len(self._counts) > _KEPT:
            self._counts.popitem(last=False)
        return counts

    def json(self, row: JobRow) -> dict[str, Any]:
        """Return a job as a row of a list."""
        mask = self._pools.mask
        cell = _CELL.fullmatch(row.function)
        return {
            "id": row.id,
            "name": mask.text(row.name),
            "pool": row.pool,
            "kind": row.kind,
            "state": row.state.value,
            "cause": row.cause.value if row.cause else None,
            "reason": mask.text(row.reason),
            "advice": ADVICE.get(row.cause, "") if row.cause else "",
            "array": row.array,
            "tasks": row.tasks,
            "done": row.done,
            "failed": row.failed,
            "running": row.running,
            "created": row.created,
            "started": row.started,
            "ended": row.ended,
            "native_id": row.native_id,
            "notebook": row.notebook,
            "notebook_browser": self._browsed(row.notebook),
            "cell": cell[1] if cell else None,
            "function": mask.text(row.function),
            "held": row.state in (JobState.NEW, JobState.PENDING) and _HELD.search(row.reason) is not None,
            "cpus": row.cpus,
            "memory": row.memory,
            "time": row.time,
            "cpu_seconds": row.cpu_seconds,
            "peak_memory": row.peak_memory,
            "cost": self._cost(row),
            "seq": row.seq,
        }

    def _browsed(self, notebook: str) -> str | None:
        """Return where the file browser finds a notebook, from its name alone: a list must not wait for a disk."""
        for root in self._roots:
            relative = notebook.removeprefix(root)
            if relative != notebook and not any(part.startswith(".") for part in relative.split("/")):
                return relative
        return None

    def _cost(self, row: JobRow) -> float | None:
        """Return what a job has cost so far, where its row tells: a plain job without gpus, on a pool with prices."""
        pool = self._pools.config_of(row.pool)
        if pool is None or not pool.prices.cpu_hour or pool.prices.gpu_hour or row.array or row.started is None:
            return None
        seconds = (row.ended if row.ended is not None else time.time()) - row.started
        return max(0.0, seconds) / 3600 * row.cpus * pool.prices.cpu_hour
