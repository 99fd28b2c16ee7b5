"""What there is: pools and jobs, as tables that read well in a notebook and in a terminal."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from . import config
from .errors import HybridError, near_match
from .handles import ArrayJob, Handle, Job, job
from .handles import why as _why
from .pool import default_store, get_pool
from .spec import JobState
from .store import JobRow
from .tracker import watch_all


class Table(list[dict[str, Any]]):
    """Rows with the same columns; shown as a table, used as a list of mappings."""

    def __init__(self, rows: Iterable[dict[str, Any]], columns: Sequence[str], empty: str) -> None:
        super().__init__(rows)
        self.columns, self.empty = columns, empty

    def __repr__(self) -> str:
        if not self:
            return self.empty
        cells = [list(self.columns), *[[_text(row[column]) for column in self.columns] for row in self]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells
        )

    def _repr_html_(self) -> str:
        if not self:
            return f"<p>{html.escape(self.empty)}</p>"
        head = "".join(f"<th style='text-align:left'>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>"
            + "".join(f"<td style='text-align:left'>{html.escape(_text(row[c]))}</td>" for c in self.columns)
            + "</tr>"
            for row in self
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def duration(seconds: float | None) -> str:
    """Return a span of time as a person says it: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds is None:
        return ""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for small, large, names in ((60, 3600, ("min", "s")), (3600, 86400, ("h", "min")), (86400, 1 << 62, ("d", "h"))):
        if whole < large:
            first, rest = divmod(whole, small)
            second = rest // {"s": 1, "min": 60, "h": 3600}[names[1]]
            return f"{first} {names[0]} {second} {names[1]}" if second else f"{first} {names[0]}"
    return ""


def elapsed(row: JobRow) -> float | None:
    """Return for how many seconds a job has run, or ran."""
    if row.started is None:
        return None
    return (row.ended if row.ended is not None else time.time()) - row.started


JOB_COLUMNS = ("id", "name", "pool", "state", "cause", "progress", "elapsed", "submitted", "native_id", "reason")


def job_line(row: JobRow) -> dict[str, Any]:
    """Return a job as a row of a table."""
    return {
        "id": row.id,
        "name": row.name if len(row.name) <= 40 else row.name[:39] + "…",
        "pool": row.pool,
        "state": str(row.state),
        "cause": str(row.cause) if row.cause else None,
        "progress": f"{row.done}/{row.tasks}" + (f", {row.failed} failed" if row.failed else "") if row.array else None,
        "elapsed": duration(elapsed(row)),
        "submitted": datetime.fromtimestamp(row.created).strftime("%Y-%m-%d %H:%M:%S"),
        "native_id": row.native_id,
        "reason": row.reason.splitlines()[0][:100] if row.reason else None,
    }


def parse_states(given: str | Iterable[str]) -> list[JobState]:
    """Return the states that words name, in any case; a word may be several with commas between.

    Raises
    ------
    HybridError
        There is no such state.
    """
    texts = [given] if isinstance(given, str) else given
    words = [word.strip().upper() for text in texts for word in text.split(",") if word.strip()]
    known = [state.value for state in JobState]
    for word in words:
        if word not in known:
            raise HybridError(f"no state {word!r}{near_match(word, known)} (states are {', '.join(known)})")
    return [JobState(word) for word in words]


def jobs(
    *,
    state: str | Iterable[str] = (),
    pool: str | None = None,
    name: str | None = None,
    limit: int = 100,
) -> Table:
    """Return the newest jobs of all kernels, newest first.

    Parameters
    ----------
    state : str or iterable of str
        Only jobs in these states.
    pool : str, optional
        Only on this pool.
    name : str, optional
        Only with this text in the name.
    limit : int
        At most so many.
    """
    wanted = parse_states(state)
    watch_all()
    rows = default_store().jobs(states=wanted, pool=pool, name=name, limit=limit)
    return Table([job_line(row) for row in rows], JOB_COLUMNS, "no jobs")


POOL_COLUMNS = ("name", "kind", "cpus", "gpus", "memory", "queued", "price", "state")


def pools() -> Table:
    """Return all pools: name, kind, free and total cpus and gpus, largest node's memory, queue, price per cpu-hour."""
    rows = []
    store = default_store()
    for name, pool_config in config.load().pools.items():
        row: dict[str, Any] = dict.fromkeys(POOL_COLUMNS)
        row |= {"name": name, "kind": pool_config.kind, "price": pool_config.prices.cpu_hour}
        try:
            snapshot = get_pool(name).ask_snapshot(store)
        except HybridError as error:
            since = store.pool(name).unreachable_since
            when = f" since {datetime.fromtimestamp(since):%Y-%m-%d %H:%M:%S}" if since else ""
            row["state"] = f"unreachable{when}: {str(error).splitlines()[0]}"
        else:
            row["cpus"] = f"{snapshot.free_cpus}/{snapshot.total_cpus}"
            row["gpus"] = f"{snapshot.free_gpus}/{snapshot.total_gpus}" if snapshot.total_gpus else None
            free, total = ((each or 0) / 2**30 for each in (snapshot.free_memory, snapshot.total_memory))
            row["memory"] = f"{free:.3g}/{total:.3g}G" if total else None
            row["queued"] = snapshot.queued
            row["state"] = "ready"
        rows.append(row)
    return Table(rows, POOL_COLUMNS, "no pools")


def why(job_or_id: Job | ArrayJob | str) -> list[str]:
    """Return why a cached result was not used, one sentence for each thing that changed.

    Parameters
    ----------
    job_or_id : Job, ArrayJob or str
        A job that was submitted with ``cache=True`` or ``--cache``.
    """
    return _why((job_or_id if isinstance(job_or_id, Handle) else job(job_or_id)).run)
