"""The magics ``%%local``, ``%%slurm`` and ``%hybrid``: parse, call, show. What is heavy is loaded when it is used."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import MagicArgumentParser

from .errors import near_match

KINDS = ("local", "slurm")
"""Kinds of pools that have a cell magic of their own."""

_EXAMPLE = """\
example:
  %%{kind} --cpus 2 --memory 4G --time 30min --out score
  score = fit(X, y)              # X, y and fit travel with the cell

  job = _                        # the cell's value is the Job
  job.result()                   # waits, and binds score here

  %%{kind} --array seed=range(100) --out score --cache
  score = fit(X, y, seed)        # 100 tasks; arr.results() has 100 scores

  %hybrid jobs                   # all jobs; %hybrid alone shows what else there is"""


_LISTS = (["--in"], ["--out"], ["--after"])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=110)


class OptionParser(MagicArgumentParser):  # type: ignore[misc]
    """Parses the line of a magic; what is wrong in it is a UsageError that names it and the near match."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog=prog, formatter_class=_HelpFormatter, **settings)
        self.allow_abbrev = False  # a later option must not change what a notebook means
        self.verbs: dict[str, OptionParser] = {}
        self.values: dict[str, str | None] = {}  # what Tab offers for an option's value; None: it has no value
        self.positional = ""  # what Tab offers for a word that is no option

    def option(self, name: str, **settings: Any) -> None:
        """Add an option; `gives` tells what Tab offers for its value."""
        gives = settings.pop("gives", "")
        if name.startswith("-"):
            self.values[name] = None if settings.get("action") == "store_true" else gives
        else:
            self.positional = gives
        self.add_argument(name, **settings)

    def error(self, message: str) -> None:
        """Raise what is wrong."""
        raise UsageError(f"{self.prog}: {message}")

    def parse(self, line: str) -> argparse.Namespace:
        """Return the options on the magic's line."""
        words = split(line)
        if self.verbs and words and not words[0].startswith("-") and words[0] not in self.verbs:
            near = near_match(words[0], self.verbs)
            raise UsageError(f"{self.prog}: no verb {words[0]!r}{near} (verbs are {', '.join(self.verbs)})")
        found, unknown = self.parse_known_args(words)
        if unknown:
            word = unknown[0].partition("=")[0]
            parser = self.verbs.get(getattr(found, "verb", None) or "", self)
            near = near_match(word, parser.values)
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
        if words[-2:-1] in _LISTS and words[-1].endswith(","):  # `--out a, b`
            words[-1] += word
        else:
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


def hybrid_parser() -> OptionParser:
    """Return the parser of the line of ``%hybrid``."""
    parser = OptionParser("%hybrid", description="Jobs and pools of all notebooks; options complete with Tab.")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB [OPTIONS]", parser_class=OptionParser)

    def verb(name: str, words: str, job: bool = False) -> OptionParser:
        made: OptionParser = verbs.add_parser(name, prog=f"%hybrid {name}", description=words, help=words)
        parser.verbs[name] = made
        if job:
            made.option("job", metavar="JOB", gives="job", help="its id, the beginning of it, or a variable")
        return made

    jobs = verb("jobs", "the newest jobs")
    jobs.option("--state", metavar="STATES", gives="state", default="", help="only in these states: running,failed")
    jobs.option("--pool", metavar="NAME", gives="pool", help="only on this pool")
    jobs.option("--name", metavar="TEXT", help="only with this in the name")
    jobs.option("--limit", metavar="N", type=int, default=30, help="at most so many (default 30)")
    verb("pools", "the pools, with what is free")
    logs = verb("logs", "what a job wrote", job=True)
    logs.option("--tail", metavar="N", type=int, help="only the last N lines")
    verb("cancel", "end a job", job=True)
    _resource_options(verb("retry", "run again what has no result, with other resources if given", job=True))
    verb("wait", "wait for a job, and bind the names it gives back", job=True)
    verb("result", "load a result; the names that a cell gives back are bound", job=True)
    verb("script", "exactly what the scheduler got", job=True)
    verb("why", "why a cached result was not used", job=True)
    doctor = verb("doctor", "check pools end to end")
    doctor.option("pools", metavar="POOL", gives="pool", nargs="*", help="only these")
    return parser


def cell_magic(shell: Any, kind: str) -> Callable[[str, str], Any]:
    """Return the cell magic for pools of one kind; its help is that of its parser."""
    parser = cell_parser(kind)

    def magic(line: str, cell: str) -> Any:
        options = parser.parse(line)
        from .cellmagic import run_cell

        return run_cell(shell, kind, options, cell)

    magic.__name__, magic.__doc__ = kind, parser.format_help()
    return magic


def line_magic(shell: Any) -> Callable[[str], Any]:
    """Return ``%hybrid``."""
    parser = hybrid_parser()

    def hybrid(line: str) -> Any:
        options = parser.parse(line)
        if options.verb is None:
            print(parser.format_help())  # noqa: T201
            return None
        from .linemagic import run_verb

        return run_verb(shell, options)

    hybrid.__doc__ = parser.format_help()
    return hybrid


def register(shell: Any) -> None:
    """Register the magics and their completion."""
    from . import completer

    for kind in KINDS:
        shell.register_magic_function(cell_magic(shell, kind), "cell", kind)
    shell.register_magic_function(line_magic(shell), "line", "hybrid")
    completer.register(shell)
