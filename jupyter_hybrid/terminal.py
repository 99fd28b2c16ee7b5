"""What ``jupyter hybrid`` shows: answers on standard output, notes and progress on standard error."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from typing import Any

from .store import JobRow


class Line:
    """The line on which long work shows how far it is: on standard error, and only on a terminal."""

    def __init__(self) -> None:
        self.shown = False

    def show(self, text: str) -> None:
        """Put a text in place of the one before."""
        if sys.stderr.isatty():
            width = os.get_terminal_size(2).columns or 80  # 0: the terminal does not know
            sys.stderr.write(f"\r\x1b[K{text[: max(1, width - 1)]}")
            sys.stderr.flush()
            self.shown = True

    def clear(self) -> None:
        """Take it away, before anything else is written."""
        if self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self.shown = False


line = Line()


def print_text(text: str) -> None:
    """Write an answer."""
    line.clear()
    sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")


def note(text: str) -> None:
    """Write a line beside the answer."""
    line.clear()
    sys.stdout.flush()
    sys.stderr.write(text + "\n")


def print_json(data: Any, indent: int | None = 2) -> None:
    """Write an answer as JSON; without indent on one line."""
    print_text(json.dumps(data, indent=indent, ensure_ascii=False))


def job_json(row: JobRow) -> dict[str, Any]:
    """Return a job as JSON has it."""
    return {**row._asdict(), "state": row.state.value, "cause": row.cause.value if row.cause else None}


def when(seconds: float) -> str:
    """Return a moment as a person reads it."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
