"""Follows all jobs while the server lives, whoever submits them, and tells what has changed; one thread."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import HybridError
from ..pool import default_store, get_pool
from ..tracker import RENEW, tracker
from .pools import ACTIVE, Pools
from .rows import Rows

log = logging.getLogger(__name__)

TICK = 0.25
"""Seconds between two looks, and so between two messages."""
_LOOK = 1.0
"""Least seconds between two looks for jobs that have come, and at the pools."""
TOLD = 200
"""Most jobs in a message."""
_REMOVED = 10_000

Tell = Callable[[str, dict[str, Any]], None]
"""Called with ``"jobs"`` or ``"pools"`` and the message."""


class Follower:
    """Runs the Tracker for all pools that have unfinished jobs, and looks what has changed in the Store.

    The lease of each pool makes one process of all the one that asks its scheduler: this one, or a kernel that was
    there first, and from whose end on this one. However much changes, there is one message in a tick.

    Parameters
    ----------
    pools, rows
        What turns changes into JSON.
    tell : callable
        Called, in the thread, with each message.
    """

    def __init__(self, pools: Pools, rows: Rows, tell: Tell) -> None:
        self._pools, self._rows, self._tell = pools, rows, tell
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._changes = -1
        self._looked = self._took = float("-inf")
        self._ids: set[str] = set()
        self._shown: list[dict[str, Any]] = []
        self._removed: deque[tuple[int, str]] = deque(maxlen=_REMOVED)
        self._lock = threading.Lock()
        self._said = ""
        self.begun = self.seq = -1
        self.ready = threading.Event()  # whoever asks from now on is told of all that changes after the answer

    def start(self) -> None:
        """Begin; what has changed from now on is told."""
        self._thread = threading.Thread(target=self._run, name="hybrid-server following", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and give back the leases, so that a kernel takes over at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2.0)
        tracker.stop()

    def expect(self, job_id: str) -> None:
        """Count a job as known that is about to be removed: it may be younger than the last look."""
        with self._lock:
            self._ids.add(job_id)

    def removed(self, since: int) -> tuple[list[str], bool]:
        """Return the jobs removed after a sequence number, and whether that is all there is to know.

        It is not of what was before this server began, nor where the Store itself was replaced.
        """
        with self._lock:
            return [job_id for seq, job_id in self._removed if seq > since], self.begun <= since <= self.seq

    def _run(self) -> None:
        self._look_and_live()
        while not self._ended.wait(TICK):
            self._look_and_live()
        with contextlib.suppress(HybridError):
            default_store().close()

    def _look_and_live(self) -> None:
        try:
            self._look()
            self._said = ""
        except Exception as error:  # the thread must outlive whatever happens, or nothing would be told any more
            if str(error) != self._said:
                self._said = str(error)
                unexpected = not isinstance(error, HybridError)
                log.warning("changes of jobs cannot be told: %s", error, exc_info=unexpected)

    def _look(self) -> None:
        if self.begun < 0:
            self.seq = default_store().sequence()
            self._ids = default_store().ids()
            self.begun = self.seq
            self.ready.set()
        now, changes = time.monotonic(), default_store().changes()
        # The sequence, too: in a Store that was replaced, the other number may be what it was.
        news = changes != self._changes or default_store().sequence() != self.seq
        if (news and now - self._took >= _LOOK) or now - self._took >= RENEW:
            self._took = now
            self._take_up()
        if not news:
            return
        self._look_at_jobs()
        if now - self._looked >= _LOOK:
            self._looked = now
            self._look_at_pools()
            self._changes = changes  # only now: what was left out is looked at in the next tick

    def _take_up(self) -> None:
        store = default_store()
        for name in self._pools.names():
            if store.count(states=ACTIVE, pool=name):
                tracker.pool(get_pool(name)).start()

    def _look_at_jobs(self) -> None:
        store = default_store()
        seq = store.sequence()
        if seq == self.seq:
            return
        since, reset = self.seq, seq < self.seq  # the Store was deleted and begins anew
        rows = [] if reset else store.page(order="seq", descending=False, beyond=(since, "{"), limit=TOLD + 1)
        more = len(rows) > TOLD
        with self._lock:
            known = self._ids | {row.id for row in rows}
            if more or reset or store.size() != len(known):
                known = store.ids()
            gone = sorted(self._ids - known)
            self._ids, self.seq = known, seq
            self._removed.extend((seq, job_id) for job_id in gone)
            if reset:
                self.begun = seq
                self._removed.clear()
        message = {
            "seq": seq,
            "since": since,
            "jobs": [self._rows.json(row) for row in rows[:TOLD]],
            "removed": gone[:TOLD],
            "more": more or len(gone) > TOLD,
            "reset": reset,
        }
        self._tell("jobs", message)

    def _look_at_pools(self) -> None:
        pools = self._pools.all()
        if pools != self._shown:
            self._shown = pools
            self._tell("pools", {"pools": pools})
