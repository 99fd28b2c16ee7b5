"""The magics ``%%local``, ``%%slurm`` and ``%hybrid``: parse, call, show. What is heavy is loaded when it is used."""

from __future__ import annotations

import argparse
import ast
import itertools
import keyword
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import MagicArgumentParser

from .errors import CaptureError, near_match

if TYPE_CHECKING:
    from .handles import ArrayJob, Job
    from .pool import Pool

KINDS = ("local", "slurm")
"""Kinds of pools that have a cell magic of their own."""

_RESOURCES = ("cpus", "memory", "time", "gpus", "nodes", "tasks_per_node", "partition", "qos", "account", "constraint")

_EXAMPLE = """\
example:
  %%{kind} --cpus 2 --memory 4G --time 30min --out score
  score = fit(X, y)              # X, y and fit travel with the cell

  job = _                        # the cell's value is the Job
  job.result()                   # waits, and binds score here

  %%{kind} --array seed=range(100) --out score --cache
  score = fit(X, y, seed)        # 100 tasks; arr.results() has 100 scores

  %hybrid jobs                   # all jobs; %hybrid alone shows what else there is"""


class CellSyntaxError(CaptureError):
    """The cell is no Python; nothing was submitted."""

    def _render_traceback_(self) -> list[str]:
        from IPython import get_ipython

        error = self.__cause__
        lines: list[str] = get_ipython().SyntaxTB.structured_traceback(type(error), error, [])  # type: ignore[no-untyped-call]
        return lines


class OptionParser(MagicArgumentParser):  # type: ignore[misc]
    """Parses the line of a magic; what is wrong in it is a UsageError that names it and the near match."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog=prog, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.allow_abbrev = False  # a later option must not change what a notebook means
        self.options: list[str] = []
        self.values: dict[str, str] = {}

    def option(self, name: str, **settings: Any) -> None:
        """Add an option; `gives` tells what Tab offers for its value."""
        self.values[name] = settings.pop("gives", "")
        self.options.append(name)
        self.add_argument(name, **settings)

    def error(self, message: str) -> None:
        """Raise what is wrong."""
        raise UsageError(f"{self.prog}: {message}")

    def parse(self, line: str) -> argparse.Namespace:
        """Return the options on the magic's line."""
        found, unknown = self.parse_known_args(split(line))
        if unknown:
            word = unknown[0].partition("=")[0]
            near = near_match(word, self.options)
            if word.startswith("-"):
                raise UsageError(f"{self.prog}: unknown option {word}{near} ({self.prog}? shows all)")
            raise UsageError(f"{self.prog}: {unknown[0]!r} belongs to no option ({self.prog}? shows all)")
        return found  # type: ignore[no-any-return]


def split(line: str) -> list[str]:
    """Return the words of a magic's line: quotes as in a shell, but the value of ``--array`` stays Python.

    Spaces inside its brackets or quotes do not end it (``--array lr=[0.1, 0.2]``); quotes around all of it go.
    """
    words: list[str] = []
    position, end = 0, len(line)
    while True:
        while position < end and line[position].isspace():
            position += 1
        if position == end:
            return words
        start, quote, depth = position, "", 0
        python = (words[-1:] == ["--array"]) or line.startswith("--array=", start)
        while position < end and (quote or depth or not line[position].isspace()):
            character = line[position]
            if character == "\\" and quote != "'":
                position += 1
            elif quote:
                quote = "" if character == quote else quote
            elif character in "'\"":
                quote = character
            elif python and character in "([{":
                depth += 1
            elif python and character in ")]}":
                depth = max(0, depth - 1)
            position += 1
        word = line[start : min(position, end)]
        if quote:
            raise UsageError(f"no closing quotation mark: {word}")
        if not python or word[:1] in "'\"":
            word = "".join(shlex.split(word))
        words.append(word)


def _resource_options(parser: OptionParser) -> None:
    parser.option("--cpus", metavar="N", help="CPU cores of each task")
    parser.option("--memory", metavar="SIZE", help="memory of each node: 8G, 512M")
    parser.option("--time", metavar="SPAN", help="walltime: 1h, 90min, 1:30:00, 2-00:00:00")
    parser.option("--gpus", metavar="N", help="GPUs of each node")
    parser.option("--nodes", metavar="N", help="number of nodes")
    parser.option("--tasks-per-node", metavar="N", help="processes on a node (MPI ranks)")
    parser.option("--partition", metavar="NAME", gives="partition", help="partition or queue")
    for name in ("--qos", "--account", "--constraint"):
        parser.option(name, metavar="WORD", help="passed to the scheduler as it is")
    parser.option("--priority", metavar="N", help="larger starts earlier, among one's own jobs")
    parser.option(
        "--extra", metavar="KEY=VALUE", action="append", default=[], help="any other option of the site; repeatable"
    )


