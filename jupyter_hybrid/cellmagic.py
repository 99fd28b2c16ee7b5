"""Submits the cell of a magic as its options say, and shows the job."""

from __future__ import annotations

import argparse
import itertools
import keyword
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from IPython.core.error import UsageError

from . import capture, executor, fingerprint, handles, launch, widgets
from .errors import CaptureError
from .handles import ArrayJob, Job, wrap
from .pool import Pool, get_pool
from .spec import Resources, parse_memory

_RESOURCES = ("cpus", "memory", "time", "gpus", "nodes", "tasks_per_node", "partition", "qos", "account", "constraint")


class CellSyntaxError(CaptureError):
    """The cell is no Python; nothing was submitted."""

    def _render_traceback_(self) -> list[str]:
        from IPython import get_ipython

        error = self.__cause__
        lines: list[str] = get_ipython().SyntaxTB.structured_traceback(type(error), error, [])
        return lines


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return the resources that were asked for on the line."""
    found = {name: getattr(options, name) for name in (*_RESOURCES, "priority")}
    if options.extra:
        pairs = (entry.partition("=") for entry in options.extra)
        found["extra"] = {key.removeprefix("--"): value if equals else None for key, equals, value in pairs}
    return {name: value for name, value in found.items() if value is not None}


def _names(texts: Sequence[str] | None, option: str) -> list[str] | None:
    if texts is None:
        return None
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    for name in names:
        _identifier(name, option)
    return names


def _identifier(name: str, option: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"{option}: {name!r} is not a name of a variable")
    return name


def grid(texts: Sequence[str], namespace: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tasks of ``--array``: a mapping of names to values for each combination; ``None`` without it."""
    if not texts:
        return None
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, expression = text.partition("=")
        name = _identifier(name.strip(), "--array NAME=EXPR")
        if not equals:
            raise UsageError(f"--array {text}: write it like --array seed=range(100)")
        if name in axes:
            raise UsageError(f"--array {name} is given twice")
        try:
            value = eval(compile(expression.strip(), "--array", "eval"), namespace)
            axes[name] = list(value)
        except Exception as error:  # the user's own expression may raise anything
            raise UsageError(f"--array {text}: {type(error).__name__}: {error}") from error
        if not axes[name]:
            raise UsageError(f"--array {text}: there is nothing in it")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def find_job(shell: Any, text: str) -> Job | ArrayJob:
    """Return a job given by a variable of the notebook or by its id."""
    value = shell.user_ns.get(text)
    return value if isinstance(value, (Job, ArrayJob)) else handles.job(text)


def _pool(kind: str, name: str | None) -> Pool:
    pool = get_pool(name, None if name else kind)
    if pool.kind != kind:
        raise UsageError(f"%%{kind}: pool {pool.name!r} is of kind {pool.kind!r}; write %%{pool.kind} for it")
    return pool


def _batch(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) >= 1):
        raise UsageError(f"--batch {text}: neither 'auto' nor a whole number of at least 1")
    return text if text == "auto" else int(text)


def run_cell(shell: Any, kind: str, options: argparse.Namespace, cell: str) -> Job | ArrayJob | None:
    """Submit a cell as its magic's options say; show the job, and return it unless it is bound to a name."""
    # What is wrong is said before anything is captured.
    pool = _pool(kind, options.pool)
    resources, ignored = executor.parse_resources(pool, asked(options))
    options.directory = executor.parse_directory(options.directory)
    if options.bound:
        _identifier(options.bound, "--as")
    if all(not line.strip() or line.lstrip().startswith("#") for line in cell.splitlines()):
        raise UsageError(f"%%{kind}: there is nothing to run in this cell; nothing was submitted")
    tasks = grid(options.array, shell.user_ns)
    after = [find_job(shell, job.strip()).id for text in options.after for job in text.split(",") if job.strip()]
    run = _run_script if options.bash else _run_python
    job = run(shell, pool, resources, options, cell, tasks, after)
    if ignored:
        print(ignored)  # noqa: T201
    if job is None:
        return None
    if options.bound:
        shell.push({options.bound: job})
    widgets.show(job, options.bound or "", outputs=True)
    if options.wait:
        widgets.wait(job)
    return None if options.bound else job


def _run_script(
    shell: Any,
    pool: Pool,
    resources: Resources,
    options: argparse.Namespace,
    cell: str,
    tasks: list[dict[str, Any]] | None,
    after: list[str],
) -> Job | ArrayJob | None:
    for option, given in (("--in", options.inputs), ("--out", options.out), ("--cache", options.cache)):
        if given:
            raise UsageError(f"{option} is for cells of Python; a script (--bash) has files and its exit status")
    name = options.name or _title(cell, [], tasks)
    origin = {"function": _function("")}
    if options.dry_run:
        _preview(pool, resources, options, "script", name, tasks, after, {}, ())
        print(f"which runs:\n{cell}")  # noqa: T201
        return None
    return executor.run_script(
        cell.encode(), None if tasks is None else list(enumerate(tasks)), pool=pool, resources=resources,
        batch=_batch(options.batch), after=after, name=name, directory=options.directory, origin=origin,
    )  # fmt: skip


