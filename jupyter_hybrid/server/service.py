"""What the handlers call: every answer as a coroutine that blocks nothing, whatever hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..errors import HybridError, JobNotFound
from ..pool import default_store
from ..tracker import tracker
from . import logs, metrics
from .acts import DOCTOR, Acts
from .following import Follower, Tell
from .jobs import Jobs
from .pools import Pools
from .rows import MOST, Rows, integer
from .threads import Threads

log = logging.getLogger(__name__)

_ANSWER = 30.0
"""Seconds that a request waits for storage or scheduler."""
_READY = 5.0
"""Seconds that a request waits, while the server starts, for the changes of jobs to be followed."""
_FIRST = 0.5
"""Seconds that a look at the pools waits for a capacity that is being asked for."""


class Service:
    """All that the extension does, apart from HTTP.

    The Store, the storage, each pool's scheduler and the doctor have threads of their own: where one of them hangs,
    requests that need it are answered with an error after a while, and all others as ever.

    Parameters
    ----------
    root : str
        Folder that the server's file browser shows.
    tell : callable
        Called, in some thread, with each message for the browsers.
    """

    def __init__(self, root: str, tell: Tell) -> None:
        self._pools = Pools()
        self._rows = Rows(self._pools, root)
        self._jobs = Jobs(self._pools, self._rows, root)
        self._acts = Acts(self._pools, self._jobs, self._rows)
        self._follower = Follower(self._pools, self._rows, tell)
        self._store = Threads("the index of jobs", 4, _ANSWER)
        self._disk = Threads("the storage of the run folders", 4, _ANSWER)
        self._doctor = Threads("the doctor", 1, 10.0 * DOCTOR)
        self._asking: dict[str, Threads] = {}
        self._orders: dict[str, Threads] = {}
        self._asked: set[asyncio.Task[None]] = set()
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def pools_known(self) -> Pools:
        """The pools."""
        return self._pools

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to follow the jobs; on the server's loop."""
        self._follower.start()
        self._refreshing = asyncio.get_running_loop().create_task(self._refresh_for_ever())

    async def stop(self) -> None:
        """Give back the leases of the pools and end the threads."""
        tasks = [task for task in (self._refreshing, *self._asked) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self._follower.stop()
        for threads in (self._store, self._disk, self._doctor, *self._asking.values(), *self._orders.values()):
            threads.stop(0.5)

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            with contextlib.suppress(HybridError):  # a wrong configuration is told to who asks
                await self._refresh()

    async def _refresh(self) -> list[asyncio.Task[None]]:
        """Begin to ask for the capacity of the pools where it is due."""
        tasks = [asyncio.get_running_loop().create_task(self._ask(name)) for name in await self._store(self._pools.due)]
        for task in tasks:
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        return tasks

    async def _ask(self, name: str) -> None:
        if name not in self._asking:
            self._asking[name] = Threads(f"pool {name!r}", 1, 300.0)
        try:
            await self._asking[name](self._pools.ask, name)
        except HybridError as error:
            log.warning("pool %s: %s", name, self._pools.mask.text(str(error)))

    def _orders_of(self, name: str) -> Threads:
        if name not in self._orders:
            self._orders[name] = Threads(f"pool {name!r}", 2, _ANSWER)
        return self._orders[name]

    # --- answers ------------------------------------------------------------------------------------------------

    async def health(self) -> dict[str, Any]:
        """Return what this server is and does."""
        seq = await self._store(_sequence)
        return {"status": "ok", "version": __version__, "tracking": tracker.holding(), "seq": seq}

    async def pools(self) -> list[dict[str, Any]]:
        """Return all pools; their capacity is kept up to date for some minutes from now."""
        self._pools.looked = time.monotonic()
        asked = await self._refresh()
        if asked:
            await asyncio.wait(asked, timeout=_FIRST)
        return await self._store(self._pools.all)

    async def pool(self, name: str) -> dict[str, Any]:
        """Return one pool."""
        for pool in await self.pools():
            if pool["name"] == name:
                return pool
        raise JobNotFound(f"no pool {name[:80]!r}; pools: {', '.join(await self._store(self._pools.names))}")

    async def jobs(self, arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return a page of jobs, or of the changes after a sequence number."""
        if not self._follower.ready.is_set():
            await self._store(self._follower.ready.wait, _READY)
        if "since" not in arguments:
            return await self._store(self._rows.list, arguments)
        since = integer(arguments, "since", 0, 0, 2**53)
        limit = integer(arguments, "limit", MOST, 1, MOST)
        found = await self._store(self._rows.changed, since, limit, arguments.get("cursor"))
        removed, complete = self._follower.removed(since)
        return {**found, "removed": removed, "reset": not complete and since != found["seq"]}

    async def job(self, job_id: str) -> dict[str, Any]:
        """Return one job in detail."""
        return await self._disk(self._jobs.detail, job_id)

    async def tasks(self, job_id: str, arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return the tasks of a job."""
        return await self._disk(self._jobs.tasks, job_id, arguments)

    async def script(self, job_id: str) -> dict[str, Any]:
        """Return the script of a job."""
        return await self._disk(self._jobs.script, job_id)

    async def results(self, job_id: str, arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return where the results of a job are."""
        return await self._disk(self._jobs.results, job_id, arguments)

    async def checkpoints(self) -> dict[str, Any]:
        """Return the checkpoints of the newest jobs."""
        return await self._disk(self._jobs.checkpoints)

    async def log_part(self, job_id: str, batch: str, arguments: Mapping[str, str]) -> dict[str, Any]:
        """Return a part of a log."""
        return await self._disk(self._log_part, job_id, batch, arguments)

    def _log_part(self, job_id: str, batch: str, arguments: Mapping[str, str]) -> dict[str, Any]:
        run = self._jobs.run(self._jobs.row(job_id))
        return logs.part(run, batch, arguments, self._jobs.mask_of(run))

    async def metrics(self) -> bytes:
        """Return figures for Prometheus."""
        return await self._store(metrics.text, self._pools)

    # --- acts ---------------------------------------------------------------------------------------------------

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job."""
        return await self._disk(self._acts.cancel, job_id)

    async def retry(self, job_id: str, everything: bool, resources: Mapping[str, Any]) -> dict[str, Any]:
        """Run a job again."""
        row = await self._store(self._jobs.row, job_id)
        return await self._orders_of(row.pool)(self._acts.retry, job_id, everything, resources)

    async def hold(self, job_id: str, held: bool) -> dict[str, Any]:
        """Hold a job, or release it."""
        row = await self._store(self._jobs.row, job_id)
        return await self._orders_of(row.pool)(self._acts.hold, job_id, held)

    async def remove(self, job_id: str) -> None:
        """Remove a job."""
        row = await self._store(self._jobs.row, job_id)
        self._follower.expect(row.id)
        await self._disk(self._acts.remove, row.id)

    async def doctor(self, name: str | None) -> dict[str, Any]:
        """Check pools end to end."""
        if name is not None and name not in await self._store(self._pools.names):
            raise JobNotFound(f"no pool {name[:80]!r}")
        return await self._doctor(self._acts.doctor, name)


def _sequence() -> int:

    return default_store().sequence()
