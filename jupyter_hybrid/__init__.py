"""Run notebook cells and Python functions as jobs on any pool; results come back as variables.

Everything public is here; all of it is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster import dask_cluster
    from .errors import HybridError
    from .executor import Executor, submit, submit_script
    from .handles import ArrayJob, Job, Task, job
    from .listing import jobs, pools, why
    from .spec import Cause, JobState, Resources

__version__ = "0.1.0"

_HOME = {
    "ArrayJob": "handles",
    "Cause": "spec",
    "Executor": "executor",
    "HybridError": "errors",
    "Job": "handles",
    "JobState": "spec",
    "Resources": "spec",
    "Task": "handles",
    "dask_cluster": "cluster",
    "job": "handles",
    "jobs": "listing",
    "pools": "listing",
    "submit": "executor",
    "submit_script": "executor",
    "why": "listing",
}

__all__ = [
    "ArrayJob",
    "Cause",
    "Executor",
    "HybridError",
    "Job",
    "JobState",
    "Resources",
    "Task",
    "dask_cluster",
    "job",
    "jobs",
    "pools",
    "submit",
    "submit_script",
    "why",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(ipython: Any) -> None:
    """Register the magics; called by ``%load_ext jupyter_hybrid``."""
    from .magics import register

    register(ipython)


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from .server.app import HybridApp

    return [{"module": "jupyter_hybrid.server.app", "app": HybridApp}]


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    return [{"src": "labextension", "dest": "jupyter-hybrid"}]
