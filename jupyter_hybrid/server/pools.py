"""Pools as the panel sees them: configuration, capacity, cost; capacity is asked for while somebody looks."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

from .. import config
from ..config import Config, PoolConfig
from ..errors import HybridError, PoolUnreachable
from ..pool import default_store, get_pool
from ..spec import JobState
from ..store import PoolRow
from .masking import Mask, exported, secrets_of, together

ACTIVE = tuple(state for state in JobState if not state.final)
_READ = 2.0
"""Seconds for which the configuration files count as read."""
INTEREST = 300.0
"""Seconds after somebody has looked at the pools for which their capacity is kept up to date."""


@dataclass(frozen=True)
class Known:
    """The configuration, and what follows from it."""

    config: Config
    mask: Mask
    read: float


class Pools:
    """The pools of this user; all methods may be called from any thread."""

    def __init__(self) -> None:
        self._known: Known | None = None
        self._asked: dict[str, float] = {}
        self.looked = float("-inf")

    def known(self) -> Known:
        """Return the configuration as the files say now, or said a moment ago."""
        known = self._known
        if known is None or time.monotonic() - known.read >= _READ:
            loaded = config.load()
            pools = loaded.pools.values()
            environments = [part for pool in pools for part in (pool.environment, pool.env, exported(pool.prologue))]
            mask = Mask(together([*environments, secrets_of(os.environ)]))
            known = self._known = Known(loaded, mask, time.monotonic())
        return known

    @property
    def mask(self) -> Mask:
        """What is masked wherever it stands; also while the configuration is wrong."""
        with contextlib.suppress(HybridError):
            return self.known().mask
        return self._known.mask if self._known is not None else Mask(secrets_of(os.environ))

    def config_of(self, name: str) -> PoolConfig | None:
        """Return the configuration of a pool; ``None`` if it is there no more."""
        with contextlib.suppress(HybridError):
            return self.known().config.pools.get(name)
        return None

    def names(self) -> list[str]:
        """Return the names of all pools."""
        return list(self.known().config.pools)

    def all(self) -> list[dict[str, Any]]:
        """Return all pools as JSON has them."""
        known = self.known()
        default = known.config.pool().name
        return [self._json(pool, pool.name == default, known.mask) for pool in known.config.pools.values()]

    def _json(self, pool: PoolConfig, default: bool, mask: Mask) -> dict[str, Any]:
        store = default_store()
        row = store.pool(pool.name)
        snapshot = row.snapshot or {}
        return {
            "name": pool.name,
            "kind": pool.kind,
            "default": default,
            "cpus_free": snapshot.get("free_cpus"),
            "cpus_total": snapshot.get("total_cpus"),
            "gpus_free": snapshot.get("free_gpus"),
            "gpus_total": snapshot.get("total_gpus"),
            "memory_free": snapshot.get("free_memory"),
            "memory_total": snapshot.get("total_memory"),
            "queued": snapshot.get("queued"),
            "price_cpu_hour": pool.prices.cpu_hour,
            "price_gpu_hour": pool.prices.gpu_hour,
            "reachable": _reachable(row),
            "unreachable_since": row.unreachable_since,
            "error": mask.text(row.error),
            "snapshot_time": row.snapshot_time,
            "active": sum(store.count(states=ACTIVE, pool=pool.name).values()),
        }

    def due(self) -> list[str]:
        """Return the pools whose capacity is to be asked for now; they count as asked from now on."""
        now = time.monotonic()
        if now - self.looked > INTEREST:
            return []
        due = []
        for pool in self.known().config.pools.values():
            pause = pool.limits.poll_max.total_seconds()
            shared = default_store().pool(pool.name).snapshot_time
            fresh = shared is not None and abs(time.time() - shared) < pause  # another process may have asked
            if not fresh and now - self._asked.get(pool.name, float("-inf")) >= pause:
                self._asked[pool.name] = now
                due.append(pool.name)
        return due

    def ask(self, name: str) -> None:
        """Ask the scheduler for a pool's capacity; the answer, or that there is none, goes to the Store."""
        with contextlib.suppress(PoolUnreachable):
            get_pool(name).ask_snapshot(default_store())


def _reachable(row: PoolRow) -> bool | None:
    if row.unreachable_since is not None:
        return False
    return None if row.snapshot_time is None else True
