"""The card of a job: HTML that is good without kernel, style sheet or script, in light and dark; and a line of text."""

from __future__ import annotations

import re
import time
from datetime import datetime
from html import escape
from typing import Any

from .. import frames
from ..errors import HybridError
from ..handles import ArrayJob, Handle, Job, Task
from ..launch import reused_tasks
from ..listing import duration
from ..pool import default_store
from ..progress import FAILED, RUNNING, judge
from ..results import ADVICE, end_of
from ..spec import Cause, JobState, Resources, format_memory
from ..store import JobRow

_ICONS = {
    JobState.NEW: "○",
    JobState.PENDING: "◷",
    JobState.RUNNING: "▶",
    JobState.COMPLETED: "✔",
    JobState.FAILED: "✖",
    JobState.CANCELLED: "⊘",
    JobState.TIMEOUT: "◴",
    JobState.UNKNOWN: "?",
}
_GREEN, _RED, _BLUE, _ORANGE, _GREY = (
    "var(--jp-success-color1,#388e3c)",
    "var(--jp-error-color1,#d32f2f)",
    "var(--jp-brand-color1,#1976d2)",
    "var(--jp-warn-color1,#f57c00)",
    "var(--jp-border-color1,#9e9e9e)",
)
_COLOURS = {
    JobState.COMPLETED: _GREEN,
    JobState.RUNNING: _BLUE,
    JobState.FAILED: _RED,
    JobState.TIMEOUT: _RED,
    JobState.UNKNOWN: _ORANGE,
}
_MONO = "font-family:var(--jp-code-font-family,monospace);font-size:var(--jp-code-font-size,13px)"
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")

STYLE = (
    "<style>"
    # Buttons of a kernel that is gone: JupyterLab puts an error text where they were.
    ".jp-OutputArea-child:has(.jupyter-hybrid) + .jp-OutputArea-child:has(.jupyter-widgets):not(:has(.widget-box))"
    "{display:none}"
    "</style>"
)


def now(job: Handle) -> JobRow:
    """Return the row of a job; where all tasks have ended, and the Store is about to say so, as it will be."""
    row, run = job.row(), job.run
    if row.state.final or not run.settled:
        return row
    verdict = judge(run.progress, run.batches, {}, True, run.cancelled)
    ends = [result.ended for result in run.progress.results.values()]
    return row._replace(
        state=verdict.state, cause=verdict.cause, reason=verdict.reason, done=run.progress.done,
        failed=run.progress.failed, running=0, ended=max(ends, default=None),
    )  # fmt: skip


def text(job: Handle) -> str:
    """Return a job in one line, with the cause and the advice if it ended badly."""
    row = now(job)
    said = f"{_ICONS[row.state]} {row.state} {_name(row)} on {row.pool}"
    if row.array:
        said += f", {_counts(job)}"
    span = _elapsed(row)
    said += f", {span}" if span else ""
    said += f" (job {row.id})"
    if row.reason:
        said += f": {row.cause}: {row.reason}" if row.cause else f": {row.reason}"
    return said + (f"\n→ {ADVICE[row.cause]}" if row.cause in ADVICE else "")


def html(job: Handle, label: str = "", seen: str = "") -> str:
    """Return the card of a job. `label` is what the notebook calls it, `seen` a last line."""
    row = now(job)
    parts = [_head(row), _facts(job, row)]
    if row.array:
        parts.append(_bar(job, row))
    if row.reason and not row.cause:
        parts.append(_line(f"{escape(row.reason)}{_expected(job)}"))
    parts.append(_unreachable(row))
    if row.cause:
        parts.append(_bad_end(job, row))
    parts.append(_first_failure(job, row, label))
    parts.append(_log(job, row))
    parts.append(seen)
    body = "".join(parts)
    return (
        f'<div class="jupyter-hybrid" style="border-left:3px solid {_colour(row)};padding:2px 0 2px 12px;'
        "font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:var(--jp-ui-font-size1,13px);"
        f'line-height:1.6;max-width:64em">{body}</div>'
    )


def _seen(job: Handle) -> str:
    """Return when the card of an unfinished job was written: all that a notebook without a kernel can know."""
    if now(job).state.final:
        return ""
    code = _code(f"hy.job({job.id!r})")
    return _line(f"seen at {datetime.now():%H:%M:%S}; {code} finds it from any kernel", muted=True)


def _colour(row: JobRow) -> str:
    return _COLOURS.get(row.state, _GREY)


def _line(inner: str, muted: bool = False) -> str:
    return f'<div style="{"opacity:.75" if muted else ""}">{inner}</div>'


