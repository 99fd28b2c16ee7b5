"""Pool: a backend, a storage, limits and prices under one name."""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import backends, config
from .backends.base import Backend, PartitionSnapshot, PoolSnapshot
from .errors import PoolUnreachable
from .spec import Resources
from .storage import Attempt, Storage, data_folder, storage_folder
from .store import Store

SNAPSHOT_AGE = 300.0
"""Seconds for which a capacity snapshot counts as fresh."""
_MOST_BATCHES = 1000


class Pool:
    """A named place that runs jobs.

    Parameters
    ----------
    pool_config : jupyter_hybrid.config.PoolConfig
        What the configuration says of it.
    """

    def __init__(self, pool_config: config.PoolConfig) -> None:
        self.config = pool_config
        self.name = pool_config.name
        self.kind = pool_config.kind
        self.storage = Storage(storage_folder(pool_config.storage))

    @functools.cached_property
    def backend(self) -> Backend:
        """How its scheduler is spoken to."""
        return backends.create(self.config)

    @property
    def python(self) -> str:
        """Python interpreter on the nodes."""
        return self.config.python or sys.executable

    def settings(self, directory: str | None, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return what a job's worker and script need to know of the pool."""
        container = self.config.container
        return {
            "python": self.python,
            "prologue": list(self.config.prologue),
            "environment": dict(self.config.environment),
            "container": asdict(container) if container else None,
            "directory": directory,
            "arguments": list(arguments),
        }

    def snapshot(self, store: Store, max_age: float = SNAPSHOT_AGE) -> PoolSnapshot | None:
        """Return the pool's capacity, asked for anew if the last answer is older; ``None`` if it does not answer."""
        row = store.pool(self.name)
        fresh = abs(time.time() - (row.snapshot_time or 0)) < max_age
        if row.snapshot is not None and (fresh or row.unreachable_since is not None):  # known to be away: not asked
            return snapshot_from_json(row.snapshot)
        try:
            return self.ask_snapshot(store)
        except PoolUnreachable:
            return snapshot_from_json(row.snapshot) if row.snapshot is not None else None

    def ask_snapshot(self, store: Store) -> PoolSnapshot:
        """Ask the scheduler for the pool's capacity and share the answer.

        Raises
        ------
        PoolUnreachable
            It does not answer; since when is shared too.
        """
        try:
            snapshot = self.backend.snapshot()
        except PoolUnreachable as error:
            since = store.pool(self.name).unreachable_since
            store.set_pool(self.name, unreachable_since=since or time.time(), error=str(error))
            raise
        store.set_pool(
            self.name,
            snapshot=json.dumps(asdict(snapshot)),
            snapshot_time=time.time(),
            unreachable_since=None,
            error="",
        )
        return snapshot

    def slots(self, snapshot: PoolSnapshot | None, resources: Resources) -> int:
        """Return how many batches with these resources the pool could run at once."""
        cpus, gpus = 16, 0
        if snapshot is not None:
            cpus, gpus = snapshot.total_cpus, snapshot.total_gpus
            for partition in snapshot.partitions:
                if partition.name == resources.partition or (resources.partition is None and partition.default):
                    cpus, gpus = partition.total_cpus, partition.total_gpus
        slots = cpus // resources.total_cpus
        if resources.gpus and gpus:
            slots = min(slots, gpus // (resources.gpus * resources.nodes))
        return max(1, min(slots, _MOST_BATCHES))

    def plan(
        self,
        store: Store,
        number: int,
        first: int,
        tasks: tuple[tuple[int, int], ...],
        batch: int,
        resources: Resources,
    ) -> Attempt:
        """Return the batches and submissions in which a round runs its tasks.

        Parameters
        ----------
        store : Store
            For the shared capacity snapshot.
        number, first : int
            Number of the round and of its first batch.
        tasks : tuple of (int, int)
            Ranges of the tasks to run.
        batch : int
            Tasks in a batch; 0 for as many batches as the pool can run at once, which pull shares of the tasks.
        resources : Resources
            What each batch asks for.
        """
        count = sum(stop - start for start, stop in tasks)
        limits = self.config.limits
        most = limits.max_array or math.inf
        if count > 1:
            snapshot = self.snapshot(store)
            most = min(most, (snapshot.max_array if snapshot else None) or math.inf)
        most = min(most, limits.max_jobs or math.inf)
        pull = batch == 0 and count > 1
        if pull:
            batches = int(min(count, self.slots(snapshot, resources), limits.max_jobs or math.inf))
            size = 0
        else:
            size = max(1, batch)
            batches = -(-count // size)
        chunks = []
        left = batches
        while left:
            chunks.append(int(min(left, most)))
            left -= chunks[-1]
        return Attempt(number, first, batches, size, pull, tasks, resources, tuple(chunks))


def snapshot_from_json(data: dict[str, Any]) -> PoolSnapshot:
    """Return a snapshot as the Store keeps it."""
    partitions = tuple(PartitionSnapshot(**partition) for partition in data["partitions"])
    return PoolSnapshot(**{**data, "partitions": partitions})


_stores: dict[Path, Store] = {}
_pools: dict[str, Pool] = {}


def default_store() -> Store:
    """Return this user's Store."""
    path = data_folder() / "store.sqlite"
    if path not in _stores:
        _stores[path] = Store(path)
    return _stores[path]


def get_pool(name: str | None = None, kind: str | None = None) -> Pool:
    """Return a pool by its name, or the first of a kind, or the default pool.

    Raises
    ------
    ConfigError
        There is none; the message lists those there are.
    """
    loaded = config.load()
    found = loaded.first_of_kind(kind) if name is None and kind is not None else loaded.pool(name)
    key = f"{data_folder()} {found!r}"
    if key not in _pools:
        _pools[key] = Pool(found)
    return _pools[key]
