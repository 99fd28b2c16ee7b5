"""Figures for Prometheus, made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..pool import default_store
from ..tracker import tracker
from .pools import Pools

_POOL = {
    "cpus_free": "Free cpus.",
    "cpus_total": "All cpus.",
    "gpus_free": "Free gpus.",
    "gpus_total": "All gpus.",
    "queued": "Jobs in the queue of the scheduler, of all users as far as it shows them.",
}


class _Figures:
    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        pools, holding, store = self._pools.all(), tracker.holding(), default_store()
        jobs = GaugeMetricFamily("hybrid_jobs", "Jobs by pool and state.", labels=["pool", "state"])
        reachable = GaugeMetricFamily("hybrid_pool_reachable", "Whether the scheduler answers.", labels=["pool"])
        tracking = GaugeMetricFamily("hybrid_pool_tracking", "Whether this server asks the scheduler.", labels=["pool"])
        figures = {n: GaugeMetricFamily(f"hybrid_pool_{n}", text, labels=["pool"]) for n, text in _POOL.items()}
        for pool in pools:
            name = pool["name"]
            for state, number in store.count(pool=name).items():
                jobs.add_metric([name, state.value], number)
            if pool["reachable"] is not None:
                reachable.add_metric([name], int(pool["reachable"]))
            tracking.add_metric([name], int(name in holding))
            for key, figure in figures.items():
                if pool[key] is not None:
                    figure.add_metric([name], pool[key])
        yield from (jobs, reachable, tracking, *figures.values())
        yield CounterMetricFamily("hybrid_changes", "Changes of jobs so far.", value=store.sequence())


def text(pools: Pools) -> bytes:
    """Return all figures in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(pools))
    return generate_latest(registry)
