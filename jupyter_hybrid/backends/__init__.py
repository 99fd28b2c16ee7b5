"""Registry of the kinds of schedulers, by entry point of the group ``jupyter_hybrid.backends``.

An entry point names a callable ``(PoolConfig) -> Backend``; the entry point's name is the pool's ``kind``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jupyter_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from jupyter_hybrid.config import PoolConfig

    from .base import Backend


def local(config: PoolConfig) -> Backend:
    """Return the backend of a local pool; all local pools of a user share one supervisor."""
    from .local import LocalBackend

    return LocalBackend.from_pool(config)


def slurm(config: PoolConfig) -> Backend:
    """Return the backend of a Slurm pool."""
    from .slurm import SlurmBackend

    return SlurmBackend(config.env)


# Found without reading the metadata of every installed package, which takes longer than a submission.
_OWN: dict[str, Callable[[PoolConfig], Backend]] = {"local": local, "slurm": slurm}


def create(config: PoolConfig) -> Backend:
    """Return the backend of a pool.

    Raises
    ------
    ConfigError
        No installed package has this kind.
    """
    if config.kind in _OWN:
        return _OWN[config.kind](config)
    from importlib.metadata import entry_points

    for entry in entry_points(group="jupyter_hybrid.backends", name=config.kind):
        factory: Callable[[PoolConfig], Backend] = entry.load()
        return factory(config)
    raise ConfigError(f"pool {config.name!r} ({config.source}): no installed package has a backend {config.kind!r}")