def _code(content: str) -> str:
    return f'<code style="{_MONO};background:none;padding:0">{escape(content)}</code>'


def _pre(content: str, height: str = "16em") -> str:
    return (
        f'<pre style="{_MONO};margin:4px 0;padding:4px 8px;max-height:{height};overflow:auto;white-space:pre-wrap;'
        f'border:1px solid var(--jp-border-color2,rgba(128,128,128,.4))">{escape(_ANSI.sub("", content))}</pre>'
    )


def _name(row: JobRow) -> str:
    line = row.name.splitlines()[0] if row.name else row.id
    return line if len(line) <= 80 else line[:79] + "…"


def _head(row: JobRow) -> str:
    span = _elapsed(row)
    colour = _COLOURS.get(row.state, "inherit")
    icon = f'<span aria-hidden="true" style="color:{colour}">{_ICONS[row.state]}&#xFE0E;</span>'
    return f"<div>{icon} <b>{row.state}</b> · {_code(_name(row))}{' · ' + span if span else ''}</div>"


def _elapsed(row: JobRow) -> str:
    if row.started is None:
        return ""
    if row.ended is not None:
        return duration(row.ended - row.started)
    seconds = int(time.time() - row.started)
    if seconds < 60:
        return f"{max(0, seconds)} s"
    return duration(seconds - seconds % (10 if seconds < 3600 else 60))


def _facts(job: Handle, row: JobRow) -> str:
    native = f" ({escape(row.native_id)})" if row.native_id else ""
    found = [f"pool {escape(row.pool)}", f"job {_code(row.id)}{native}"]
    found.append(_asked(job.spec.resources))
    hosts = sorted({batch.host for batch in job.run.progress.batches.values() if batch.host})
    if hosts:
        found.append("on " + escape(", ".join(hosts[:3])) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""))
    if row.attempt > 1:
        found.append(f"attempt {row.attempt}")
    if row.state.final:
        found += _used(job, row)
        if row.ended is not None:
            found.append(f"ended {datetime.fromtimestamp(row.ended):%Y-%m-%d %H:%M}")
    elif row.state is JobState.RUNNING:
        found += _sign_of_life(job)
    return _line(" · ".join(found), muted=True)


def _sign_of_life(job: Handle) -> list[str]:
    """Say when the worker that has been silent longest was last heard of, if that is long ago, and at what."""
    live = [batch for batch in job.run.progress.batches.values() if batch.started is not None and not batch.why]
    if not live:
        return []
    silent = max(live, key=lambda batch: time.monotonic() - batch.news)
    seconds = time.monotonic() - silent.news
    if seconds < 30:  # heartbeats come every 10 s
        return []
    at = f" at task {silent.task}" if silent.task is not None and job.row().array else ""
    return [f"last sign of life {duration(seconds)} ago{at}"]


def _asked(wanted: Resources) -> str:
    found = [f"{wanted.cpus} cpu{'s' if wanted.cpus > 1 else ''}"]
    if wanted.nodes > 1 or wanted.tasks_per_node > 1:
        found.append(f"{wanted.nodes} nodes with {wanted.tasks_per_node} processes")
    if wanted.gpus:
        found.append(f"{wanted.gpus} gpu{'s' if wanted.gpus > 1 else ''}")
    if wanted.memory:
        found.append(format_memory(wanted.memory))
    if wanted.time:
        found.append(duration(wanted.time.total_seconds()))
    return escape(", ".join(found))


def _used(job: Handle, row: JobRow) -> list[str]:
    found = []
    shares = job.efficiency()
    if shares["cpu"] is not None:
        found.append(f"cpu {min(shares['cpu'], 1):.0%}")
    if row.peak_memory:
        peak = f"memory {row.peak_memory / 2**20:,.0f} MB"
        found.append(f"{peak} ({shares['memory']:.0%})" if shares["memory"] is not None else peak)
    return found


def _counts(job: Handle) -> str:
    row = now(job)
    marks = job.run.progress
    failed = max(row.failed, marks.failed)
    running = marks.marks.count(RUNNING) if not row.state.final else 0
    said = f"{marks.done} of {row.tasks} done"
    said += f", {failed} failed" if failed else ""
    said += f", {max(running, row.running)} running" if running and not row.state.final else ""
    reused = reused_tasks(job.run)
    return said + (f", {reused} of them reused from earlier jobs" if reused else "")


