"""The verbs of ``jupyter hybrid`` that keep things going: doctor, reindex, track, practice, clean."""

from __future__ import annotations

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from . import clean as removal
from . import config, launch
from .errors import HybridError, JobNotFound
from .listing import Table, job_line, parse_states
from .pool import default_store, get_pool
from .spec import JobState, parse_time
from .store import JobRow
from .terminal import job_json, line, print_json, print_text, when
from .tracker import step_all, tracker
from .verbs import bring_up_to_date

_LOOK = 1.0
"""Seconds between two looks for new jobs."""


def doctor(arguments: Namespace) -> int:
    """Check pools end to end; exit status 0 if all work."""
    from .doctor import run

    timeout = parse_time(arguments.timeout).total_seconds()
    report = run(arguments.pools, timeout, line.show)
    if arguments.json:
        print_json(report.to_json())
    else:
        print_text(repr(report))
    return 0 if report.ok else 1


def reindex(arguments: Namespace) -> int:
    """Build the Store anew, and find out how its jobs ended."""
    line.show("reading the run folders …")
    found = launch.reindex()
    line.show(f"{found} jobs found; looking how they ended …")
    step_all()
    if arguments.json:
        print_json({"jobs": found})
    else:
        print_text(f"{found} job{'s' * (found != 1)} found")
    return 0


def track(arguments: Namespace) -> int:
    """Follow all unfinished jobs in the foreground, and tell what becomes of them."""
    loaded = config.load()
    names = arguments.pools or list(loaded.pools)
    for name in names:
        loaded.pool(name)
    store = default_store()
    seen = store.sequence()
    known: dict[str, JobState] = {}

    def report(rows: Iterable[JobRow]) -> None:
        """Show the jobs whose state is news."""
        for row in sorted(rows, key=lambda row: row.seq):
            if row.pool not in names or known.get(row.id) is row.state:
                continue
            known[row.id] = row.state
            if arguments.json:
                print_json(job_json(row), indent=None)
            else:
                cause = f" ({row.cause})" if row.cause else ""
                print_text(f"{when(time.time())}  {row.id}  {row.name}  {row.pool}  {row.state}{cause}")
            sys.stdout.flush()

    report(row for name in names for row in store.active(name))
    if arguments.once:
        step_all(names)
        report(store.jobs(after_seq=seen))
        return 0
    while True:
        active = {name: store.active(name) for name in names}
        for name, rows in active.items():
            if rows:
                tracker.pool(get_pool(name)).start()
        if (now := store.sequence()) != seen:
            report(store.jobs(after_seq=seen))
            seen = now
        left = sum(map(len, active.values()))
        if arguments.until_idle and not left:
            return 0
        away = [name for name in names if store.pool(name).unreachable_since is not None]
        unreachable = f"; unreachable: {', '.join(away)}" if away else ""
        line.show(f"{left} unfinished{unreachable}; Ctrl-C ends the tracking, not the jobs")
        time.sleep(_LOOK)


def practice(arguments: Namespace) -> int:
    """Start, show or end the practice cluster."""
    from .practice import slurm_down, slurm_load, slurm_up

    name = arguments.name
    if arguments.action == "down":
        line.show(f"ending practice cluster {name} …")
        slurm_down(name)
        if arguments.json:
            print_json({"name": name, "up": False})
        else:
            print_text(f"practice cluster {name!r} is down, and its pool is gone")
        return 0
    if arguments.action == "up":
        line.show("starting a Slurm …")
        cluster = slurm_up(name, nodes=arguments.nodes, cpus=arguments.cpus, accounting=arguments.accounting)
    else:
        cluster = slurm_load(name)
    status = cluster.status()
    if arguments.json:
        print_json(status)
    elif arguments.action == "up":
        option = "" if name == "practice" else f" --name {name}"
        print_text(_NEXT.format(name=name, nodes=cluster.nodes, cpus=cluster.cpus, conf=cluster.conf, option=option))
    else:
        dead = [daemon for daemon, seen in status["daemons"].items() if not seen["alive"]]
        print_text(f"practice cluster {name!r} in {cluster.folder}: {'up' if status['up'] else 'not up'}")
        print_text("\n".join(f"  {node}  {state}" for node, state in status["nodes"].items()))
        if dead:
            print_text(f"not running: {', '.join(dead)}; 'jupyter hybrid practice slurm up --name {name}' starts them")
    return 0 if status["up"] else 1


_NEXT = """\
A Slurm of {nodes} nodes with {cpus} cpus each is up; its pool is {name!r}. In a notebook:

    %load_ext jupyter_hybrid

    %%slurm --pool {name} --cpus 2 --time 5min
    import socket
    where = socket.gethostname()

Its own commands, in this shell:  export SLURM_CONF={conf}
Check it:  jupyter hybrid doctor {name}
End it:    jupyter hybrid practice slurm down{option}"""


def clean(arguments: Namespace) -> int:
    """Remove finished jobs, after asking; where nobody can be asked, only with --yes."""
    if not (arguments.yes or arguments.dry_run or sys.stdin.isatty()):
        raise HybridError("clean removes jobs with their results: --yes confirms it, --dry-run shows what it would be")
    given = arguments.older_than or ("0s" if arguments.ids else "30d")
    age = 0.0 if given.strip("smhdw ") == "0" else parse_time(given).total_seconds()
    bring_up_to_date()
    states = parse_states(arguments.state) or removal.FINAL
    found = removal.find(arguments.ids, older_than=age, states=states, tell=line.show)
    total = sum(each.size for each in found)
    jobs = f"{len(found)} finished job{'s' * (len(found) != 1)}"
    if not arguments.json:
        if found:
            print_text(repr(Table((_clean_line(each) for each in found), _CLEAN_COLUMNS, "")))
        print_text(f"{jobs}, {_bytes(total)}")
    doing = bool(found) and not arguments.dry_run
    if doing and not arguments.yes:
        sys.stdout.flush()
        sys.stderr.write(f"Remove {jobs} with all results? [y/N] ")
        sys.stderr.flush()
        doing = sys.stdin.readline().strip().lower() in ("y", "yes")
    removed = []
    for number, each in enumerate(found if doing else ()):
        line.show(f"removing: {number} of {len(found)}")
        with contextlib.suppress(JobNotFound):  # another one cleans too
            if removal.remove(each.row):
                removed.append(each)
    freed = sum(each.size for each in removed)
    if arguments.json:
        listed = [{"id": each.row.id, "name": each.row.name, "bytes": each.size} for each in found]
        print_json({"found": listed, "bytes": total, "removed": [each.row.id for each in removed], "freed": freed})
    elif doing:
        print_text(f"removed {len(removed)}, {_bytes(freed)} freed")
    return 0


_CLEAN_COLUMNS = ("id", "name", "pool", "state", "ended", "size")


def _clean_line(each: removal.Removable) -> dict[str, Any]:
    row = each.row
    line = {column: job_line(row)[column] for column in ("id", "name", "pool", "state")}
    return {**line, "ended": when(row.ended or row.created), "size": _bytes(each.size)}


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
