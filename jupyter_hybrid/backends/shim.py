"""The shim around each script of the local pool: a few lines of sh that keep what a supervisor's death would lose.

The shim holds a lock on the element's file and writes there when the script starts and how it ended:

==================== ==================== =====================================
lock                 file                 meaning
==================== ==================== =====================================
held                                      the shim lives
free                 ``exit N``           the script ended with status N
free                 ``start PID`` only   the shim died without a word
free                 empty or missing     the script was never started
==================== ==================== =====================================

The lock belongs to the open file that the shim inherits, so it is held from before the shim's first instruction to its
last, and by nothing else: the script does not inherit it.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .. import process

_TEXT = """trap : HUP INT QUIT TERM PIPE ALRM USR1 USR2
echo "start $$" >&9 || exit 75
"$0" </dev/null 9>&-
code=$?
echo "exit $code" >&9
exit $code
"""
LOCK = 9
"""Descriptor of the locked file: sh redirects only one-digit ones. :func:`reserve` keeps it free for that."""


def reserve() -> None:
    """Occupy the descriptor of the lock, so that nothing else gets this number."""
    null = os.open(os.devnull, os.O_RDONLY)
    if null == LOCK:
        return
    os.dup2(null, LOCK, inheritable=False)
    os.close(null)


def start(file: str, script: str, log: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a script, in its own folder, under a shim that holds the lock on `file`."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.dup2(descriptor, LOCK, inheritable=False)
    finally:
        os.close(descriptor)
    try:
        command = ["/bin/sh", "-c", _TEXT, script]
        return process.spawn(command, log=log, env=environment, cwd=os.path.dirname(script), pass_fds=[LOCK])
    finally:
        reserve()


def is_held(file: str) -> bool:
    """Return whether the shim of this file lives."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def words(file: str) -> dict[str, int]:
    """Return what the shim has written, ``{"start": pid, "exit": status}``; complete lines only."""
    try:
        text = Path(file).read_text(errors="replace")
    except FileNotFoundError:
        return {}
    return {word: int(number) for word, number in re.findall(r"^(start|exit) (\d+)\n", text, re.MULTILINE)}
