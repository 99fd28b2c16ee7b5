"""Fingerprints of values, functions and cells: the same in every kernel and on every machine of one Python version.

A value is hashed by its structure. Equal parts have equal fingerprints wherever they are, so sharing does not show;
only in a cycle a part refers back to where it was met. Functions and classes of the notebook are hashed by what they
do: bytecode, constants, defaults, closure, and the globals they read; never by file name, line or docstring.
"""

from __future__ import annotations

import ast
import collections
import dis
import enum
import functools
import os
import struct
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Mapping
from pickle import PickleBuffer
from typing import Any

from xxhash import xxh3_128, xxh3_128_digest

from .cellnames import global_names, parse
from .errors import HybridError

_HAS_DOCSTRING = 0x4000000  # a flag of code objects from Python 3.14; before, constant 0 is the docstring or None
_CLASS_NOISE = {"__firstlineno__", "__static_attributes__"}  # from 3.13: a line, and names in the order of a set
_CLASS_SKIP = _CLASS_NOISE | {
    *("__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate_func__"),
    *("__annotations_cache__", "__annotate__", "_abc_impl", "__type_params__", "__classdictcell__"),
}
_PYTHON = "{}.{}".format(*sys.version_info[:2])


_CACHED: Any = type(functools.lru_cache(print))


class UncacheableError(HybridError):
    """A value has no fingerprint; the message says which part of it, and why."""


def fingerprint(obj: Any, name: str = "the value") -> str:
    """Return 32 hexadecimal digits that depend on a value's structure alone.

    Raises
    ------
    UncacheableError
        A part of it (named from `name` on) has no state that could be hashed, as an open file.
    """
    return _Fingerprinter(name).visit(obj).hex()


def function_keys(
    function: Callable[..., Any], args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return fingerprints of the parts that decide a call's result.

    The keys are ``python``, ``code``, ``default:NAME``, ``closure:NAME``, ``global:NAME``, ``argument:NUMBER`` and
    ``argument:NAME``. A notebook function that the function reads as a global stands for its own code; the globals
    it reads in turn have keys of their own.
    """
    keys = {"python": _PYTHON}
    if isinstance(function, types.FunctionType) and not _importable(function):
        keys["code"] = fingerprint(function.__code__)
        for name, value in _defaults(function).items():
            keys[f"default:{name}"] = fingerprint(value, f"the default of {name!r}")
        for name, value in _closure(function).items():
            keys[f"closure:{name}"] = fingerprint(value, f"the closure variable {name!r}")
        pending, seen = [function], {id(function)}
        while pending:
            reader = pending.pop()
            for name, value in _globals(reader).items():
                label = f"the global {name!r}"
                if f"global:{name}" in keys or value is function:
                    continue
                if _notebook_function(value, function):
                    keys[f"global:{name}"] = fingerprint((value.__code__, _defaults(value), _closure(value)), label)
                    if id(value) not in seen:
                        seen.add(id(value))
                        pending.append(value)
                else:
                    keys[f"global:{name}"] = fingerprint(value, label)
    else:
        keys["code"] = fingerprint(function, "the function")
    for number, value in enumerate(args):
        keys[f"argument:{number}"] = fingerprint(value, f"argument {number}")
    for name, value in (kwargs or {}).items():
        keys[f"argument:{name}"] = fingerprint(value, f"argument {name!r}")
    return keys


def cell_keys(source: str, inputs: Mapping[str, Any], out: Iterable[str] = ()) -> dict[str, str]:
    """Return fingerprints of the parts that decide a cell's result: ``python``, ``source``, ``out``, ``in:NAME``.

    Comments, blank lines and layout of the source do not count.
    """
    keys = {"python": _PYTHON, "source": fingerprint(ast.dump(parse(source))), "out": fingerprint(sorted(out))}
    for name, value in inputs.items():
        keys[f"in:{name}"] = fingerprint(value, f"the variable {name!r}")
    return keys


def task_key(keys: Mapping[str, str], item: Any) -> str:
    """Return the key of one task's result: of what all tasks share and of what is the task's own."""
    return fingerprint((dict(keys), item), "the task's argument")


_WORDS = {
    "default": "the default of {!r}",
    "closure": "the closure variable {!r}",
    "global": "the global {!r}",
    "in": "the variable {!r}",
}
_PARTS = {"code": "the code of the function", "source": "the code of the cell", "out": "the set of names to give back"}


def explain(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return a sentence for each part that differs between two sets of keys; none if the result could be used."""
    sentences = []
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) == new.get(key):
            continue
        kind, _, name = key.partition(":")
        if key == "python":
            sentences.append(f"Python changed from {old.get(key, 'unknown')} to {new.get(key, 'unknown')}")
            continue
        if kind == "argument":
            what = f"argument {name}" if name.isdigit() else f"argument {name!r}"
        else:
            what = _PARTS.get(key) or _WORDS.get(kind, key).format(name)
        change = "changed" if key in old and key in new else "is new" if key in new else "is no longer used"
        sentences.append(f"{what} {change}")
    return sentences


