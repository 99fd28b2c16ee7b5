"""Executor: runs functions and scripts as jobs on a pool."""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import capture, frames, launch
from .errors import CaptureError, HybridError
from .handles import ArrayJob, Handle, Job, wrap
from .pool import Pool, default_store, get_pool
from .run import Run
from .spec import RESOURCE_ALIASES, JobState, Resources, parse_memory, round_memory

T = TypeVar("T")


class Executor(concurrent.futures.Executor):
    """Runs functions as jobs on a pool; a :class:`concurrent.futures.Executor`.

    Parameters
    ----------
    pool : str, optional
        Name of the pool; the default pool if not given.
    cache : bool
        Use the result of an earlier job with the same function and arguments, if there is one.
    after : sequence of Job, ArrayJob or str
        Jobs that must complete first.
    name : str, optional
        Name of its jobs; the function's name if not given.
    limit : int or str
        Most bytes that the arguments of a submission may take (``"100M"``).
    directory : str, optional
        Working directory of its jobs; the current one if not given.
    **resources
        What each job asks for, see :class:`Resources` (``cpus=4, memory="8G", time="1h"``).

    Raises
    ------
    ConfigError
        There is no such pool.
    ResourceError
        A resource is unknown or malformed, or more than the pool can ever give.
    HybridError
        There is no such directory.
    """

    def __init__(
        self,
        pool: str | None = None,
        *,
        cache: bool = False,
        after: Iterable[Any] = (),
        name: str | None = None,
        limit: int | str = capture.LIMIT,
        directory: str | None = None,
        **resources: Any,
    ) -> None:
        self._pool: Pool = get_pool(pool)
        self._resources, ignored = parse_resources(self._pool, resources)
        if ignored:
            warnings.warn(ignored, stacklevel=2)
        self._cache, self._name, self._directory = cache, name, parse_directory(directory)
        self._after = job_ids(after)
        self._limit = parse_memory(limit)
        self._jobs: list[Job | ArrayJob] = []
        self._shutdown = False
        self._lock = threading.Lock()

    def _check_open(self) -> None:
        if self._shutdown:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Job:
        """Run ``fn(*args, **kwargs)`` as a job. Returns when the intent is on disk.

        Raises
        ------
        TypeError
            A keyword is one of the Executor's, which `fn` does not take.
        CaptureError
            The function or an argument cannot travel to the pool, or is too large.
        StoreError
            Storage or Store cannot be written; nothing was submitted.
        """
        self._check_open()
        _refuse_own_keywords(fn, args, kwargs)
        payload = capture.check_function(fn, args, kwargs, self._limit)
        keys, task_keys = _keys(fn, args, kwargs, None) if self._cache else ({}, [])
        run = self._launch(fn, payload, None, self._name, 1, keys, task_keys)
        job = Job(run)
        self._keep(job)
        return job

    def array(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        batch: int | str = "auto",
        name: str | None = None,
        common: Mapping[str, Any] | None = None,
    ) -> ArrayJob:
        """Run ``fn`` once for each tuple of the zipped iterables, as one ArrayJob.

        Parameters
        ----------
        fn : callable
            The function.
        *iterables : iterable
            Arguments, as for :func:`map`.
        batch : int or "auto"
            Tasks that share one array element of the scheduler; "auto" makes as many batches as the pool can run at
            once, which pull tasks as they get free.
        name : str, optional
            Readable name.
        common : mapping, optional
            Keyword arguments of every task; they travel once.
        """
        self._check_open()
        arguments = list(zip(*iterables, strict=False))
        if not arguments:
            raise ValueError("array() was given nothing to run over: its iterables are empty")
        size = parse_batch(batch)
        shared = dict(common or {})
        payload = capture.check_function(fn, (), shared, self._limit)
        items = pack_items(arguments, self._limit)
        keys, task_keys = _keys(fn, (), shared, arguments) if self._cache else ({}, [])
        run = self._launch(fn, payload, items, name or self._name, size, keys, task_keys)
        array = ArrayJob(run)
        self._keep(array)
        return array

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """Return an iterator of the results in order, as the standard library does; one ArrayJob underneath.

        A `chunksize` above 1 is the size of a batch; the default makes automatic batches.
        """
        end = None if timeout is None else time.monotonic() + timeout
        arguments = list(zip(*iterables, strict=False))
        if not arguments:
            self._check_open()
            return iter(())
        array = self.array(fn, *zip(*arguments, strict=True), batch=chunksize if chunksize > 1 else "auto")

        def results_in_order() -> Iterator[T]:
            for task in array:
                yield task.result(None if end is None else max(0.0, end - time.monotonic()))

        return results_in_order()

    def _launch(
        self,
        fn: Callable[..., Any],
        payload: Sequence[Any],
        items: Sequence[Sequence[Any]] | None,
        name: str | None,
        batch: int,
        keys: Mapping[str, str],
        task_keys: Sequence[str],
    ) -> Run:
        function = getattr(fn, "__qualname__", None) or type(fn).__qualname__
        return launch.launch(
            self._pool,
            kind="function",
            name=name or function,
            payload=payload,
            items=items,
            resources=self._resources,
            batch=batch,
            after=self._after,
            origin={
                "function": f"{getattr(fn, '__module__', '')}.{function}",
                "parameters": [] if items is None else _parameters(fn),
            },
            keys=keys,
            task_keys=task_keys,
            directory=self._directory,
        )

    def _keep(self, new: Job | ArrayJob) -> None:
        with self._lock:
            self._jobs = [job for job in self._jobs if not job.done()]
            self._jobs.append(new)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; wait for what was submitted, or cancel what waits. Jobs never die with their executor."""
        self._shutdown = True
        with self._lock:
            jobs = list(self._jobs)
        for each in jobs:
            if cancel_futures and each.state in (JobState.NEW, JobState.PENDING):
                each.cancel()
        if wait:
            for each in jobs:
                if isinstance(each, ArrayJob):
                    each.wait()
                else:
                    concurrent.futures.wait([each])


def parse_resources(pool: Pool, given: Mapping[str, Any]) -> tuple[Resources, str]:
    """Return what a job asks of its pool, and a note on what the pool ignores of it, or an empty text.

    Raises
    ------
    ResourceError
        A resource is unknown or malformed, or more than the pool can ever give.
    """
    resources = Resources.parse(pool.config.resources, **given)
    ignored = [name for name in pool.backend.check(resources) if given.get(name)]
    if not ignored:
        return resources, ""
    return (
        resources,
        f"{', '.join(ignored)}: ignored, such things do not exist on pool {pool.name!r} of kind {pool.kind!r}",
    )


def parse_directory(directory: str | None) -> str | None:
    """Return the absolute path of a working directory.

    Raises
    ------
    HybridError
        It does not exist.
    """
    if directory is None:
        return None
    path = os.path.abspath(os.path.expanduser(directory))
    if not os.path.isdir(path):
        what = "is no folder" if os.path.exists(path) else "does not exist"
        raise HybridError(f"directory {path} {what}: make it; or if only the nodes have it, go there in the job itself")
    return path


def _refuse_own_keywords(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse keywords that are meant for the Executor, and that the function does not take.

    Raises
    ------
    TypeError
        There are some; it says how to write it.
    """
    import inspect

    if not kwargs:
        return
    own = {*inspect.signature(Executor).parameters, *Resources.__dataclass_fields__, *RESOURCE_ALIASES}
    meant = {name: value for name, value in kwargs.items() if name in own}
    if not meant:
        return
    try:
        inspect.signature(fn).bind(*args, **kwargs)
    except TypeError:
        name = getattr(fn, "__name__", type(fn).__name__)
        said = ", ".join(f"{keyword}={value!r}" for keyword, value in meant.items())
        raise TypeError(
            f"submit() hands {', '.join(meant)} on to {name}(), which takes no such argument; "
            f"tell the Executor: hy.Executor({said}).submit({name}, ...)"
        ) from None
    except ValueError:  # a builtin that does not tell what it takes
        return


