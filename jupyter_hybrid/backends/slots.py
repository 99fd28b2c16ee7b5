"""Which waiting element of the local pools starts next: pure, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

PASSES = 16
"""How many starts may pass a waiting element that needs more slots than are free; then the pool is kept for it."""


@dataclass(eq=False)
class Request:
    """A submission with elements that wait or run; `waiting` are the indices that wait, `after` what they wait for."""

    native_id: int
    pool: str
    script: str
    logs: str
    first: int
    array: bool
    cpus: int
    memory: int | None
    gpus: int
    walltime: float | None
    priority: int
    after: list[int]
    environment: dict[str, str]
    held: bool
    waiting: deque[int] = field(default_factory=deque)
    passed: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: priority, then order of submission."""
        return -self.priority, self.native_id


@dataclass
class Slots:
    """What is free in one pool; `gpus` are device numbers."""

    cpus: int
    memory: int
    gpus: list[int]

    def take(self, request: Request, devices: Iterable[int]) -> None:
        """Count one element as running."""
        self.cpus -= request.cpus
        self.memory -= request.memory or 0
        self.gpus = [device for device in self.gpus if device not in set(devices)]

    def fits(self, request: Request) -> bool:
        """Return whether one more element can run."""
        return request.cpus <= self.cpus and (request.memory or 0) <= self.memory and request.gpus <= len(self.gpus)


def start(
    requests: Iterable[Request], free: Mapping[str, Slots], claim: Callable[[Request, int, list[int]], bool]
) -> None:
    """Start what fits, in order; small ones pass a big one that has to wait, but not for ever.

    Parameters
    ----------
    requests : iterable of Request
        Sorted by :attr:`Request.order`. Indices that start are taken out of their `waiting`.
    free : mapping of str to Slots
        Each pool's free slots, which become fewer.
    claim : callable
        Called with request, index and device numbers; returns whether the element did start.
    """
    heads: dict[str, Request] = {}
    closed = {name for name, slots in free.items() if slots.cpus <= 0}
    for request in requests:
        if len(closed) == len(free):
            return
        if request.held or request.after or request.pool in closed:
            continue
        slots, head = free[request.pool], heads.get(request.pool)
        while request.waiting and slots.fits(request) and (head is None or head.passed < PASSES):
            devices = slots.gpus[: request.gpus]
            if claim(request, request.waiting.popleft(), devices):
                slots.take(request, devices)
                request.passed = 0
                if head is not None:
                    head.passed += 1
        if request.waiting and head is None:
            head = heads[request.pool] = request
        if slots.cpus <= 0 or (head is not None and head.passed >= PASSES):
            closed.add(request.pool)
