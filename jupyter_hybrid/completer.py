"""Completion with Tab on the lines of the magics: options, pools, partitions, jobs. No scheduler is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from IPython.core.completer import SimpleCompletion, context_matcher

from .errors import HybridError
from .magics import KINDS, OptionParser, cell_parser, hybrid_parser

_JOBS = 30
"""Newest jobs that are offered."""


def register(shell: Any) -> None:
    """Let IPython ask here for the lines of the magics, and nobody else if there is an answer."""
    parsers = {f"%%{kind}": (cell_parser(kind), kind) for kind in KINDS} | {"%hybrid": (hybrid_parser(), "")}

    @context_matcher()  # type: ignore[untyped-decorator]
    def hybrid_matcher(context: Any) -> dict[str, Any]:
        line, symbol = context.text_until_cursor, context.token
        magic = line.split(maxsplit=1)[0] if line.strip() else ""
        found: list[str] = []
        if magic in parsers and line != magic:
            texts = candidates(shell, *parsers[magic], line.removesuffix(symbol), symbol)
            found = [text for text in texts if text.startswith(symbol)]
        return {"completions": list(map(SimpleCompletion, found)), "suppress": bool(found), "ordered": True}

    shell.Completer.custom_matchers.append(hybrid_matcher)


def candidates(shell: Any, parser: OptionParser, kind: str, head: str, symbol: str) -> Iterable[str]:
    """Return what could stand where the cursor is.

    Parameters
    ----------
    parser : OptionParser
        Parser of the magic.
    kind : str
        Kind of the pools of a cell magic; empty for ``%hybrid``.
    head : str
        The line up to the word, or the part of a word, that is to be completed.
    symbol : str
        What is there of it already.
    """
    words = head.split()[1:]
    if parser.verbs:
        if not words:
            return parser.verbs
        if words[0] not in parser.verbs:
            return []
        parser = parser.verbs[words.pop(0)]
    last = words[-1] if words else ""
    if last.endswith(",") and len(words) > 1:  # one of several names
        last = words[-2]
    gives = parser.values.get(last.removesuffix("="))
    if gives is not None:
        return _offered(shell, gives, kind, words)
    if parser.positional and not symbol.startswith("-"):
        return _offered(shell, parser.positional, kind, words)
    return parser.values


def _offered(shell: Any, gives: str, kind: str, words: list[str]) -> Iterable[str]:
    try:
        if gives == "pool":
            return _pools(kind)
        if gives == "partition":
            return _partitions(kind, words)
        if gives == "job":
            return _jobs(shell)
    except HybridError:  # a broken configuration is told when the magic runs
        return []
    return _STATES if gives == "state" else []


_STATES = ("new", "pending", "running", "completed", "failed", "cancelled", "timeout", "unknown")


def _pools(kind: str) -> list[str]:
    from .config import load

    return [name for name, pool in load().pools.items() if kind in ("", pool.kind)]


def _partitions(kind: str, words: list[str]) -> list[str]:
    """Return the partitions that the pool's last snapshot has."""
    from .pool import default_store, get_pool, snapshot_from_json

    line = [part for word in words for part in word.split("=", 1)]
    name = next((value for option, value in itertools.pairwise(line) if option == "--pool"), None)
    snapshot = default_store().pool(get_pool(name, kind or None).name).snapshot
    return [] if snapshot is None else [partition.name for partition in snapshot_from_json(snapshot).partitions]


def _jobs(shell: Any) -> list[str]:
    from .handles import Handle
    from .pool import default_store

    own = [name for name, value in shell.user_ns.items() if isinstance(value, Handle) and not name.startswith("_")]
    return own + [row.id for row in default_store().jobs(limit=_JOBS)]
