"""``jupyter hybrid``: the verbs of the package in the shell.

Only :mod:`argparse` is imported here, the rest when a verb needs it. Each verb is a function of its name in
:mod:`jupyter_hybrid.verbs` or :mod:`jupyter_hybrid.upkeep` that takes the parsed arguments and returns the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

RESOURCES = (
    *("cpus", "memory", "time", "gpus", "nodes", "tasks_per_node"),
    *("partition", "qos", "account", "constraint", "priority"),
)
"""What ``retry`` can change."""
_INTERRUPTED = 130
_BROKEN_PIPE = 141

_EPILOG = """\
A job may be given by the beginning of its id. Times are written like 90s, 10min, 1h30m or 30d.
`jupyter hybrid VERB --help` tells the options of a verb.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command, and that of each verb."""
    parser = argparse.ArgumentParser(
        prog="jupyter hybrid",
        description="Jobs of notebooks and scripts on clusters and on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and end")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, help: str, *, json: bool = True) -> argparse.ArgumentParser:
        # No abbreviations: a further option must not change what a script's short form means.
        made = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        if json:
            made.add_argument("--json", action="store_true", help="print JSON")
        return made

    jobs = verb("jobs", "list jobs, newest first")
    jobs.add_argument("--state", action="append", default=[], help="only these, e.g. RUNNING or RUNNING,PENDING")
    jobs.add_argument("--pool", help="only on this pool")
    jobs.add_argument("--name", help="only with this text in the name")
    jobs.add_argument("--limit", type=_count, default=50, help="at most so many (default: %(default)s)")
    jobs.add_argument("--all", action="store_true", help="all of them")

    verb("pools", "list pools with what is free on them")

    logs = verb("logs", "show what a job has written")
    logs.add_argument("id", metavar="ID")
    logs.add_argument("--task", type=int, metavar="N", help="only this task of an array")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")

    cancel = verb("cancel", "cancel jobs, waiting or running")
    cancel.add_argument("ids", metavar="ID", nargs="+")

    retry = verb("retry", "run again what has no result, with other resources if given")
    retry.add_argument("id", metavar="ID")
    for name in RESOURCES:
        retry.add_argument(f"--{name.replace('_', '-')}", dest=name)

    wait = verb("wait", "wait until jobs have ended; exit status 0 if all have completed")
    wait.add_argument("ids", metavar="ID", nargs="+")
    wait.add_argument("--timeout", metavar="TIME", help="give up after this time")

    result = verb("result", "show the result of a job")
    result.add_argument("id", metavar="ID")
    result.add_argument("--task", type=int, metavar="N", help="only of this task of an array")

    script = verb("script", "show exactly what the scheduler got")
    script.add_argument("id", metavar="ID")

    doctor = verb("doctor", "check pools end to end, with a small job on each; exit status 0 if all work")
    doctor.add_argument("pools", metavar="POOL", nargs="*")
    doctor.add_argument("--timeout", metavar="TIME", default="60s", help="for each job (default: %(default)s)")

    verb("reindex", "build the list of jobs anew from the run folders")

    track = verb("track", "follow jobs while no kernel does, until interrupted")
    track.add_argument("--pool", action="append", dest="pools", help="only this pool; may be given several times")
    until = track.add_mutually_exclusive_group()
    until.add_argument("--once", action="store_true", help="do one round and end")
    until.add_argument("--until-idle", action="store_true", help="end when no job is unfinished")

    practice = verb("practice", "a real Slurm of several nodes on this machine")
    practice.add_argument("what", choices=["slurm"])
    practice.add_argument("action", choices=["up", "status", "down"])
    practice.add_argument("--name", default="practice", help="of the cluster and its pool (default: %(default)s)")
    practice.add_argument("--nodes", type=_count, help="number of nodes (default: 4)")
    practice.add_argument("--cpus", type=_count, help="cpus of each, as Slurm counts (default: 8)")
    practice.add_argument("--accounting", action="store_true", help="with an accounting database")

    clean = verb("clean", "remove finished jobs with their results")
    clean.add_argument("ids", metavar="ID", nargs="*", help="these jobs; else all those that are old enough")
    clean.add_argument("--older-than", metavar="TIME", help="ended so long ago (default: 30d; no limit with IDs)")
    clean.add_argument("--state", action="append", default=[], help="only these, e.g. FAILED or FAILED,CANCELLED")
    clean.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    clean.add_argument("--yes", action="store_true", help="do not ask; needed where there is no terminal to ask on")

    why = verb("why", "tell why a cached result was not used")
    why.add_argument("id", metavar="ID")
    return parser, dict(verbs.choices)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments; what is wrong in them ends the process with usage and near match."""
    parser, verbs = _parsers()
    word = argv[0] if argv else ""
    if word and not word.startswith("-") and word not in verbs:
        from .errors import near_match

        parser.error(f"no verb {word!r}{near_match(word, verbs)} (verbs are {', '.join(verbs)})")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        from .errors import near_match

        of_verb = verbs.get(arguments.verb, parser)
        known = {option.strip(",") for option in of_verb.format_help().split() if option.startswith("--")}
        near = near_match(unknown[0].partition("=")[0], sorted(known)) if unknown[0].startswith("-") else ""
        of_verb.error(f"{unknown[0]!r} is not understood{near}")
    return arguments


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 good, 1 failed, 2 wrong usage, 130 interrupted)."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        try:
            if arguments.version:
                from . import __version__

                sys.stdout.write(f"{__version__}\n")
                return 0
            if arguments.verb is None:
                build_parser().print_help()
                return 2
            return _call(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at its end, and would complain.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED


def _call(arguments: argparse.Namespace) -> int:
    import atexit

    from . import upkeep, verbs
    from .errors import HybridError
    from .terminal import line
    from .tracker import tracker

    # Every verb waits for schedulers as long as it should: the exit must not hang on one.
    atexit.unregister(tracker.flush)
    home = upkeep if arguments.verb in ("doctor", "reindex", "track", "practice", "clean") else verbs
    try:
        status: int = getattr(home, arguments.verb)(arguments)
    except HybridError as error:
        sys.stdout.flush()
        line.clear()
        sys.stderr.write(f"jupyter hybrid: {str(error).strip()}\n")
        return 1
    finally:
        line.clear()
        tracker.leave()
    return status
