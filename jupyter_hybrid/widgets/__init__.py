"""What a notebook shows of a job: a card that updates in place, its outputs below, buttons; one line in a terminal."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..handles import ArrayJob, Job


def show(job: Job | ArrayJob, label: str = "", outputs: bool = False) -> None:
    """Show a job's card under the running cell, once; it follows the job until its end.

    Parameters
    ----------
    job : Job or ArrayJob
        The job.
    label : str
        What the notebook calls it, for hints.
    outputs : bool
        Whether what the job's cell displays is shown below the card as it comes.
    """
    from .live import card, here

    shown = here(job)
    if shown is None:
        card(job, label, outputs)
    elif not shown.kernel:
        print(repr(job))  # noqa: T201  after the prompt that IPython has written


def wait(job: Job | ArrayJob) -> None:
    """Wait until a job has ended, with its card up to date, and bind the names it gives back.

    Raises
    ------
    Exception
        What the job raised, shown with the traceback of the node; in one line if that has been shown already.
    KeyboardInterrupt
        The user waits no longer; the job goes on.
    """
    from ..errors import JobFailed
    from ..handles import Job
    from .live import card

    shown = card(job, "", True)
    shown.waiting = True
    shown.withhold_error()
    try:
        if isinstance(job, Job):
            concurrent.futures.wait([job])
        else:
            job.wait()
    except KeyboardInterrupt as error:
        shown.settle_error(raised=False)
        said = f"waiting stopped; job {job.id} goes on. job.result() waits again, job.cancel() ends it"
        raise _shown_as(error, [said]) from None
    finally:
        shown.waiting = False
        shown.refresh()
    try:
        job.result()
    except Exception as error:  # noqa: BLE001  whatever the job raised
        own = not isinstance(error, JobFailed)
        traceback = shown.settle_error(raised=own)
        if own and not traceback and not shown.kernel:  # in a notebook it is in the card
            traceback = [_of_node(job, error)]
        # Advice and the end of the log are in the card.
        first = next(iter(str(error).splitlines()), "")
        said = f"{type(error).__name__}: {first}" + (f" (job {job.id})" if job.id not in first else "")
        raise _shown_as(error, traceback or [said]) from None
    shown.settle_error(raised=False)


def replay(outputs: list[dict[str, Any]]) -> None:
    """Show outputs in nbformat's form under the running cell."""
    from .live import replay

    replay(outputs)


def _of_node(job: Job | ArrayJob, error: Exception) -> str:
    """Return the traceback of the exception that a job has raised."""
    from ..handles import ArrayJob
    from .card import traceback

    if isinstance(job, ArrayJob) and job.spec.kind == "cell":
        return traceback(job.failed[0])
    return str(error.__cause__ or f"{type(error).__name__}: {error}").strip()


def _shown_as(error: BaseException, lines: list[str]) -> BaseException:
    error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]
    return error