def parse_batch(batch: int | str) -> int:
    """Return tasks in a batch, 0 for "auto"."""
    if batch == "auto":
        return 0
    if isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1:
        return batch
    raise ValueError(f"batch={batch!r} is neither 'auto' nor a whole number of at least 1")


def job_ids(jobs: Iterable[Any]) -> list[str]:
    """Return ids of jobs given as handles or ids."""
    if isinstance(jobs, (str, Handle)):
        jobs = [jobs]
    return [each.id if isinstance(each, Handle) else default_store().job(str(each)).id for each in jobs]


def _parameters(fn: Callable[..., Any]) -> list[str]:
    """Return the names under which a function takes positional arguments, as far as it says them."""
    import inspect

    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def pack_items(tasks: Sequence[Any], limit: int) -> list[list[Any]]:
    """Return the frames of each task's own arguments.

    Raises
    ------
    CaptureError
        They cannot be pickled, or all together have more than `limit` bytes.
    """
    packed: list[list[Any]] = []
    total = 0
    try:
        for values in tasks:
            packed.append(frames.encode(values))
            total += sum(memoryview(frame).nbytes for frame in packed[-1])
            if total > limit:
                raise CaptureError(
                    f"the arguments of the first {len(packed)} of {len(tasks)} tasks have {round_memory(total)}, "
                    f"the limit is {round_memory(limit)}: save them to the pool's storage and pass paths, "
                    "or allow more (limit=, --limit)"
                )
    except CaptureError:
        raise
    except Exception as error:  # user classes may raise anything while they are pickled
        what = f"{tasks[len(packed)]!r:.200}"
        raise CaptureError(
            f"the arguments of task {len(packed)}, {what}, cannot travel to the pool: {error}"
        ) from error
    return packed


