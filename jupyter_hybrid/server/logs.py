"""Parts of logs, by bytes: what comes next is asked for where the last part ended."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import JobNotFound
from ..progress import RUNNING
from ..run import Run
from .files import opened
from .masking import CONTEXT, Mask
from .rows import BadRequest, integer

_CONTINUED = bytes(range(0x80, 0xC0))
MOST = 1 << 20
"""Bytes of a part."""


def part(run: Run, batch_text: str, arguments: Mapping[str, str], mask: Mask) -> dict[str, Any]:
    """Return a part of the log of a batch, or of what one task wrote there, with what is secret masked.

    Raises
    ------
    BadRequest
        A parameter is wrong.
    JobNotFound
        The job has no such batch or task.
    """
    batch = integer({"batch": batch_text}, "batch", 0, 0, 2**31)
    offset = integer(arguments, "offset", 0, -(2**53), 2**53)
    limit = integer(arguments, "limit", 65536, 1, MOST)
    progress = run.progress
    with run.lock:
        if not any(each.first <= batch < each.first + each.batches for each in progress.attempts):
            raise JobNotFound(f"job {run.row.id} has no batch {batch}")
        worker = progress.batches.get(batch)
        ended = run.row.state.final or (worker is not None and bool(worker.why))
        begin, end = 0, None
        if "task" in arguments:
            begin, end, ended = _span(run, batch, integer(arguments, "task", 0, 0, 2**53), ended)
    try:
        with opened(run.folder.path, "logs", run.folder.log(batch).name) as descriptor:
            size = os.fstat(descriptor).st_size
            stop = size if end is None else min(size, end)
            begin = min(begin, stop)
            start = min(stop, begin + offset if offset >= 0 else max(begin, stop + offset))
            first = max(0, start - CONTEXT)
            data = os.pread(descriptor, start - first + limit + CONTEXT, first)
        if offset < 0:  # in the middle of a character
            part_of = data[start - first : start - first + 3]
            start += len(part_of) - len(part_of.lstrip(_CONTINUED))
    except FileNotFoundError:
        return {"text": "", "offset": 0, "next": 0, "size": 0, "end": ended}
    shown = mask.data(data)[start - first : start - first + min(limit, stop - start)]
    if start + len(shown) == size and not ended:
        shown = shown[: len(shown) - mask.begun(data[: start - first + len(shown)])]
    if start + len(shown) < stop or not ended:
        shown = _whole(shown)
    following = start + len(shown)
    return {
        "text": shown.decode(errors="replace"),
        "offset": start - begin,
        "next": following - begin,
        "size": stop - begin,
        "end": ended and following >= stop,
    }


def _span(run: Run, batch: int, task: int, ended: bool) -> tuple[int, int | None, bool]:
    """Return where in the log of its batch a task's part begins and ends, and whether no more will come."""
    progress = run.progress
    if task >= progress.total:
        raise JobNotFound(f"job {run.row.id} has tasks 0 to {progress.total - 1}, not {task}")
    if progress.batch_of(task) != batch:
        raise BadRequest(f"task {task} of job {run.row.id} is not in batch {batch}")
    result = progress.results.get(task)
    if result is not None:
        return (*(result.log or (0, 0)), True)
    if progress.marks[task] != RUNNING and not (ended and not run.spec.array):
        return 0, 0, ended
    before = [other.log[1] for other in progress.results.values() if other.batch == batch and other.log]
    return max(before, default=0), None, ended


def _whole(data: bytes) -> bytes:
    """Return bytes without a last character that is cut; a text of nothing else stays as it is."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] < 0x80:
            break
        if data[-back] >= 0xC0:
            length = 2 if data[-back] < 0xE0 else 3 if data[-back] < 0xF0 else 4
            return data[:-back] if length > back and len(data) > back else data
    return data
