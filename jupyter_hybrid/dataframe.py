"""The values of tasks as rows of a pandas data frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from . import frames
from .errors import HybridError


def frame_of(values: Sequence[tuple[int, Any]], label: str) -> Any:
    """Return a data frame of some tasks' values, indexed by task."""
    import pandas as pd

    rows = [_row(value, label) for _, value in values]
    tasks = [task for task, _ in values]
    if any(isinstance(row, pd.DataFrame) for row in rows):
        pieces = [row if isinstance(row, pd.DataFrame) else pd.DataFrame([row]) for row in rows]
        tasks = [task for task, piece in zip(tasks, pieces, strict=True) for _ in range(len(piece))]
        filled = [piece for piece in pieces if len(piece)]  # an empty one would change the types of columns
        frame = pd.concat(filled, ignore_index=True) if filled else pieces[0]
    else:
        frame = pd.DataFrame(rows)
    frame.index = pd.Index(tasks, dtype="int64", name="task")
    return frame


def _row(value: Any, label: str) -> Any:
    """Return the row of a value as a dict, or its data frame."""
    import pandas as pd

    if isinstance(value, pd.DataFrame):
        plain = isinstance(value.index, pd.RangeIndex) and value.index.name is None
        return value if plain else value.reset_index()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, pd.Series):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    return {label: value}


def is_scalar(value: object) -> bool:
    """Return whether pandas takes a value as a single one: a number, text, time, ``None``."""
    import pandas as pd

    return bool(pd.api.types.is_scalar(value))


def arguments_of(path: str, entries: Sequence[frames.Entry], parameters: Sequence[str] | None) -> dict[str, list[Any]]:
    """Return the arguments of some tasks by name, as far as they have names that all these tasks share.

    Parameters
    ----------
    path : str
        The file of the arguments.
    entries : sequence of Entry
        The tasks' records in it.
    parameters : sequence of str, optional
        Those of a function; not given for scripts.
    """
    named = []
    for item in frames.read_entries(path, entries):
        if isinstance(item, frames.FrameError):
            raise HybridError(f"the arguments of the tasks cannot be read: {item}") from item
        named.append(_named(item, parameters))
    return {name: [row[name] for row in named] for name in named[0] if all(name in row for row in named)}


def _named(item: Any, parameters: Sequence[str] | None) -> dict[str, Any]:
    """Return a task's arguments by name: a cell's variables, a function's arguments, a script's index and variables."""
    if isinstance(item, dict):
        return item
    if parameters is None:
        index, variables = item
        return {"index": index, **variables}
    return dict(zip(parameters, item, strict=False))


def with_arguments(frame: Any, values: Sequence[tuple[int, Any]], given: Mapping[str, list[Any]]) -> Any:
    """Return a data frame of tasks' values with their arguments as its first columns, once for each row of a task."""
    import pandas as pd

    position = pd.Index([task for task, _ in values]).get_indexer(frame.index)
    columns = {name: pd.Series(column).take(position).array for name, column in given.items() if name not in frame}
    return pd.concat([pd.DataFrame(columns, index=frame.index), frame], axis=1)


def fitted(frame: Any, like: Any, where: str) -> Any:
    """Return a data frame with the columns of another, and with their types where no value changes by that."""
    import numpy as np
    import pandas as pd

    extra = [str(name) for name in frame.columns if name not in like.columns]
    if extra:
        raise HybridError(
            f"{where} a value has a column {extra[0]!r} that those of the first tasks lack "
            f"({', '.join(map(str, like.columns))}); to_bag() takes values of any shape"
        )
    frame = frame.reindex(columns=like.columns)
    for name, wanted in like.dtypes.items():
        column = frame[name]
        if column.dtype == wanted:
            continue
        if column.isna().all() and np.dtype(getattr(wanted, "type", object)).kind not in "iub":
            frame[name] = pd.Series(index=frame.index, dtype=wanted)
        elif _is_number(column.dtype) and _is_number(wanted) and np.can_cast(column.dtype, wanted, "safe"):
            frame[name] = column.astype(wanted)
    return frame


def _is_number(dtype: Any) -> bool:
    import numpy as np

    return isinstance(dtype, np.dtype) and dtype.kind in "biufc"