def _run_python(
    shell: Any,
    pool: Pool,
    resources: Resources,
    options: argparse.Namespace,
    cell: str,
    tasks: list[dict[str, Any]] | None,
    after: list[str],
) -> Job | ArrayJob | None:
    limit = parse_memory(options.limit) if options.limit else capture.LIMIT
    number = len(shell.history_manager.input_hist_parsed) - 1  # the running cell is the last
    try:
        captured = capture.collect(
            cell,
            shell.user_ns,
            inputs=_names(options.inputs, "--in"),
            outputs=_names(options.out, "--out"),
            extra_names=tasks[0] if tasks else (),
            limit=limit,
            title=f"In[{number}]",
        )
    except SyntaxError as error:
        error.filename = shell.compile.cache(cell, number)  # so that IPython shows it as `Cell In[3], line 1`
        raise CellSyntaxError(f"{error}; nothing was submitted") from error
    name = options.name or _title(cell, captured.out if captured.explicit_out else (), tasks)
    if options.dry_run:
        _preview(pool, resources, options, "cell", name, tasks, after, captured.inputs, captured.out, captured.sizes)
        return None
    items = None if tasks is None else executor.pack_items(tasks, limit)
    keys, task_keys = {}, []
    if options.cache:
        keys = fingerprint.cell_keys(cell, captured.inputs, captured.out)
        task_keys = [fingerprint.task_key(keys, task) for task in (tasks if tasks is not None else [{}])]
    run = launch.launch(
        pool,
        kind="cell",
        name=name,
        payload=captured.frames,
        items=items,
        resources=resources,
        batch=executor.parse_batch(_batch(options.batch)),
        after=after,
        out=captured.out,
        origin={"function": _function(",".join(captured.out)), "inputs": list(captured.inputs)},
        keys=keys,
        task_keys=task_keys,
        directory=options.directory,
    )
    job = wrap(run)
    job.bind = binder(shell, job)
    return job


def binder(shell: Any, job: Job | ArrayJob) -> Callable[[Any], None]:
    """Return what binds the names of ``--out`` in the notebook, an array's to lists."""
    names = job.spec.out
    array = isinstance(job, ArrayJob)

    def bind(value: Any) -> None:
        if len(names) == 1:
            shell.push({names[0]: value})
        elif array:
            shell.push({name: [each[name] for each in value] for name in names if all(name in each for each in value)})
        else:
            shell.push({name: value[name] for name in names if name in value})

    return bind


def _title(cell: str, out: Sequence[str], tasks: list[dict[str, Any]] | None) -> str:
    """Return what lists of jobs call a cell: what it is run for, ``score(seed)``, or its first line that says much."""
    if out:
        return ", ".join(out) + (f"({', '.join(tasks[0])})" if tasks else "")
    lines = [line.strip() for line in cell.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("import ", "from ", "#!", "%"))]
    first = next((line for line in said if not line.startswith("#")), next(iter(lines), "cell"))
    return first if len(first) <= 60 else first[:59] + "…"


def _function(names: str) -> str:
    """Return what stands for the function in the record of a cell: the cell, or the names that it gives back."""
    return f"cell:{launch.notebook_cell().get('cell') or names}"


def _preview(
    pool: Pool,
    resources: Resources,
    options: argparse.Namespace,
    kind: str,
    name: str,
    tasks: list[dict[str, Any]] | None,
    after: list[str],
    inputs: dict[str, Any],
    out: Sequence[str],
    sizes: dict[str, int] | None = None,
) -> None:
    spec = launch.make_spec(
        pool, kind=kind, name=name, tasks=1 if tasks is None else len(tasks), array=tasks is not None,
        resources=resources,
        batch=executor.parse_batch(_batch(options.batch)), out=out, directory=options.directory,
    )  # fmt: skip
    submissions = launch.preview(pool, spec)
    # Backends with a submit command have it as a pure function in their module.
    command = getattr(sys.modules[type(pool.backend).__module__], "submit_command", None)
    lines = [f"Nothing is submitted (--dry-run). Pool {pool.name!r}, kind {pool.kind}."]
    if tasks is not None:
        batches = sum(submission.count for submission, _ in submissions)
        lines.append(f"Array: {len(tasks)} tasks in {batches} batches, from {tasks[0]} to {tasks[-1]}")
    if after:
        lines.append(f"Starts after: {', '.join(after)}")
    if kind == "cell":
        width = max(map(len, inputs), default=0)
        lines.append("Takes along:" if inputs else "Takes along: nothing")
        lines += [f"  {n:{width}}  {type(v).__name__}, {_size((sizes or {})[n])}" for n, v in inputs.items()]
        lines.append(f"Gives back: {', '.join(out) or 'nothing'}")
    for submission, text in submissions:
        if command is not None:
            lines.append(f"Command: {shlex.join(command(submission))}")
        lines += [f"Script {submission.script.name}:", text]
    print("\n".join(lines))  # noqa: T201


def _size(size: int) -> str:
    for factor, unit in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
