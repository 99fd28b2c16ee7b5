"""Whether a cell, or a function with its arguments, can travel to the pool; notebook functions go by value.

:func:`collect` looks up what :mod:`.cellnames` found a cell to read, and encodes it once.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import frames
from .cellnames import BUILTINS, CellNames, analyse, global_names, may_assign
from .errors import CaptureError, near_match

LIMIT = 100 << 20
"""Default limit in bytes of everything a cell or a call takes along."""


@dataclass(frozen=True)
class CellCapture:
    """A cell with all it takes along, serialised once.

    Parameters
    ----------
    source : str
        The cell.
    inputs : mapping of str to object
        The variables it takes along.
    out : tuple of str
        The names it gives back.
    explicit_out : bool
        Whether the user named them; then each must exist at the end of the cell.
    payload : mapping
        What :func:`cellrun.run_cell` takes.
    frames : list of bytes or memoryview
        The payload, encoded.
    """

    source: str
    inputs: dict[str, Any]
    out: tuple[str, ...]
    explicit_out: bool
    payload: dict[str, Any] = field(repr=False)
    frames: list[Any] = field(repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Serialised size of each input in bytes, measured one by one: for a report, not on every submission."""
        return {name: _size(frames.encode(value)) for name, value in self.inputs.items()}


def collect(
    source: str,
    namespace: Mapping[str, Any],
    *,
    inputs: Iterable[str] | None = None,
    outputs: Iterable[str] | None = None,
    extra_names: Iterable[str] = (),
    limit: int = LIMIT,
    title: str = "",
) -> CellCapture:
    """Return a cell with the variables it needs, ready to travel.

    Parameters
    ----------
    source : str
        The cell.
    namespace : mapping
        The notebook's variables.
    inputs : iterable of str, optional
        What it takes along instead of what it reads (``--in``); modules that it reads go in any case, by name.
    outputs : iterable of str, optional
        What it gives back (``--out``). By default all names it assigns but imports and those that start with an
        underscore; loop variables, functions and classes are among them.
    extra_names : iterable of str
        Variables that each task brings itself.
    limit : int
        Largest size in bytes of all inputs together.
    title : str
        What tracebacks call the cell.

    Raises
    ------
    CaptureError
        A variable is missing, cannot be pickled or is too large; or the cell never assigns a name of `outputs`.
    SyntaxError
        In the cell.
    """
    names = analyse(source)
    own = set(extra_names)
    hidden = _shell_names(namespace)
    wanted = {name for name in names.reads | names.builtins if name in namespace and name not in hidden} - own
    if inputs is None:
        missing = sorted(name for name in names.required if name not in namespace and name not in own)
    else:
        inputs = list(inputs)
        missing = [name for name in inputs if name not in namespace]
        wanted = {name for name in wanted if isinstance(namespace[name], types.ModuleType)} | (set(inputs) - own)
    if missing:
        known = {name for name in namespace if not name.startswith("_")} - hidden
        known |= {*BUILTINS, *names.writes} if inputs is None else set()
        reader = "the cell reads" if inputs is None else "--in names"
        raise CaptureError(f"{reader} what the notebook does not have: {_with_near_matches(missing, known)}")
    found = {name: namespace[name] for name in sorted(wanted)}
    explicit = outputs is not None
    if outputs is not None:
        outputs = list(outputs)
        _check_outputs(outputs, names, namespace, {*found, *own})
    out = tuple(dict.fromkeys(outputs if outputs is not None else (n for n in names.writes if not n.startswith("_"))))
    payload = {"source": source, "inputs": found, "out": out, "explicit_out": explicit, "title": title}
    if namespace.get("__name__") == "__main__" and isinstance(namespace, dict):
        # cloudpickle gives all functions of one globals dictionary one new dictionary; this one leads to it, so that
        # the cell and the functions it calls share their variables on the node as they do in the notebook.
        payload["anchor"] = types.FunctionType((lambda: None).__code__, namespace, "anchor")
    data = _encode(payload, limit, {f"variable {name!r}": value for name, value in found.items()}, _CELL_WAYS)
    return CellCapture(source, found, out, explicit, payload, data)


def _with_near_matches(names: Iterable[str], known: Iterable[str]) -> str:
    return ", ".join(f"{name!r}{near_match(name, sorted(known))}" for name in names)


def _check_outputs(
    outputs: Iterable[str], names: CellNames, namespace: Mapping[str, Any], there: Iterable[str]
) -> None:
    """Refuse to give back what the cell surely will not have: it neither assigns it nor takes it along."""
    known = {*names.writes, *names.imports, *there}
    missing = [name for name in outputs if name not in known]
    if not missing or names.dynamic:
        return
    functions = [code for value in list(namespace.values()) for code in _codes(value)]
    missing = [name for name in missing if not any(may_assign(code, name) for code in functions)]
    if missing:
        raise CaptureError(f"--out names what the cell does not assign: {_with_near_matches(missing, known)}")


def _codes(value: Any) -> Iterator[types.CodeType]:
    """Yield the code of a function of the notebook, or of the methods of a class of it."""
    members = vars(value).values() if isinstance(value, type) else [value]
    for member in members:
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if isinstance(function, types.FunctionType) and function.__module__ == "__main__":
            yield function.__code__


def check_function(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    limit: int = LIMIT,
) -> list[Any]:
    """Return the frames of ``(function, args, kwargs)``.

    Raises
    ------
    CaptureError
        An argument, or what the function closes over or reads, cannot be pickled or is too large.
    """
    kwargs = dict(kwargs or {})
    parts = {f"argument {number}": value for number, value in enumerate(args)}
    parts.update((f"argument {name!r}", value) for name, value in kwargs.items())
    name = getattr(function, "__name__", type(function).__name__)
    parts[f"function {name!r}"] = function
    return _encode((function, args, kwargs), limit, parts, _FUNCTION_WAYS)


