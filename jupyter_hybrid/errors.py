"""The errors of the package: each says what was wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HybridError(Exception):
    """Base class of every error that jupyter_hybrid raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: the message says what to do, a traceback through this package would not."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(HybridError):
    """A pool configuration file, or the set of pools it describes, is wrong."""


class ResourceError(HybridError, ValueError):
    """A resource request is malformed (``memory="8Q"``) or out of range."""


class CaptureError(HybridError):
    """What a cell or function needs cannot travel to the pool."""


class SubmitRejected(HybridError):
    """The scheduler refused the submission; the message carries its own words.

    `temporary` says that the same submission may be taken later, when fewer jobs wait.
    """

    temporary = False


class PoolUnreachable(HybridError):
    """The scheduler did not answer; nothing is known to have changed."""


class SubmitUnclear(PoolUnreachable):
    """The scheduler broke off during a submission: it may or may not have taken it."""


class JobNotFound(HybridError, KeyError):
    """No job, or more than one job, has this id."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class JobFailed(HybridError):
    """A job ended without a result for a reason other than an exception in the user's code.

    Attributes
    ----------
    cause : jupyter_hybrid.Cause or None
        Why it ended.
    """

    def __init__(self, message: str, cause: object = None) -> None:
        super().__init__(message)
        self.cause = cause


class RemoteError(HybridError):
    """Carries the traceback of the node as the ``__cause__`` of the user's own exception."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0]) if self.args else ""


class ResultLost(JobFailed):
    """A result file is missing, cut short or altered; ``retry()`` runs only what is lost."""


class StoreError(HybridError):
    """The Store cannot be read or written (newer schema, full disk, no permission)."""


def near_match(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
