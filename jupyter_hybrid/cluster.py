"""Live Dask clusters on a pool."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from dataclasses import replace
from typing import Any

from .backends.base import Submission
from .backends.slurm import foreign_variables, submit_command, submit_error
from .errors import HybridError, ResourceError
from .pool import Pool, get_pool
from .process import run
from .spec import Resources, new_id

_LIFETIME = 0.9
"""Share of the walltime after which a Dask worker hands on its data and ends; another one takes its place."""


def dask_cluster(pool: str | None = None, jobs: int = 1, *, interface: str | None = None, **resources: Any) -> Any:
    """Return a live Dask cluster on a pool, of so many jobs; the job that ends is replaced.

    Each job has `tasks_per_node` Dask workers with `cpus` threads each. The pool's Python needs the packages of
    ``jupyter_hybrid[cluster]``. Make its client the active one, and everything of Dask runs there, the aggregation of
    arrays too; closing the cluster ends its jobs::

        with hy.dask_cluster("hpc", jobs=4, cpus=8, memory="32G") as cluster, cluster.get_client():
            arr.to_dataframe().groupby("lr").mean().compute()

    Parameters
    ----------
    pool : str, optional
        Name of the pool; the default pool if not given.
    jobs : int
        Number of jobs, which wait in the queue as others do. On a local pool they are processes of this one.
    interface : str, optional
        Network interface between this machine and the nodes, such as ``"ib0"``; Dask's choice if not given. Who can
        reach its port can compute as you.
    **resources
        What each job asks for, see :class:`Resources`.

    Returns
    -------
    distributed.LocalCluster or dask_jobqueue.SLURMCluster

    Raises
    ------
    HybridError
        Packages are missing, or there are no live clusters on this kind of pool.
    SubmitRejected
        The scheduler would refuse such a job; the message has its own words.
    ConfigError, ResourceError
        There is no such pool, or a resource is unknown or malformed.
    """
    place = get_pool(pool)
    start = {"local": _local, "slurm": _slurm}.get(place.kind)
    if start is None:
        raise HybridError(f"pool {place.name!r} is of kind {place.kind!r}: Dask clusters run on local and slurm pools")
    wanted = Resources.parse(place.config.resources, **resources)
    if wanted.nodes != 1:
        raise ResourceError(f"nodes={wanted.nodes}: a job of a Dask cluster has one node; ask for more jobs")
    if jobs < 1:
        raise ValueError(f"jobs={jobs!r} is not a number of at least 1")
    try:
        return start(place, jobs, interface, wanted)
    except ImportError as error:
        raise HybridError(
            f"a Dask cluster needs more packages: pip install jupyter_hybrid[cluster] ({error})"
        ) from error


def _local(place: Pool, jobs: int, interface: str | None, wanted: Resources) -> Any:
    from distributed import LocalCluster

    workers = wanted.tasks_per_node
    return LocalCluster(
        n_workers=jobs * workers,
        threads_per_worker=wanted.cpus,
        processes=True,
        memory_limit=wanted.memory // workers if wanted.memory else "auto",
        host=None if interface else "127.0.0.1",
        interface=interface,
        dashboard_address="127.0.0.1:0",
    )


def _slurm(place: Pool, jobs: int, interface: str | None, wanted: Resources) -> Any:
    interrupt = signal.getsignal(signal.SIGINT)
    from dask_jobqueue.slurm import SLURMCluster, SLURMJob

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)  # its import makes Ctrl-C end the whole process

    name = new_id()
    folder = place.storage.root / ".dask" / name
    os.makedirs(folder, mode=0o700)
    script = folder / "worker.sh"
    # One process of the scheduler, which starts all Dask workers of the job.
    cores = wanted.tasks_per_node * wanted.cpus
    asked = replace(wanted, tasks_per_node=1, cpus=cores)
    submission = Submission(f"{name}.0.0", "dask-worker", script, folder, 0, 1, False, asked)
    # The warning before the walltime would kill the worker: it retires before that by itself.
    options = [word for word in submit_command(submission)[1:-1] if not word.startswith("--signal=")]
    options += [f"--output={str(folder).replace('%', '%%')}/%j.out", "--no-requeue"]
    unset = [part for variable in foreign_variables(dict(os.environ)) for part in ("-u", variable)]
    env = ["env", *unset, *(f"{key}={value}" for key, value in place.config.env.items())]

    class PoolJob(SLURMJob):  # type: ignore[misc]
        submit_command = shlex.join([*env, "sbatch", *options])
        cancel_command = shlex.join([*env, "scancel"])

    arguments = ["--memory-limit", "auto"] if wanted.memory is None else []
    if wanted.time is not None:
        seconds = wanted.time.total_seconds()
        arguments += ["--lifetime", f"{seconds * _LIFETIME:.0f}s", "--lifetime-stagger", f"{seconds * 0.05:.0f}s"]
    cluster = SLURMCluster(
        job_cls=PoolJob,
        name=name,
        cores=cores,
        processes=wanted.tasks_per_node,
        memory=f"{wanted.memory or 2**30}B",
        python=shlex.join(_python(place)),
        job_script_prologue=_prologue(place),
        job_directives_skip=["#SBATCH"],  # all of them are options of the submit command, where nothing needs quoting
        worker_extra_args=arguments,
        local_directory=shlex.quote(str(folder)),
        interface=interface,
        scheduler_options={"dashboard_address": "127.0.0.1:0"},
    )
    try:
        script.write_text(cluster.job_script())
        # Dask would only log a refusal, again and again.
        tried = run([*env, "sbatch", *options, "--test-only", str(script)])
        if tried.code != 0:
            raise submit_error(tried)
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
    except BaseException:
        cluster.close()
        raise
    return cluster


def _python(place: Pool) -> list[str]:
    container = place.config.container
    if container is None:
        return [place.python]
    binds = dict.fromkeys([str(place.storage.root), os.getcwd(), *container.bind])
    return [container.kind, "exec", *(f"--bind={bind}" for bind in binds), container.image, place.python]


def _prologue(place: Pool) -> list[str]:
    directory = shlex.quote(os.getcwd())
    lines = [f"cd {directory} || echo 'jupyter_hybrid: this folder is not on the node' >&2"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in place.config.environment.items()]
    return [*lines, *place.config.prologue]