_CELL_WAYS = (
    "open or make it inside the cell, or name what the cell takes along with --in",
    "save it to the pool's storage and read it in the cell, or name what the cell takes along with --in",
)
_FUNCTION_WAYS = ("open or make it inside the function", "save it to the pool's storage and read it in the function")


def _encode(obj: Any, limit: int, parts: Mapping[str, Any], ways: tuple[str, str]) -> list[Any]:
    """Encode once; only if that fails, or is too much, look for the part to blame."""
    _teach_pickle_the_shell()
    try:
        data = frames.encode(obj)
    except Exception as error:  # user classes may raise anything while they are pickled
        for label, value in parts.items():
            reason = _problem(value)
            if reason is not None:
                path, culprit, reason = _blame(value, reason)
                place = f"{label}{path} ({_type_name(culprit)}) cannot travel to the pool"
                raise CaptureError(f"{place}: {reason}; {ways[0]}") from error
        raise CaptureError(f"this cannot travel to the pool: {_first_line(error)}; {ways[0]}") from error
    total = _size(data)
    if total <= limit:
        return data
    sizes = {label: _size(frames.encode(value)) for label, value in parts.items()}
    largest = sorted(sizes, key=lambda label: -sizes[label])[:3]
    path, culprit = _heaviest(parts[largest[0]], sizes[largest[0]])
    text = f"{largest[0]}{path} ({_type_name(culprit)}) has {_megabytes(sizes[largest[0]])}"
    if sizes[largest[0]] <= limit:
        rest = ", ".join(f"{label} has {_megabytes(sizes[label])}" for label in largest[1:])
        text += f", {rest}, all together {_megabytes(total)}"
    raise CaptureError(f"{text}; the limit is {_megabytes(limit)}: {ways[1]}")


def _size(data: Iterable[Any]) -> int:
    return sum(memoryview(frame).nbytes for frame in data)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MB" if size >= 2**20 / 10 else f"{size / 2**10:,.1f} kB"


def _type_name(value: Any) -> str:
    kind = type(value)
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _problem(value: Any) -> str | None:
    """Return why a value cannot be pickled, or None."""
    try:
        frames.encode(value)
    except Exception as error:  # noqa: BLE001 - as in _encode
        return _first_line(error)
    return None


def _blame(value: Any, reason: str) -> tuple[str, Any, str]:
    """Return the path to the innermost part that cannot be pickled, that part, and the reason."""
    path, seen = "", {id(value)}
    while len(seen) < 20:
        for label, part in _parts(value):
            problem = None if id(part) in seen else _problem(part)
            if problem is not None:
                path, value, reason = path + label, part, problem
                seen.add(id(part))
                break
        else:
            break
    return path, value, reason


def _heaviest(value: Any, size: int) -> tuple[str, Any]:
    """Return the path to the part of a function that has most of its size, and that part."""
    path = ""
    while isinstance(value, (types.FunctionType, types.MethodType, type)) and len(path) < 500:
        sizes = [(_size(frames.encode(part)), label, part) for label, part in _parts(value)]
        heavy = max(sizes, key=lambda entry: entry[0], default=(0, "", None))
        if heavy[0] < size * 0.5:
            break
        path, value = path + heavy[1], heavy[2]
    return path, value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value is made of, each with how a person would say it after the value's name."""
    if isinstance(value, types.FunctionType):
        if _by_reference(value):
            return
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                yield f", closure variable {name!r}", cell.cell_contents
        for name in sorted(global_names(value.__code__)):
            if name in value.__globals__:
                yield f", global {name!r}", value.__globals__[name]
        for number, default in enumerate(value.__defaults__ or ()):
            yield f", default {number}", default
        for name, default in (value.__kwdefaults__ or {}).items():
            yield f", default {name!r}", default
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, type):
        if not _by_reference(value):
            for name, member in vars(value).items():
                if name not in ("__dict__", "__weakref__"):
                    yield f".{name}", getattr(member, "__func__", getattr(member, "fget", member))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield f"[{key!r}]", part
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield f"[{number}]", part
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield ".args", value.args
        yield ".keywords", value.keywords
    elif isinstance(getattr(value, "__dict__", None), dict):
        for name, part in vars(value).items():
            yield f".{name}", part
        yield ", its class", type(value)


def _by_reference(value: Any) -> bool:
    """Whether a function or class travels by its name: it can be imported."""
    if value.__module__ == "__main__":
        return False
    found: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _shell_names(namespace: Mapping[str, Any]) -> set[str]:
    """Return the variables that IPython put into the notebook: the node's shell has its own."""
    shell = _shell()
    if shell is None:
        return set()
    hidden = shell.user_ns_hidden
    return {name for name in hidden if name in namespace and namespace[name] is hidden[name]}


def _shell() -> Any:
    interactive = sys.modules.get("IPython.core.interactiveshell")
    if interactive is None or not interactive.InteractiveShell.initialized():
        return None
    return interactive.InteractiveShell.instance()


def _teach_pickle_the_shell() -> None:
    """Let functions with a magic or ``!command``, which read ``get_ipython``, find the shell of the node."""
    shell = _shell()
    if shell is not None:
        copyreg.pickle(type(shell), _reduce_shell)


def _reduce_shell(shell: Any) -> tuple[Any, tuple[()]]:
    from IPython.core.interactiveshell import InteractiveShell

    return InteractiveShell.instance, ()
