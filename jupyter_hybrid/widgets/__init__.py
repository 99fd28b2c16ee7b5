"""What a notebook shows of a job."""

from __future__ import annotations

from typing import Any


def show(job: Any, label: str = "", outputs: bool = False) -> None:
    """Show a job."""
    print(repr(job))


def wait(job: Any) -> None:
    """Wait for a job."""
    job.result()
