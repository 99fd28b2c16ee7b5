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
        What the job raised; shown in one line, as its traceback is under the card.
    KeyboardInterrupt
        The user waits no longer; the job goes on.
    """
    from ..handles import Job
    from .live import card

    shown = card(job, "", True)
    shown.waiting = True
    try:
        if isinstance(job, Job):
            concurrent.futures.wait([job])
        else:
            job.wait()
    except KeyboardInterrupt as error:
        said = f"waiting stopped; job {job.id} goes on. job.result() waits again, job.cancel() ends it"
        raise _in_one_line(error, said) from None
    finally:
        shown.waiting = False
        shown.refresh()
    try:
        job.result()
    except Exception as error:  # noqa: BLE001  whatever the job raised
        raise _in_one_line(error, f"{type(error).__name__}: {error} (job {job.id})") from None


def replay(outputs: list[dict[str, Any]]) -> None:
    """Show outputs in nbformat's form under the running cell."""
    from .live import replay

    replay(outputs)


def _in_one_line(error: BaseException, said: str) -> BaseException:
    error._render_traceback_ = lambda: [said]  # type: ignore[attr-defined]
    return error
