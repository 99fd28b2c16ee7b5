"""Dask collections over the result files of an array.

Everything is read where it lies, by the Dask worker that needs it: the graph has only the places of the results. Dask
runs it in threads of this process, or on the active :class:`distributed.Client`, whose workers need jupyter_hybrid and
must see the pool's storage.

All functions wait for the end of the array first. A collection holds the results as they were then: after
:meth:`ArrayJob.retry` make it anew.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import frames, results
from .dataframe import arguments_of, fitted, frame_of, is_scalar, with_arguments
from .errors import HybridError, JobFailed, ResultLost
from .progress import DONE, FAILED
from .spec import Cause
from .store import network_file_system

if TYPE_CHECKING:
    from .handles import ArrayJob

_PER_CORE = 4
"""Partitions of a collection for each core."""
_PART_BYTES = 16 << 20
"""Most bytes of the results in a partition, unless a single result is larger. Of a NumPy array alone in its partition
nothing is copied."""


class Part:
    """Some tasks in a row and where their results are: all that a Dask worker needs to load them.

    No dataclass or tuple, in which Dask would look for collections, task by task.

    Parameters
    ----------
    job : str
        The array's id.
    kind : {"function", "cell", "script"}
        What the array runs.
    name : str
        The only ``--out`` name of a cell, or empty.
    skip : bool
        Whether tasks without an intact result are left out.
    """

    def __init__(self, job: str, kind: str, name: str, skip: bool) -> None:
        self.job, self.kind, self.name, self.skip = job, kind, name, skip
        self.first = self.last = self.count = 0
        self.records: list[tuple[int, str, frames.Entry]] = []
        self.size = 0
        self.lost: JobFailed | None = None
        self.items: dict[int, frames.Entry] = {}

    def __dask_tokenize__(self) -> object:
        return hashlib.sha256(pickle.dumps(self)).hexdigest()


def _parts(array: ArrayJob, errors: str, tasks: int | None = None) -> list[Part]:
    """Wait for the end of the array, then cut its tasks into parts of at most so many."""
    if errors not in ("raise", "skip"):
        raise ValueError(f"errors={errors!r} is neither 'raise' nor 'skip'")
    array.wait()
    run, progress, skip = array.run, array.run.progress, errors == "skip"
    run.refresh()
    most = tasks or max(1, progress.total // (_PER_CORE * _cores()))
    spec = run.spec
    name = spec.out[0] if spec.kind == "cell" and len(spec.out) == 1 else ""
    paths: dict[tuple[int, str | None], str] = {}
    losses = results.lost(run)
    parts: list[Part] = []
    for task, mark in enumerate(progress.marks):
        if skip and mark != DONE:
            continue
        result = progress.results[task] if mark in (DONE, FAILED) else None
        length = result.entry.length if result else 0
        if not parts or parts[-1].count >= most or parts[-1].size + length > _PART_BYTES:
            parts.append(Part(spec.id, spec.kind, name, skip))
            parts[-1].first = task
        part = parts[-1]
        part.last = task
        part.count += 1
        if result is None or result.death:
            part.lost = part.lost or results.failure(run, task, losses)
            continue
        place = (result.batch, result.file)
        if place not in paths:
            paths[place] = progress.result_path(result)
        part.records.append((task, paths[place], result.entry))
        part.size += length
    return parts


def _cores() -> int:
    """Return the cores that Dask computes on: those of the active client's workers, or of this process."""
    own = len(os.sched_getaffinity(0))
    if "distributed" not in sys.modules:
        return own
    from distributed import get_client

    try:
        client = get_client()
    except ValueError:
        return own
    return own if client.asynchronous else max(own, sum(client.nthreads().values()))


# --- loading, in a Dask worker --------------------------------------------------------------------------------------