def cell_parser(kind: str) -> OptionParser:
    """Return the parser of a cell magic's line."""
    parser = OptionParser(
        f"%%{kind}",
        description=f"Run the cell as a job on the first pool of kind {kind!r}, or on --pool. Returns at once.",
        epilog=_EXAMPLE.replace("{kind}", kind),
    )
    parser.option("--pool", metavar="NAME", gives="pool", help="a certain pool")
    _resource_options(parser)
    parser.option(
        "--in",
        dest="inputs",
        metavar="NAMES",
        action="append",
        help="variables to take along, instead of what it reads",
    )
    parser.option(
        "--out", metavar="NAMES", action="append", help="variables to give back, instead of all that it assigns"
    )
    parser.option(
        "--array", metavar="NAME=EXPR", action="append", default=[],
        help="one task for each value of EXPR, any Python of the notebook; repeated: every combination",
    )  # fmt: skip
    parser.option("--batch", metavar="N", default="auto", help="tasks that share an array element: auto (default) or N")
    parser.option(
        "--after", metavar="JOB", action="append", default=[], gives="job",
        help="ids or variables of jobs that must complete first",
    )  # fmt: skip
    parser.option("--as", dest="bound", metavar="NAME", help="bind the job to this name")
    parser.option("--name", metavar="TEXT", help="what lists of jobs call it")
    parser.option("--wait", action="store_true", help="wait for the end and bind the names of --out")
    parser.option("--dry-run", action="store_true", help="show script and variables, submit nothing")
    parser.option("--cache", action="store_true", help="use the results of earlier runs with the same code and data")
    parser.option("--limit", metavar="SIZE", help="most that the variables may take (default 100M)")
    parser.option("--bash", action="store_true", help="the cell is a shell script; HYBRID_ARRAY_INDEX is set")
    parser.option("--directory", metavar="PATH", gives="path", help="working directory (default: the notebook's)")
    return parser


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
    from . import handles, listing

    value = shell.user_ns.get(text)
    return value if isinstance(value, (handles.Job, handles.ArrayJob)) else listing.job(text)


def _pool(kind: str, name: str | None) -> Pool:
    from .pool import get_pool

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
    from . import widgets
    from .spec import Resources

    pool = _pool(kind, options.pool)
    Resources.parse(pool.config.resources, **asked(options))  # what is wrong is said before anything is captured
    if options.bound:
        _identifier(options.bound, "--as")
    tasks = grid(options.array, shell.user_ns)
    after = [find_job(shell, job.strip()).id for text in options.after for job in text.split(",") if job.strip()]
    run = _run_script if options.bash else _run_python
    job = run(shell, pool, options, cell, tasks, after)
    if job is None:
        return None
    if options.bound:
        shell.push({options.bound: job})
    widgets.show(job, options.bound or "", outputs=True)
    if options.wait:
        _wait(job)
    return None if options.bound else job


def _run_script(
    shell: Any, pool: Pool, options: argparse.Namespace, cell: str, tasks: list[dict[str, Any]] | None, after: list[str]
) -> Job | ArrayJob | None:
    from .executor import run_script

    for option, given in (("--in", options.inputs), ("--out", options.out), ("--cache", options.cache)):
        if given:
            raise UsageError(f"{option} is for cells of Python; a script (--bash) has files and its exit status")
    name = options.name or _title(cell)
    origin = _origin(shell, "")
    if options.dry_run:
        _preview(pool, options, "script", name, tasks, after, {}, ())
        return None
    return run_script(
        cell.encode(), None if tasks is None else list(enumerate(tasks)), pool=pool, batch=_batch(options.batch),
        after=after, name=name, directory=options.directory, resources=asked(options), origin=origin,
    )  # fmt: skip


