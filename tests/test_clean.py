"""Removal of finished jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid import clean
from jupyter_hybrid.errors import HybridError, JobNotFound
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.spec import JobState

DEADLINE = 60.0


def until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def ended() -> hy.Job:
    job = hy.Executor("local").submit(int, "x")
    until(lambda: job.state.final)
    return job


def test_a_removed_job_is_gone(ended: hy.Job) -> None:
    assert [each.row.id for each in clean.find()] == [ended.id]
    assert clean.remove(ended.row())
    assert not ended.folder.exists()
    with pytest.raises(JobNotFound):
        hy.job(ended.id)
    with pytest.raises(JobNotFound):
        ended.retry()
    assert clean.find() == []


def test_a_job_that_is_being_retried_stays(ended: hy.Job) -> None:
    row = ended.row()
    with ended.run.folder.submitting() as lock:  # as retry() has it, before and after the Store hears of the round
        assert lock is not None
        assert not clean.remove(row)
    assert (ended.folder / "spec.json").exists()
    ended.retry()
    until(lambda: ended.state.final)
    assert ended.state is JobState.FAILED


def test_a_retry_that_comes_too_late_finds_no_job(ended: hy.Job) -> None:
    (ended.folder / "spec.json").unlink()  # so far the removal has come
    with pytest.raises(HybridError, match="was removed"):
        ended.retry()
    assert default_store().job(ended.id).state is JobState.FAILED


def test_an_interrupted_removal_is_finished_by_the_next(ended: hy.Job) -> None:
    (ended.folder / "spec.json").unlink()
    assert clean.remove(ended.row())
    assert not ended.folder.exists()
    again = hy.Executor("local").submit(int, "x")
    until(lambda: again.state.final)
    again.run.folder.remove()
    assert clean.remove(again.row())
    assert hy.jobs() == []