def _keys(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    arguments: Sequence[tuple[Any, ...]] | None,
) -> tuple[dict[str, str], list[str]]:
    from . import fingerprint

    keys = fingerprint.function_keys(fn, args, kwargs)
    return keys, [fingerprint.task_key(keys, item) for item in arguments or [()]]


def submit(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Job:
    """Run ``fn(*args, **kwargs)`` as a job on the default pool; for another one, ``Executor(pool).submit(...)``."""
    return Executor().submit(fn, *args, **kwargs)


def submit_script(
    script: str | Path,
    *arguments: str,
    pool: str | None = None,
    array: Iterable[Any] | None = None,
    batch: int | str = "auto",
    after: Iterable[Any] = (),
    name: str | None = None,
    directory: str | None = None,
    **resources: Any,
) -> Job | ArrayJob:
    """Run a script as a job: one that begins with ``#!``, or lines for bash.

    Parameters
    ----------
    script : str or path
        File.
    *arguments : str
        Its command-line arguments.
    pool : str, optional
        Name of the pool; the default pool if not given.
    array : iterable, optional
        Run it once for each value, which it finds in ``HYBRID_ARRAY_INDEX`` (and in the scheduler's own variable).
    batch, after, name, directory, **resources
        As for :class:`Executor` and :meth:`Executor.array`.
    """
    place = get_pool(pool)
    wanted, ignored = parse_resources(place, resources)
    if ignored:
        warnings.warn(ignored, stacklevel=2)
    path = Path(script)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise HybridError(f"cannot read the script {path}: {error.strerror}") from error
    variables: list[tuple[Any, dict[str, Any]]] | None = None if array is None else [(value, {}) for value in array]
    return run_script(
        text, variables, arguments=arguments, pool=place, resources=wanted, batch=batch, after=after,
        name=name or path.name, directory=parse_directory(directory),
    )  # fmt: skip


def run_script(
    text: bytes,
    tasks: Sequence[tuple[Any, Mapping[str, Any]]] | None,
    *,
    pool: Pool,
    resources: Resources | None = None,
    arguments: Sequence[str] = (),
    batch: int | str = "auto",
    after: Iterable[Any] = (),
    name: str = "script",
    directory: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Job | ArrayJob:
    """Run a script's text as a job, or once for each (index, variables) of `tasks`."""
    if tasks is not None and not tasks:
        raise ValueError("the array of the script is empty")
    run = launch.launch(
        pool,
        kind="script",
        name=name,
        payload=text if text.startswith(b"#!") else b"#!/bin/bash\n" + text,
        items=None if tasks is None else [frames.encode(task) for task in tasks],
        resources=resources or pool.config.resources,
        batch=parse_batch(batch),
        after=job_ids(after),
        origin=origin,
        arguments=arguments,
        directory=directory,
    )
    return wrap(run)