def _run_python(
    shell: Any, pool: Pool, options: argparse.Namespace, cell: str, tasks: list[dict[str, Any]] | None, after: list[str]
) -> Job | ArrayJob | None:
    from . import capture, executor, fingerprint, frames, launch
    from .handles import wrap
    from .spec import Resources, parse_memory

    try:
        captured = capture.collect(
            cell,
            shell.user_ns,
            inputs=_names(options.inputs, "--in"),
            outputs=_names(options.out, "--out"),
            extra_names=tasks[0] if tasks else (),
            limit=parse_memory(options.limit) if options.limit else capture.LIMIT,
            title=f"In[{shell.execution_count}]",
        )
    except SyntaxError as error:
        raise CellSyntaxError(f"{error}; nothing was submitted") from error
    name = options.name or _title(cell)
    if options.dry_run:
        _preview(pool, options, "cell", name, tasks, after, captured.inputs, captured.out, captured.sizes)
        return None
    items = None
    if tasks is not None:
        items = []
        for task in tasks:
            try:
                items.append(frames.encode(task))
            except Exception as error:  # user classes may raise anything while they are pickled
                raise CaptureError(f"--array: {task!r} cannot travel to the pool: {error}") from error
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
        resources=Resources.parse(pool.config.resources, **asked(options)),
        batch=executor.parse_batch(_batch(options.batch)),
        after=after,
        out=captured.out,
        origin=_origin(shell, ",".join(captured.out)),
        keys=keys,
        task_keys=task_keys,
        directory=options.directory,
    )
    job = wrap(run)
    job.bind = binder(shell, job)
    return job


def binder(shell: Any, job: Job | ArrayJob) -> Callable[[Any], None]:
    """Return what binds the names of ``--out`` in the notebook, an array's to lists."""
    from .handles import ArrayJob

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


def _title(cell: str) -> str:
    """Return the first line of the cell that says something."""
    lines = [line.strip() for line in cell.splitlines()]
    said = [line for line in lines if line and not line.startswith(("import ", "from ", "#!", "%"))]
    first = next((line for line in said if not line.startswith("#")), next(iter(said), "cell"))
    return first if len(first) <= 60 else first[:59] + "…"


def _origin(shell: Any, names: str) -> dict[str, str]:
    """Return where a job comes from: the notebook and its cell, as far as the front end tells."""
    notebook = shell.user_ns.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME") or ""
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = str((parent.get("metadata") or {}).get("cellId") or "")
    return {"notebook": str(notebook), "cell": cell, "function": f"cell:{cell or names}"}


def _preview(
    pool: Pool,
    options: argparse.Namespace,
    kind: str,
    name: str,
    tasks: list[dict[str, Any]] | None,
    after: list[str],
    inputs: dict[str, Any],
    out: Sequence[str],
    sizes: dict[str, int] | None = None,
) -> None:
    from .executor import parse_batch
    from .launch import make_spec, preview
    from .spec import Resources

    spec = make_spec(
        pool, kind=kind, name=name, tasks=1 if tasks is None else len(tasks), array=tasks is not None,
        resources=Resources.parse(pool.config.resources, **asked(options)), batch=parse_batch(_batch(options.batch)),
        after=after, out=out, directory=options.directory,
    )  # fmt: skip
    submissions = preview(pool, spec)
    # Backends with a submit command have it as a pure function in their module.
    command = getattr(sys.modules[type(pool.backend).__module__], "submit_command", None)
    lines = [f"Nothing is submitted (--dry-run). Pool {pool.name!r}, kind {pool.kind}."]
    if tasks is not None:
        batches = sum(submission.count for submission, _ in submissions)
        lines.append(f"Array: {len(tasks)} tasks in {batches} batches, from {tasks[0]} to {tasks[-1]}")
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


def _wait(job: Job | ArrayJob) -> None:
    from . import widgets

    widgets.wait(job)


def cell_magic(shell: Any, kind: str) -> Callable[[str, str], Any]:
    """Return the cell magic for pools of one kind; its help is that of its parser."""
    parser = cell_parser(kind)

    def magic(line: str, cell: str) -> Any:
        return run_cell(shell, kind, parser.parse(line), cell)

    magic.__name__, magic.__doc__ = kind, parser.format_help()
    return magic


def register(shell: Any) -> None:
    """Register the magics and their completion."""
    for kind in KINDS:
        shell.register_magic_function(cell_magic(shell, kind), "cell", kind)