def _bar(job: Handle, row: JobRow) -> str:
    marks = job.run.progress
    shares = (
        (marks.done, _GREEN),
        (max(row.failed, marks.failed), _RED),
        (marks.marks.count(RUNNING) if not row.state.final else 0, _BLUE),
    )
    spans = "".join(
        f'<div style="width:{100 * count / row.tasks:.4g}%;background:{colour}"></div>' for count, colour in shares
    )
    return (
        f'<div role="progressbar" aria-valuemin="0" aria-valuemax="{row.tasks}" aria-valuenow="{marks.done}" '
        'style="display:flex;height:8px;max-width:32em;margin:4px 0;border-radius:4px;overflow:hidden;'
        f'background:var(--jp-layout-color3,rgba(128,128,128,.3))">{spans}</div>' + _line(escape(_counts(job)))
    )


def _expected(job: Handle) -> str:
    starts = [batch.estimated_start for batch in job.run.batches.values() if batch.estimated_start]
    return f"; expected to start about {datetime.fromtimestamp(min(starts)):%Y-%m-%d %H:%M}" if starts else ""


def _unreachable(row: JobRow) -> str:
    pool = default_store().pool(row.pool) if not row.state.final else None
    if pool is None or pool.unreachable_since is None:
        return ""
    since = datetime.fromtimestamp(pool.unreachable_since)
    said = f"Pool {escape(row.pool)} does not answer since {since:%Y-%m-%d %H:%M:%S}: {escape(pool.error)}"
    return f'<div><span style="color:{_ORANGE}">⚠&#xFE0E;</span> {said}</div>'


def _bad_end(job: Handle, row: JobRow) -> str:
    if row.array and row.cause is Cause.USER_ERROR:
        return ""  # told of the task that it happened in
    advice = ADVICE.get(row.cause) if row.cause else None
    if row.cause is Cause.USER_ERROR and job.spec.kind == "cell":
        advice = "correct the cell and run it again"
    said = _line(f"<b>{row.cause}</b>" + (f": {escape(row.reason)}" if row.reason else ""))
    return said + (_line(f"→ {escape(advice)}") if advice else "")


def _first_failure(job: Handle, row: JobRow, label: str) -> str:
    """Return what went wrong in the first task of an array that failed, and what to do."""
    if not isinstance(job, ArrayJob):
        return ""
    failed = job.run.progress.marks.find(FAILED)
    if failed < 0:
        return ""
    _, cause, reason = end_of(job.run, failed)
    said = f"<b>{cause}</b> first in task {failed}{_parameters(job, failed)}: {escape(reason)}"
    called = label or f"hy.job({job.id!r})"
    see = f"{called}[{failed}].{'outputs' if job.spec.kind == 'cell' else 'logs'}()"
    advice = f"→ {_code(see)} shows all of it"
    if row.state.final:
        rest = f"{called}.results(errors='skip')"
        advice += f"; {_code(rest)} has the others; {_code(called + '.retry()')} runs only what is not done"
    return _line(said) + _pre(traceback(Task(job, failed))) + _line(advice)


def _parameters(job: Handle, task: int) -> str:
    try:
        item = frames.Reader(job.run.folder / "items.bin").load(task)
    except (frames.FrameError, OSError):
        return ""
    if job.spec.kind == "script":
        item = item[1]
    pairs = [f"{name}={value!r}" for name, value in item.items()] if isinstance(item, dict) else map(repr, item)
    said = ", ".join(pairs)
    return f" ({escape(said if len(said) <= 100 else said[:99] + '…')})" if said else ""


def traceback(task: Task) -> str:
    """Return the end of the traceback of a failed task, that of its cell if it is one."""
    if task.array.spec.kind == "cell":
        errors = [output for output in task.outputs() if output["output_type"] == "error"]
        if errors:
            return "\n".join("\n".join(errors[-1]["traceback"]).splitlines()[-20:])
    return "\n".join(task.logs().splitlines()[-20:])


def _log(job: Handle, row: JobRow) -> str:
    """Return the end of the log, where it says more than what is shown anyway."""
    if isinstance(job, Job) and job.spec.kind == "cell" and row.cause in (None, Cause.USER_ERROR):
        return ""  # its text is shown under the card
    if isinstance(job, ArrayJob) and job.run.progress.failed:
        return ""  # the traceback is there
    batches = job.run.progress.batches
    latest = max(batches, key=lambda number: (batches[number].started or 0, number), default=None)
    try:
        tail = "" if latest is None else job.run.folder.log_tail(latest, 8)
    except HybridError:
        tail = ""
    if not tail.strip():
        return ""
    title = "End of the log" + (f" of batch {latest}" if row.array else "")
    return _line(f"{title}:", muted=True) + _pre(tail, "12em")


def bundle(job: Handle, label: str = "") -> dict[str, Any]:
    """Return the card as a MIME bundle."""
    return {"text/html": html(job, label, _seen(job)) + STYLE, "text/plain": text(job)}
