"""The only place that starts processes: argument lists, never a shell, always a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .errors import PoolUnreachable

_inherited = threading.local()

unforked = threading.RLock()
"""Held while a thread uses SQLite: a child that is forked meanwhile would find the database locked for ever."""
os.register_at_fork(before=unforked.acquire, after_in_parent=unforked.release, after_in_child=unforked.release)


@dataclass(frozen=True)
class Completed:
    """An ended command: exit status, standard output and standard error as text."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """What the command said, for an error message."""
        return (self.err.strip() or self.out.strip() or f"exit status {self.code}")[:2000]


class CommandTimeout(PoolUnreachable):
    """A command did not end within its time limit and was killed with all its children."""


class CommandMissing(PoolUnreachable):
    """A command is not installed, or not on PATH."""


@contextlib.contextmanager
def inheriting(descriptor: int) -> Iterator[None]:
    """Let every command this thread runs in the block inherit an open file descriptor.

    A submit command that inherits a locked file keeps the lock for as long as it lives, also when the process that
    started it is killed: who finds the lock free knows that no submit command is under way.
    """
    before: tuple[int, ...] = getattr(_inherited, "descriptors", ())
    _inherited.descriptors = (*before, descriptor)
    try:
        yield
    finally:
        _inherited.descriptors = before


def run(
    argv: Sequence[str],
    *,
    timeout: float = 60.0,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> Completed:
    """Run a command to its end.

    Parameters
    ----------
    argv : sequence of str
        Program and arguments.
    timeout : float
        Seconds after which it is killed with its whole process group.
    input : str, optional
        Text for its standard input, which is empty otherwise.
    env : mapping, optional
        Variables on top of this process's own.
    cwd : str, optional
        Working directory.

    Raises
    ------
    CommandMissing
        There is no such command.
    CommandTimeout
        It did not end in time.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
            start_new_session=True,
            pass_fds=getattr(_inherited, "descriptors", ()),
        )
    except FileNotFoundError:
        if cwd is not None and not os.path.isdir(cwd):
            raise PoolUnreachable(f"cannot run {argv[0]!r} in {cwd}: no such directory") from None
        raise CommandMissing(f"command {argv[0]!r} is not on PATH of this machine") from None
    except PermissionError:
        raise CommandMissing(f"command {argv[0]!r} may not be executed by this user") from None
    except OSError as error:  # too many processes, files or words; nothing was started
        raise PoolUnreachable(f"cannot start {argv[0]!r}: {error.strerror}") from error
    with process:
        try:
            out, err = process.communicate(None if input is None else input.encode(), timeout=timeout)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise CommandTimeout(f"{argv[0]} did not answer within {timeout:g} s") from None
            raise
    return Completed(tuple(argv), process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def spawn(
    argv: Sequence[str],
    *,
    log: str | os.PathLike[str] = os.devnull,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own that outlives this process; its output is appended to `log`."""
    with open(log, "ab", buffering=0) as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
            start_new_session=True,
            pass_fds=pass_fds,
        )