def load(part: Part, skip: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield (task, value) of a part in order, perhaps without the tasks that have none.

    Raises
    ------
    ResultLost
        A result is missing, cut or altered.
    JobFailed
        A task ended without a word of its own.
    Exception
        What a task raised.
    """
    places: dict[str, list[tuple[int, frames.Entry]]] = {}
    for task, path, entry in part.records:
        places.setdefault(path, []).append((task, entry))
    loaded: dict[int, Any] = {}
    for path, rows in places.items():
        entries = [entry for _, entry in rows]
        values = frames.read_entries(_visible(path, entries), entries)
        if any(isinstance(value, frames.FrameMissing) for value in values):  # renamed between the look and the reading
            values = frames.read_entries(_visible(path, entries), entries)
        loaded.update(zip((task for task, _ in rows), values, strict=True))
    for task, path, entry in part.records:
        value = loaded.pop(task)
        if skip and (isinstance(value, frames.FrameError) or entry.kind == frames.ERROR):
            continue
        if isinstance(value, frames.FrameError):
            text = f"the result of task {task} of job {part.job} is lost: {value}"
            raise ResultLost(text, Cause.RESULT_LOST) from value
        if entry.kind == frames.ERROR:
            items = str(Path(path).parent.parent / "items.bin")
            where = f"task {task} of job {part.job}" + results.given_to(items, task, part.kind)
            raise results.error_of(value, where)
        yield task, value.get(part.name) if part.name and isinstance(value, dict) else value
    if part.lost is not None and not skip:
        raise part.lost


def _visible(path: str, entries: Sequence[frames.Entry]) -> str:
    """Return the name that a result file has by now; wait on a network file system until it is seen here in full."""
    size = max(entry.offset + entry.length for entry in entries)
    names = [path, path.removesuffix(".part") + ".bin"] if path.endswith(".part") else [path]
    deadline = None
    while True:
        for name in names:
            if os.path.exists(name) and os.path.getsize(name) >= size:
                return name
        if deadline is None:
            wait = results.VISIBLE if network_file_system(Path(path).parent) else 0.0
            deadline = time.monotonic() + wait
        if time.monotonic() >= deadline:
            return path
        os.listdir(os.path.dirname(path))  # makes NFS look again
        time.sleep(0.2)


def _load_one(part: Part) -> Any:
    return next(value for _, value in load(part))


def _load_values(part: Part) -> list[Any]:
    return [value for _, value in load(part, part.skip)]


# --- delayed, bag, reduce -------------------------------------------------------------------------------------------


def to_delayed(array: ArrayJob, errors: str = "raise") -> list[Any]:
    """Return a :class:`dask.delayed.Delayed` of each task's value, in order.

    Parameters
    ----------
    array : ArrayJob
        The array; waits for its end.
    errors : {"raise", "skip"}
        Computing a failed task raises its exception, or failed tasks are left out. A result that turns out damaged
        raises in both.

    Raises
    ------
    ResultLost
        On computing: a result file is missing, cut or altered.
    JobFailed
        On computing: a task ended without a word of its own.
    """
    return _delayed(_load_one, _parts(array, errors, tasks=1))


def _delayed(function: Callable[..., Any], parts: Iterable[Part], *arguments: Any) -> list[Any]:
    """Return a delayed call for each part; its key is the same for the same results, which Dask loads once."""
    import dask

    call, name = dask.delayed(function, pure=True), f"hybrid{function.__name__}"
    return [call(part, *arguments, dask_key_name=f"{name}-{dask.base.tokenize(part, *arguments)}") for part in parts]


def to_bag(array: ArrayJob, errors: str = "raise") -> Any:
    """Return a :class:`dask.bag.Bag` of the values in the order of the tasks.

    Dask runs bags in processes by default; this one, and what is made of it, runs in threads if no client is active.

    Parameters
    ----------
    array : ArrayJob
        The array; waits for its end.
    errors : {"raise", "skip"}
        Computing a partition with a failed, lost or damaged task raises, or leaves these tasks out.
    """
    import dask.bag

    parts = _parts(array, errors) or [Part(array.id, "", "", True)]
    bag = dask.bag.from_delayed(_delayed(_load_values, parts))
    return _threaded_bag()(bag.dask, bag.name, bag.npartitions)


@functools.cache
def _threaded_bag() -> Any:
    import dask.bag
    import dask.threaded

    class Bag(dask.bag.Bag):  # type: ignore[misc]
        """A bag whose default scheduler is threads: processes would send all values through this one."""

        __dask_scheduler__ = staticmethod(dask.threaded.get)

        def reduction(self, *args: Any, **kwargs: Any) -> Any:
            result = super().reduction(*args, **kwargs)
            result.__dask_scheduler__ = dask.threaded.get
            return result

        def take(self, k: int, npartitions: int = 1, compute: bool = True, warn: bool = True) -> Any:
            taken = super().take(k, npartitions, compute=False, warn=warn)
            taken.__dask_scheduler__ = dask.threaded.get
            return tuple(taken.compute()) if compute else taken

    return Bag


_FAN_IN = 8


def reduce(array: ArrayJob, fn: Callable[[Any, Any], Any], initial: Any = ..., errors: str = "raise") -> Any:
    """Return all values reduced by `fn`, as :func:`functools.reduce` does, but in a tree.

    Values are reduced partition by partition where Dask runs, then eight partial results at a time. The order of the
    tasks is kept, so `fn` need not be commutative; it must be associative, and take its own results as arguments.

    Parameters
    ----------
    array : ArrayJob
        The array; waits for its end.
    fn : callable
        Of two values.
    initial : object, optional
        Stands before the first value, once; the result if there are no values.
    errors : {"raise", "skip"}
        A failed, lost or damaged task raises, or is left out.

    Raises
    ------
    TypeError
        There is no value and no `initial`.
    """
    import dask

    fold, combine = dask.delayed(_fold, pure=False), dask.delayed(_combine, pure=False)
    first = () if initial is ... else (initial,)
    level = [fold(part, fn) for part in _parts(array, errors)]
    while len(level) > _FAN_IN:
        level = [combine(fn, level[at : at + _FAN_IN]) for at in range(0, len(level), _FAN_IN)]
    total = combine(fn, level, first).compute() if level else first
    if not total:
        raise TypeError(f"reduce() of job {array.id}, which has no values, needs initial=")
    return total[0]


def _fold(part: Part, fn: Callable[[Any, Any], Any]) -> tuple[Any, ...]:
    return _combine(fn, [(value,) for _, value in load(part, part.skip)])


def _combine(
    fn: Callable[[Any, Any], Any], partial: Sequence[tuple[Any, ...]], first: tuple[Any, ...] = ()
) -> tuple[Any, ...]:
    """Reduce results that are tuples of one value, or of none."""
    values = [*first, *(value for result in partial for value in result)]
    return (functools.reduce(fn, values),) if values else ()


def _sample(parts: Sequence[Part], job: str) -> list[tuple[int, Any]]:
    """Return (task, value) of the first part that has any; raises what the first part raises if none has."""
    for part in parts:
        found = list(load(part, skip=True))
        if found:
            return found
    if parts and not parts[0].skip:
        list(load(parts[0]))
    raise HybridError(f"no task of job {job} has a result: see the tasks in failed, and retry()")


# --- data frame -----------------------------------------------------------------------------------------------------


def to_dataframe(array: ArrayJob, errors: str = "raise") -> Any:
    """Return a :class:`dask.dataframe.DataFrame` of the values, with the tasks' own arguments beside them.

    A value is a row: a scalar fills the column "value" (or the cell's only ``--out`` name), a mapping, data class,
    named tuple or series has columns of its own. Or it is a pandas data frame: then all its rows are taken, and an
    index that is more than row numbers becomes columns.

    The index, `task`, is the number of the task, with known divisions. The columns before the values' own are the
    arguments that each task was given, as far as they have names and are scalars: the variables of ``--array``, or the
    parameters of the function. Columns and their types are those of the first partition that has a value; where later
    values lack a column they are missing.

    Parameters
    ----------
    array : ArrayJob
        The array; waits for its end.
    errors : {"raise", "skip"}
        Computing a partition with a failed, lost or damaged task raises, or leaves these tasks out.

    Raises
    ------
    HybridError
        No task has a value. On computing: a value has a column that those of the first partition lack.
    """
    import dask
    import dask.dataframe

    parts = _parts(array, errors)
    values, spec = _sample(parts, array.id), array.spec
    parameters = None if spec.kind == "script" else list(spec.origin.get("parameters", ()))
    label = spec.out[0] if len(spec.out) == 1 else "value"
    frame = frame_of(values, label)
    path = str(array.run.folder / "items.bin")
    index = frames.Reader(path).entries
    given = arguments_of(path, [index[task] for task, _ in values], parameters)
    columns = [name for name, column in given.items() if name not in frame.columns and all(map(is_scalar, column))]
    like = with_arguments(frame, values, {name: given[name] for name in columns}).iloc[:0]
    for part in parts if columns else ():
        part.items = {task: index[task] for task, _, _ in part.records}
    # Dask would turn all objects into texts, lists and arrays too.
    with dask.config.set({"dataframe.convert-string": False}):
        return dask.dataframe.from_map(
            _load_frame,
            parts,
            meta=like,
            divisions=(*(part.first for part in parts), parts[-1].last),
            label=f"hybrid-{array.id}",
            columns_like=like,
            scalar=label,
            items=path,
            parameters=parameters,
            arguments=columns,
        )


def _load_frame(
    part: Part, columns_like: Any, scalar: str, items: str, parameters: Sequence[str] | None, arguments: Sequence[str]
) -> Any:
    values = list(load(part, part.skip))
    if not values:
        return columns_like
    frame = frame_of(values, scalar)
    if arguments:
        given = arguments_of(items, [part.items[task] for task, _ in values], parameters)
        frame = with_arguments(frame, values, {name: given[name] for name in arguments})
    return fitted(frame, columns_like, f"among tasks {part.first} to {part.last} of job {part.job}")


# --- array ----------------------------------------------------------------------------------------------------------


def to_dask_array(array: ArrayJob, errors: str = "raise") -> Any:
    """Return a :class:`dask.array.Array` of shape ``(tasks, *shape)``: the tasks' arrays or numbers, stacked.

    Shape and type are those of the first tasks' values. An array of 16 MiB or more is a chunk of its own, and a view
    of its file, of which nothing is copied.

    Parameters
    ----------
    array : ArrayJob
        The array; waits for its end.
    errors : {"raise", "skip"}
        Computing a chunk with a failed or lost task raises, or the array has these tasks left out. A result that
        turns out damaged raises in both: the shape is fixed by then.

    Raises
    ------
    HybridError
        No task has a value. On computing: a value has another shape, or a type that does not fit without loss.
    """
    import dask.array
    import numpy as np

    parts = _parts(array, errors)
    sample = [_as_array(value) for _, value in _sample(parts, array.id)]
    shape, dtype = sample[0].shape, np.result_type(*{value.dtype for value in sample})
    chunks = [
        dask.array.from_delayed(delayed, (part.count, *shape), dtype)
        for part, delayed in zip(parts, _delayed(_load_array, parts, shape, dtype), strict=True)
    ]
    return dask.array.concatenate(chunks)


def _load_array(part: Part, shape: tuple[int, ...], dtype: Any) -> Any:
    import numpy as np

    stacked = np.empty((part.count, *shape), dtype) if part.count > 1 else None
    for position, (task, value) in enumerate(load(part)):
        each = _as_array(value)
        if each.shape != shape or not np.can_cast(each.dtype, dtype, "safe"):
            raise HybridError(
                f"task {task} of job {part.job} has an array of {each.dtype}, shape {each.shape}, and the first tasks "
                f"have {dtype}, shape {shape}: such values cannot be stacked; use to_bag() or to_delayed()"
            )
        if stacked is None:
            return each.astype(dtype, copy=False)[np.newaxis]
        stacked[position] = each
    return stacked


def _as_array(value: Any) -> Any:
    """Return a value as an array; texts as objects, whose length may differ."""
    import numpy as np

    array = np.asarray(value)
    return array.astype(object) if array.dtype.kind in "US" else array