class _Fingerprinter:
    """Hashes one object graph in one pass.

    A reference to an object that is being visited is hashed as its distance on the stack. An object completed since,
    but part of a cycle that is still open, is hashed as its distance in the order of completion (as in Tarjan's
    algorithm for strongly connected components). Both distances depend on the cycle alone, not on who refers to it.
    """

    def __init__(self, name: str) -> None:
        self.path = [name]
        self.stack: dict[int, int] = {}  # id -> depth of an object being visited
        self.open: dict[int, tuple[int, int]] = {}  # id -> order of completion, depth of the lowest object referred to
        self.known: dict[int, bytes] = {}
        self.low = [0]  # for each depth, the lowest depth referred to from there
        self.alive: list[Any] = []  # ids stay unique as long as their objects live

    def visit(self, obj: Any, label: str = "") -> bytes:
        kind = type(obj)
        if kind in _SCALARS:
            return xxh3_128_digest(kind.__name__.encode() + b"\0" + _SCALARS[kind](obj))
        key = id(obj)
        if key in self.known:
            return self.known[key]
        if key in self.stack:
            depth = self.stack[key]
            self.low[-1] = min(self.low[-1], depth)
            return xxh3_128_digest(b"up\0%d" % (len(self.stack) - depth))
        if key in self.open:
            order, low = self.open[key]
            self.low[-1] = min(self.low[-1], low)
            return xxh3_128_digest(b"back\0%d" % (len(self.open) - order))
        depth, first = len(self.stack), len(self.open)
        self.stack[key] = depth
        self.low.append(depth)
        self.path.append(label)
        self.alive.append(obj)
        try:
            digest = self.structure(obj, kind)
        except RecursionError:
            raise UncacheableError(f"{self.path[0]} is nested too deeply for a fingerprint") from None
        self.path.pop()
        low = self.low.pop()
        del self.stack[key]
        if low == depth:
            self.known[key] = digest
            for done in list(self.open)[first:]:
                del self.open[done]
        else:
            self.open[key] = (len(self.open), low)
            self.low[-1] = min(self.low[-1], low)
        return digest

    # --- kinds of objects ---

    def structure(self, obj: Any, kind: type) -> bytes:
        if kind is tuple or kind is list:
            return self.row(kind.__name__, obj)
        if kind is dict or kind is types.MappingProxyType:
            return self.mapping("dict", obj)
        if isinstance(obj, (set, frozenset)):
            state = [] if kind in (set, frozenset) else [self.visit(kind), self.visit(getattr(obj, "__dict__", None))]
            return _join(kind.__name__, *state, *sorted(self.standalone(part) for part in obj))
        if isinstance(obj, types.CodeType):
            return self.code(obj)
        if isinstance(obj, types.FunctionType):
            return self.function(obj)
        if isinstance(obj, type):
            return self.class_(obj)
        if isinstance(obj, types.ModuleType):
            return self.module(obj)
        if isinstance(obj, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
            owner = getattr(obj, "__self__", None)
            if owner is None or isinstance(owner, types.ModuleType):
                return _join("builtin", str(getattr(obj, "__module__", "")).encode(), obj.__qualname__.encode())
            return _join("method", obj.__name__.encode(), self.visit(owner))
        if isinstance(obj, types.MethodType):
            return _join("method", self.visit(obj.__func__), self.visit(obj.__self__))
        if isinstance(obj, (staticmethod, classmethod)):
            return _join(kind.__name__, self.visit(obj.__func__))
        if isinstance(obj, property):
            return _join("property", *(self.visit(part) for part in (obj.fget, obj.fset, obj.fdel)))
        if isinstance(obj, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            return _join("slot", obj.__name__.encode())
        if isinstance(obj, _CACHED):
            return _join("cached", self.visit(obj.__wrapped__), self.visit(obj.cache_parameters()))
        if kind is PickleBuffer:
            return _join("buffer", xxh3_128_digest(obj.raw()))
        if kind.__module__.partition(".")[0] in ("numpy", "pandas"):
            digest = self.array(obj, kind)
            if digest is not None:
                return digest
        return self.reduced(obj, kind)

    def row(self, tag: str, parts: Iterable[Any]) -> bytes:
        return _join(tag, *(self.visit(part, f"[{number}]") for number, part in enumerate(parts)))

    def mapping(self, tag: str, items: Mapping[Any, Any]) -> bytes:
        """Hash a mapping; the order of insertion does not count."""
        ordered = sorted(((self.standalone(key), key) for key in items), key=lambda entry: entry[0])
        return _join(tag, *(digest + self.visit(items[key], f"[{key!r:.40}]") for digest, key in ordered))

    def standalone(self, part: Any) -> bytes:
        """Visit what has no order of its own: its digest must not depend on what was visited before it."""
        depth = len(self.stack)
        self.low.append(depth)
        digest = self.visit(part, f"{{{part!r:.40}}}" if type(part) in _SCALARS else "{…}")
        if self.low.pop() < depth:
            raise UncacheableError(f"{self.where()} has a set or dictionary that holds itself among its keys")
        return digest

    def code(self, code: types.CodeType) -> bytes:
        constants = list(code.co_consts)
        if _documented(code):
            constants[0] = None
        for index in _noise(code):
            constants[index] = None
        tables = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        return _join(
            "code",
            code.co_code,
            getattr(code, "co_exceptiontable", b""),
            b"%d %d %d" % (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
            b"%d" % (code.co_flags & ~_HAS_DOCSTRING),
            *("\0".join(names).encode() for names in tables),
            *(self.visit(constant) for constant in constants),
        )

    def function(self, function: types.FunctionType) -> bytes:
        if _importable(function):
            return self.named(function)
        attributes = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        return _join(
            "function",
            self.visit(function.__code__, "'s code"),
            *(self.visit(value, f", default of {name!r}") for name, value in _defaults(function).items()),
            *(self.visit(value, f", closure variable {name!r}") for name, value in _closure(function).items()),
            *(name.encode() + self.visit(value, f", global {name!r}") for name, value in _globals(function).items()),
            *([self.mapping("attributes", attributes)] if attributes else []),
        )

    def class_(self, kind: type) -> bytes:
        if _importable(kind):
            return self.named(kind)
        members: dict[str, Any]
        if issubclass(kind, enum.Enum):
            own = (types.FunctionType, staticmethod, classmethod, property)
            members = {name: value for name, value in vars(kind).items() if type(value) in own and name[:2] != "__"}
            members["values"] = [(name, member.value) for name, member in kind.__members__.items()]
        else:
            members = {name: value for name, value in vars(kind).items() if name not in _CLASS_SKIP}
        return _join(
            "class",
            kind.__name__.encode(),
            self.visit(type(kind)),
            *(self.visit(base, ", a base class") for base in kind.__bases__),
            *(name.encode() + b"\0" + self.visit(members[name], f".{name}") for name in sorted(members)),
        )

    def module(self, module: types.ModuleType) -> bytes:
        """Hash the user's own module by its source and that of the own modules it uses, another by name and version."""
        path = _own_source(module)
        if path is None:
            return _join("module", module.__name__.encode(), _version(module.__name__).encode())
        try:
            status = os.stat(path)
            source = _source_digest(path, status.st_mtime_ns, status.st_size)
        except (OSError, SyntaxError, ValueError) as error:
            raise UncacheableError(f"{self.where()}: the module {module.__name__!r} cannot be read: {error}") from error
        used: dict[str, types.ModuleType] = {}
        for value in list(vars(module).values()):
            name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            other = sys.modules.get(name) if isinstance(name, str) else None
            if other is not None and other is not module and _own_source(other) is not None:
                used[other.__name__] = other
        return _join("module", module.__name__.encode(), source, *(self.visit(used[name]) for name in sorted(used)))

    def named(self, obj: Any) -> bytes:
        return _join("named", obj.__qualname__.encode(), self.visit(sys.modules[obj.__module__]))

    def array(self, obj: Any, kind: type) -> bytes | None:
        import numpy

        if isinstance(obj, numpy.dtype):
            return _join("dtype", repr(obj).encode())
        if isinstance(obj, numpy.generic) and not obj.dtype.hasobject:
            return _join("scalar", repr(obj.dtype).encode(), obj.tobytes())
        if kind is numpy.ndarray or kind is numpy.memmap:
            head = (repr(obj.dtype).encode(), repr(obj.shape).encode())
            if obj.dtype.hasobject:
                return _join("array", *head, *(self.visit(part, f"[{n}]") for n, part in enumerate(obj.reshape(-1))))
            return _join("array", *head, _array_bytes(obj))
        if "pandas" not in sys.modules or not kind.__module__.startswith("pandas"):
            return None
        import pandas

        if kind is pandas.DataFrame:
            columns = (self.visit(obj.iloc[:, n].array, f"[{name!r}]") for n, name in enumerate(obj.columns))
            return _join("frame", self.visit(obj.columns, ".columns"), self.visit(obj.index, ".index"), *columns)
        if kind in (pandas.Series, pandas.Index):
            index = [self.visit(obj.index, ".index")] if kind is pandas.Series else []
            return _join(kind.__name__, self.visit(obj.name), self.visit(obj.array), *index)
        if kind.__name__ == "NumpyExtensionArray":
            return self.visit(obj.to_numpy())
        if isinstance(getattr(obj, "dtype", None), pandas.StringDtype):
            missing = numpy.asarray(obj.isna())
            texts = pandas.util.hash_array(numpy.asarray(obj[~missing], dtype=object), categorize=False)
            return _join("strings", repr(obj.dtype).encode(), _array_bytes(missing), _array_bytes(texts))
        return None

    def reduced(self, obj: Any, kind: type) -> bytes:
        """Anything else: by what pickle would save of it."""
        import copyreg

        try:
            reducer = copyreg.dispatch_table.get(kind)
            saved = reducer(obj) if reducer else obj.__reduce_ex__(5)
        except Exception as error:  # user classes may raise anything
            raise UncacheableError(f"{self.where()}, a {kind.__qualname__}, has no fingerprint: {error}") from error
        self.alive.append(saved)
        if isinstance(saved, str):
            owner = getattr(obj, "__module__", None) or kind.__module__
            return _join("global", owner.encode(), saved.encode(), _version(owner).encode())
        ordered = isinstance(obj, collections.OrderedDict)
        function, arguments, state, items, pairs = (*saved, None, None, None)[:5]
        return _join(
            "object",
            self.visit(function),
            self.row("", arguments),
            self.attributes(state),
            self.row("", list(items)) if items is not None else b"",
            (self.row("", list(pairs)) if ordered else self.mapping("", dict(pairs))) if pairs is not None else b"",
        )

    def attributes(self, state: Any) -> bytes:
        if type(state) is dict and all(type(name) is str for name in state):
            return _join(
                "state", *(name.encode() + b"\0" + self.visit(state[name], f".{name}") for name in sorted(state))
            )
        return self.visit(state)

    def where(self) -> str:
        return "".join(self.path)


def _join(tag: str, *parts: bytes) -> bytes:
    """Return one digest of parts of any lengths."""
    hasher = xxh3_128(tag.encode())
    for part in parts:
        hasher.update(struct.pack("<q", len(part)))
        hasher.update(part)
    return hasher.digest()


def _pack_float(value: float) -> bytes:
    return struct.pack("<d", value)


_SCALARS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"",
    type(...): lambda _: b"",
    type(NotImplemented): lambda _: b"",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: b"%x" % value if value >= 0 else b"-%x" % -value,
    float: _pack_float,
    complex: lambda value: _pack_float(value.real) + _pack_float(value.imag),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: value,
    bytearray: lambda value: value,
}


def _array_bytes(array: Any) -> bytes:
    """Return the digest of an array's elements in C order, without copying a contiguous one."""
    import numpy

    if not array.size or not array.dtype.itemsize:
        return b""
    if array.flags.c_contiguous:
        return xxh3_128_digest(array.reshape(-1).view(numpy.uint8))
    hasher = xxh3_128()
    for block in numpy.nditer(array, flags=["external_loop", "buffered"], order="C", buffersize=1 << 16):
        hasher.update(numpy.ascontiguousarray(block).view(numpy.uint8))
    return hasher.digest()


def _documented(code: types.CodeType) -> bool:
    """Whether constant 0 is a docstring and nothing else."""
    if code.co_flags & 3 != 3 or not code.co_consts or not isinstance(code.co_consts[0], str):
        return False  # not the body of a function
    if sys.version_info >= (3, 14):
        return bool(code.co_flags & _HAS_DOCSTRING)
    if code.co_name.startswith("<"):  # a lambda or comprehension
        return False
    operations = zip(code.co_code[::2], code.co_code[1::2], strict=True)
    return not any(operation in _LOAD_CONST and argument == 0 for operation, argument in operations)


_LOAD_CONST = {dis.opmap[name] for name in ("LOAD_CONST", "RETURN_CONST") if name in dis.opmap}


def _noise(code: types.CodeType) -> list[int]:
    """Return the indices of constants that depend on lines or hash seeds: in class bodies, from Python 3.13."""
    if not _CLASS_NOISE.intersection(code.co_names):
        return []
    found, last = [], None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_NAME" and instruction.argval in _CLASS_NOISE and last is not None:
            found.append(last)
        last = instruction.arg if instruction.opname == "LOAD_CONST" else None
    return found


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    values = function.__defaults__ or ()
    names = function.__code__.co_varnames[: function.__code__.co_argcount][-len(values) :] if values else ()
    return {**dict(zip(names, values, strict=True)), **dict(sorted((function.__kwdefaults__ or {}).items()))}


def _closure(function: types.FunctionType) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, map(_contents, function.__closure__ or ()), strict=True))


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _globals(function: types.FunctionType) -> dict[str, Any]:
    namespace = function.__globals__
    return {name: namespace[name] for name in sorted(global_names(function.__code__)) if name in namespace}


