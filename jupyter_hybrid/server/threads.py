"""Threads for what may block: each concern has a few of its own, so that none waits for another's."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ..errors import HybridError
from ..pool import default_store

P = ParamSpec("P")
T = TypeVar("T")

_WAITING = 100
"""Calls that may wait for the threads of one concern."""


class Busy(HybridError):
    """What was asked for takes too long, or too much waits for it already."""


class Threads:
    """A few threads for one concern. They are daemons: a command that hangs does not keep the server from ending.

    Parameters
    ----------
    concern : str
        What they do, as error messages call it: ``"the storage"``.
    count : int
        How many.
    seconds : float
        How long a caller waits; what was begun goes on.
    """

    def __init__(self, concern: str, count: int, seconds: float) -> None:
        self.concern, self.count, self.seconds = concern, count, seconds
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def __call__(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Return what a function returns that one of the threads calls.

        Raises
        ------
        Busy
            It has not come to its end in time.
        """
        if self.waiting >= _WAITING:
            raise Busy(f"{self.concern} is busy: {_WAITING} requests wait for it")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, lambda: function(*arguments, **named)))
        if len(self._threads) < self.count:
            thread = threading.Thread(target=self._work, name=f"hybrid-server {self.concern}", daemon=True)
            self._threads.append(thread)
            thread.start()
        answer = asyncio.wrap_future(future)
        # Not wait_for(), which before Python 3.12 may take a cancellation for an answer.
        done, _ = await asyncio.wait([answer], timeout=self.seconds)
        if not done:
            answer.cancel()
            raise Busy(f"{self.concern} has not answered within {self.seconds:g} s")
        return answer.result()

    @property
    def waiting(self) -> int:
        """Number of calls that no thread has begun."""
        return self._calls.qsize()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            if not future.set_running_or_notify_cancel():
                continue  # nobody waits any more
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  for who waits
                future.set_exception(error)
            del call, future, function
        default_store().close()

    def stop(self, wait: float = 1.0) -> None:
        """End the threads that have nothing to do; others end with what they do, or with the process."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(wait)
        self._threads.clear()
