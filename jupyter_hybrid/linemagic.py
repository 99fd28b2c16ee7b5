"""The verbs of ``%hybrid``: each calls the package and shows its answer."""

from __future__ import annotations

import argparse
from typing import Any

from . import launch, listing, widgets
from .cellmagic import asked, binder, find_job
from .handles import ArrayJob, Job


def run_verb(shell: Any, options: argparse.Namespace) -> Any:
    """Do what one verb says; what it returns is the value of the line."""
    verb = options.verb
    if verb == "jobs":
        return listing.jobs(state=options.state, pool=options.pool, name=options.name, limit=options.limit)
    if verb == "pools":
        return listing.pools()
    if verb == "doctor":
        from . import doctor

        return doctor.run(options.pools or None)
    return _of_job(shell, options, find_job(shell, options.job))


def _of_job(shell: Any, options: argparse.Namespace, job: Job | ArrayJob) -> Any:
    verb = options.verb
    if job.bind is None and job.spec.kind == "cell":
        job.bind = binder(shell, job)  # a cell of an earlier kernel gives its names to this one
    if verb == "logs":
        _say("\n".join(job.logs().splitlines()[-(options.tail or 0) :]))
    elif verb == "script":
        _say(job.script)
    elif verb == "why":
        _say("\n".join(job.why()))
    elif verb == "cancel":
        _say(f"job {job.id} is being cancelled" if job.cancel() else f"job {job.id} had ended: {job.state}")
    elif verb == "retry":
        if job.state.final and not launch.missing_tasks(job.run):
            _say(f"job {job.id}: nothing to run again, all results are intact")
            return None
        return job.retry(**asked(options))
    elif verb == "wait":
        widgets.wait(job)
    elif verb == "result":
        value = job.result()
        if job.spec.kind != "cell":
            return value
        _say(f"bound: {', '.join(job.spec.out) or 'nothing, the cell gives nothing back'}")
    return None


def _say(text: str) -> None:
    print(text)  # noqa: T201