def _notebook_function(value: Any, beside: types.FunctionType) -> bool:
    """Whether a value is a function of the same notebook: global names mean the same in both."""
    return isinstance(value, types.FunctionType) and value.__globals__ is beside.__globals__ and not _importable(value)


def _importable(obj: Any) -> bool:
    """Whether a function or class is known by its name: it can be imported on the node too."""
    module = sys.modules.get(obj.__module__) if obj.__module__ != "__main__" else None
    found: Any = module
    for name in obj.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is obj


@functools.cache
def _installed_roots() -> tuple[str, ...]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple(os.path.join(os.path.realpath(path), "") for path in paths if path)


def _own_source(module: types.ModuleType) -> str | None:
    """Return the source file of a module that is the user's own: not installed, not built in."""
    path = getattr(module, "__file__", None)
    if not isinstance(path, str) or not path.endswith(".py") or "-packages" + os.sep in path:
        return None
    path = os.path.realpath(path)
    return None if path.startswith(_installed_roots()) else path


@functools.lru_cache(maxsize=256)
def _source_digest(path: str, changed: int, size: int) -> bytes:
    """Return the digest of a source file without its comments and layout; time and size only key the cache."""
    with open(path, "rb") as file:
        return xxh3_128_digest(ast.dump(ast.parse(file.read())).encode())


@functools.cache
def _version(module: str) -> str:
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        return _PYTHON
    return str(getattr(sys.modules.get(package), "__version__", ""))
