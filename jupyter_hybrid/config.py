"""Pools from YAML files: where they are looked for, what they may say, and errors that name file, line and key."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import ConfigError, near_match
from .spec import RESOURCE_ALIASES, Resources, parse_memory, parse_time

if TYPE_CHECKING:
    from yaml import SafeLoader
    from yaml.nodes import MappingNode, ScalarNode, SequenceNode

    Node = ScalarNode | SequenceNode | MappingNode

CONFIG_VARIABLE = "JUPYTER_HYBRID_CONFIG"
"""Environment variable with the only file to read, if set."""

BUILT_IN = "built-in"

_POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIABLE_USE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)  # as os.path.expandvars reads it
_OWN_KINDS = ("local", "slurm")  # known without looking for other packages
_CONTAINER_KINDS = ("apptainer", "singularity")
_RESOURCE_NAMES = (*(f.name for f in fields(Resources)), *RESOURCE_ALIASES)


@dataclass(frozen=True)
class Limits:
    """What a pool lets one user do.

    Parameters
    ----------
    max_jobs : int, optional
        Most batches in the scheduler's queue at once; what is beyond waits here.
    max_array : int, optional
        Most batches of one array, where the site allows fewer than the scheduler says.
    poll_min, poll_max : datetime.timedelta
        Bounds of the interval between two queries of the scheduler.
    """

    max_jobs: int | None = None
    max_array: int | None = None
    poll_min: timedelta = timedelta(seconds=1)
    poll_max: timedelta = timedelta(seconds=30)


@dataclass(frozen=True)
class Prices:
    """What the pool costs, in any one currency: a core for an hour, a GPU for an hour."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0


@dataclass(frozen=True)
class Container:
    """Image in which jobs run; `kind` is ``apptainer`` or ``singularity``, `bind` its ``source[:target[:options]]``."""

    image: str
    kind: str = "apptainer"
    bind: tuple[str, ...] = ()


@dataclass(frozen=True)
class PoolConfig:
    """One pool as its file describes it.

    Parameters
    ----------
    name : str
        Up to 64 letters, digits, dots, dashes and underscores.
    kind : str
        Name of an entry point of the group ``jupyter_hybrid.backends``.
    resources : Resources
        Defaults for the pool's jobs.
    limits : Limits
        What the pool lets one user do.
    storage : str, optional
        Absolute folder, or URL, for run folders.
    python : str, optional
        Interpreter on the nodes.
    prologue : tuple of str
        Shell lines that run before the worker: ``module load``, ``conda activate``.
    environment : mapping of str to str
        Variables for the jobs.
    env : mapping of str to str
        Variables for the scheduler's own commands.
    container : Container, optional
        Image in which the jobs run.
    prices : Prices
        What a cpu-hour and a gpu-hour cost.
    speed : float
        How fast a core is compared with one of speed 1.
    options : mapping
        What only this kind has. Local: its slots, ``cpus`` and ``gpus`` (int), ``memory`` (bytes).
    source : str
        ``file:line``, or ``built-in``.
    """

    name: str
    kind: str
    resources: Resources = field(default_factory=Resources)
    limits: Limits = field(default_factory=Limits)
    storage: str | None = None
    python: str | None = None
    prologue: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    container: Container | None = None
    prices: Prices = field(default_factory=Prices)
    speed: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = BUILT_IN


@dataclass(frozen=True)
class Config:
    """All pools, by name, in the order of the files; and the files that were read, the first one the strongest."""

    pools: Mapping[str, PoolConfig]
    default: str | None = None
    files: tuple[Path, ...] = ()

    def pool(self, name: str | None = None) -> PoolConfig:
        """Return the pool of this name; without a name the default pool, else the first one.

        Raises
        ------
        ConfigError
            There is no such pool; the message lists those there are.
        """
        if name is None:
            name = self.default or next(iter(self.pools))
        if name not in self.pools:
            files = ", ".join(map(str, self.files)) or "no configuration file"
            near = near_match(name, self.pools)
            raise ConfigError(f"no pool {name!r}{near}; pools: {', '.join(self.pools)} (from {files})")
        return self.pools[name]

    def first_of_kind(self, kind: str) -> PoolConfig:
        """Return the first pool of one kind.

        Raises
        ------
        ConfigError
            There is none; the message shows how to define one.
        """
        for pool in self.pools.values():
            if pool.kind == kind:
                return pool
        have = ", ".join(f"{pool.name} ({pool.kind})" for pool in self.pools.values())
        raise ConfigError(
            f"no pool of kind {kind!r}; pools: {have}. Define one in hybrid.yaml of the project folder or in "
            f"{_user_folder() / 'hybrid.yaml'}:\npools:\n  my-{kind}:\n    kind: {kind}"
        )


def load(cwd: str | os.PathLike[str] | None = None) -> Config:
    """Read all configuration files; the first that defines a pool, or the default, wins.

    In this order: ``hybrid.yaml`` in `cwd` or the nearest folder above it (up to the home directory); ``hybrid.yaml``
    and ``hybrid.d/*.yaml`` of the user's, then of each of the system's Jupyter configuration folders. If
    ``JUPYTER_HYBRID_CONFIG`` is set, only the file that it names. A pool ``local`` is added if there is none of its
    kind; where no file defines any pool, also ``slurm`` if its commands are on PATH.

    Parameters
    ----------
    cwd : path, optional
        Folder to search from; the current one by default.

    Raises
    ------
    ConfigError
        A file cannot be read or is wrong; the message names file, line and key of all that is wrong in it.
    """
    files = tuple(_files(cwd))
    pools: dict[str, PoolConfig] = {}
    default: str | None = None
    default_source = ""
    for path in files:
        file = _File(path)
        for pool in file.pools:
            pools.setdefault(pool.name, pool)
        if default is None and file.default is not None:
            default, default_source = file.default, f"{path}:{file.default_line}"
    detect = not pools
    if all(pool.kind != "local" for pool in pools.values()):
        pools.setdefault("local", PoolConfig("local", "local"))
    if detect and shutil.which("sbatch") and shutil.which("squeue"):
        pools["slurm"] = PoolConfig("slurm", "slurm")
    if default is not None and default not in pools:
        known = ", ".join(pools)
        raise ConfigError(f"{default_source}: default: no pool {default!r}{near_match(default, pools)}; pools: {known}")
    return Config(pools, default, files)


def _files(cwd: str | os.PathLike[str] | None) -> Iterator[Path]:
    only = os.environ.get(CONFIG_VARIABLE)
    if only:
        yield Path(only).expanduser().absolute()
        return
    project = _project_file(cwd)
    if project is not None:
        yield project
    from jupyter_core.paths import jupyter_config_path

    folders = [_user_folder(), *map(Path, jupyter_config_path())]
    for folder in dict.fromkeys(folders):
        found = [folder / "hybrid.yaml", *sorted((folder / "hybrid.d").glob("*.yaml"))]
        yield from (path for path in found if path != project and os.path.isfile(path))


def _user_folder() -> Path:
    from jupyter_core.paths import jupyter_config_dir

    return Path(jupyter_config_dir())


def _project_file(cwd: str | os.PathLike[str] | None) -> Path | None:
    try:
        start = Path(cwd if cwd is not None else os.getcwd()).resolve()
    except FileNotFoundError:  # the current folder has been deleted
        return None
    home = Path(os.path.expanduser("~")).resolve()
    for folder in (start, *start.parents):
        if os.path.isfile(folder / "hybrid.yaml"):
            return _trusted(folder / "hybrid.yaml")
        if folder == home:
            break
    return None


def _trusted(path: Path) -> Path:
    """Return a project file, unless anybody could have put it there: its prologue runs as whoever submits."""
    if os.stat(path.parent).st_mode & stat.S_IWOTH and os.stat(path).st_uid not in (0, os.getuid()):
        raise ConfigError(
            f"{path} belongs to another user and lies in a folder that everybody may write to; it is not used. "
            f"If you trust it, copy it, or name it: export {CONFIG_VARIABLE}={path}"
        )
    return path


_YAML = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_YAML + name for name in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge")}
_Reader = Callable[["Node"], Any]


class _File:
    """One file, read node by node so that every problem has its line; a value is the text as it is written.

    YAML 1.1 makes 8 of ``010``, True of ``on`` and 5400 of ``1:30:00``: numbers, durations and a scheduler's own words
    are therefore taken from the text of their node. A reader raises ValueError, which is noted with the key's line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: set[tuple[int, str]] = set()
        self.keys: list[str] = []
        self.pools: list[PoolConfig] = []
        self.default: str | None = None
        self.default_line = 0
        root = self._compose()
        if root is not None and root.tag != _YAML + "null":  # only comments, or a lone ---
            try:
                self._fields(root, {"default": self._default, "pools": lambda node: self._each(node, self._pool)})
            except ValueError as error:
                self._problem(root, str(error))
        if self.problems:
            raise ConfigError("\n".join(f"{path}:{line}: {text}" for line, text in sorted(self.problems)))

    def _compose(self) -> Node | None:
        import yaml

        text = ""
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
            loader = yaml.SafeLoader(text)
            root = cast("Node | None", loader.get_single_node())
            if root is not None:
                self._resolve(loader, root, set())
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ConfigError(f"{self.path}:{line}: not UTF-8 text") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark is not None else 1
            raise ConfigError(f"{self.path}:{line}: malformed YAML: {error.problem}") from None
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise ConfigError(f"{self.path}:{line}: malformed YAML: {error.reason}") from None
        except RecursionError:
            raise ConfigError(f"{self.path}: malformed YAML: nested too deeply") from None
        return root

    def _resolve(self, loader: SafeLoader, node: Node, seen: set[int]) -> None:
        """Note duplicate keys and tags that are not plain YAML, and put what ``<<`` merges in its place."""
        if id(node) in seen:
            return
        seen.add(id(node))
        if node.tag not in _PLAIN_TAGS:
            self._problem(node, f"tag {node.tag.replace(_YAML, '!!')!r} is not allowed")
        if node.id == "sequence":
            for item in node.value:
                self._resolve(loader, item, seen)
        elif node.id == "mapping":
            lines: dict[str, int] = {}
            for key, value in node.value:
                self._resolve(loader, key, seen)
                self._resolve(loader, value, seen)
                if key.id == "scalar":
                    if key.value in lines:
                        self._problem(key, f"duplicate key {key.value!r}, first in line {lines[key.value]}")
                    lines.setdefault(key.value, key.start_mark.line + 1)
            loader.flatten_mapping(cast("MappingNode", node))  # what is merged comes first: the mapping's own wins
            last = {key.value if key.id == "scalar" else id(key): (key, value) for key, value in node.value}
            node.value = list(last.values())

    def _problem(self, node: Node, text: str) -> None:
        where = ".".join(self.keys)
        self.problems.add((node.start_mark.line + 1, f"{where}: {text}" if where else text))

    def _each(self, node: Node, read: Callable[[Node, Node], Any]) -> dict[str, Any]:
        """Return what `read` makes of each key and value of a mapping, without those that are wrong."""
        if node.id != "mapping":
            raise ValueError(f"must be a mapping of keys to values, not {_shown(node)}")
        values = {}
        for key, value in node.value:
            self.keys.append(str(key.value) if key.id == "scalar" else "?")
            try:
                if key.id != "scalar":
                    raise ValueError(f"a key must be a word, not {_shown(key)}")
                values[key.value] = read(key, value)
            except ValueError as error:
                self._problem(key, str(error))
            self.keys.pop()
        return values

    def _fields(self, node: Node, readers: Mapping[str, _Reader]) -> dict[str, Any]:
        def read(key: Node, value: Node) -> Any:
            if key.value in readers:
                return readers[key.value](value)
            if "resources" in readers and key.value in _RESOURCE_NAMES:
                raise ValueError(f"unknown key {key.value!r}; it belongs under 'resources'")
            near = near_match(key.value, readers)
            raise ValueError(f"unknown key {key.value!r}{near} (known: {', '.join(readers)})")

        return self._each(node, read)

    def _default(self, node: Node) -> None:
        self.default, self.default_line = _word(node), node.start_mark.line + 1

    def _pool(self, name: Node, node: Node) -> None:
        if not _POOL_NAME.fullmatch(name.value):
            raise ValueError("a pool's name is up to 64 letters, digits, '.', '_' and '-', a letter or digit first")
        readers: dict[str, _Reader] = {
            "kind": _kind,
            "resources": self._resources,
            "limits": self._limits,
            "storage": _storage,
            "python": _path,
            "prologue": _lines,
            "environment": self._variables,
            "env": self._variables,
            "container": self._container,
            "prices": lambda node: Prices(**self._fields(node, {"cpu_hour": _price, "gpu_hour": _price})),
            "speed": _speed,
        }
        given = _given(node)
        options = {"cpus": _count, "memory": _memory, "gpus": _count} if given.get("kind") == "local" else {}
        values = self._fields(node, {**readers, **options})
        if "kind" not in given:
            raise ValueError(f"needs a kind: {', '.join(_kinds())}")
        if "kind" in values:
            values["options"] = {option: values.pop(option) for option in options if option in values}
            self.pools.append(PoolConfig(name.value, **values, source=f"{self.path}:{name.start_mark.line + 1}"))

    def _resources(self, node: Node) -> Resources:
        def read(key: Node, value: Node) -> Any:
            Resources.parse(**{key.value: None})  # whether there is such a resource
            given = self._each(value, _extra) if key.value == "extra" else _word(value)
            Resources.parse(**{key.value: given})
            return given

        return Resources.parse(**self._each(node, read))

    def _limits(self, node: Node) -> Limits:
        readers = {"max_jobs": _count, "max_array": _count, "poll_min": _duration, "poll_max": _duration}
        limits = Limits(**self._fields(node, readers))
        if limits.poll_min > limits.poll_max:
            raise ValueError(f"poll_min ({limits.poll_min}) is longer than poll_max ({limits.poll_max})")
        return limits

    def _variables(self, node: Node) -> dict[str, str]:
        return self._each(node, _variable)

    def _container(self, node: Node) -> Container:
        if node.id == "scalar":
            return Container(_path(node))
        values = self._fields(
            node, {"kind": lambda node: _one_of(node, _CONTAINER_KINDS), "image": _path, "bind": _binds}
        )
        if "image" not in _given(node):
            raise ValueError("needs an image")
        return Container(**{"image": "", **values})  # the empty one: its own problem is noted already


def _given(node: Node) -> dict[Any, Any]:
    return {key.value: value.value for key, value in node.value if key.id == "scalar"} if node.id == "mapping" else {}


def _shown(node: Node) -> str:
    if node.id != "scalar":
        return "a list" if node.id == "sequence" else "a mapping"
    return "nothing" if node.tag == _YAML + "null" else repr(node.value)


def _scalar(node: Node) -> str:
    if node.id != "scalar":
        raise ValueError(f"must be a single value, not {_shown(node)}")
    if node.tag == _YAML + "null":
        raise ValueError("has no value")
    text = str(node.value)
    if "\0" in text:
        raise ValueError("has a NUL character")
    return text


def _word(node: Node) -> str:
    text = _scalar(node)
    if not text.strip() or "\n" in text or "\r" in text:
        raise ValueError(f"{text!r} is empty or has a line break")
    return text


def _text(node: Node) -> str:
    text = _scalar(node)
    if node.tag != _YAML + "str":
        raise ValueError(f"must be text, not {text}; put it in quotes if it is meant")
    return text


def _extra(key: Node, node: Node) -> str | None:
    return None if node.tag == _YAML + "null" else _word(node)


def _variable(key: Node, node: Node) -> str:
    if not _VARIABLE_NAME.fullmatch(key.value):
        raise ValueError("is no name of an environment variable")
    return _scalar(node)


def _path(node: Node) -> str:
    _text(node)
    text = _word(node)
    for match in _VARIABLE_USE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"environment variable {name!r} in {text!r} is not set")
    return os.path.expanduser(os.path.expandvars(text))


def _storage(node: Node) -> str:
    path = _path(node)
    if not os.path.isabs(path) and "://" not in path:
        raise ValueError(f"{path!r} must be an absolute folder or a URL")
    return path


def _items(node: Node) -> list[Node]:
    return list(node.value) if node.id == "sequence" else [node]


def _lines(node: Node) -> tuple[str, ...]:
    return tuple(line for item in _items(node) for line in _text(item).splitlines())


def _binds(node: Node) -> tuple[str, ...]:
    return tuple(_path(item) for item in _items(node))


def _price(node: Node) -> float:
    text = _scalar(node)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{text!r} is not a number of at least 0")
    return number


def _speed(node: Node) -> float:
    speed = _price(node)
    if speed == 0:
        raise ValueError(f"{node.value!r} must be more than zero")
    return speed


def _count(node: Node) -> int:
    text = _scalar(node)
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise ValueError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _memory(node: Node) -> int:
    return parse_memory(_scalar(node))


def _duration(node: Node) -> timedelta:
    return parse_time(_scalar(node))


def _one_of(node: Node, known: Collection[str]) -> str:
    text = _scalar(node)
    if text not in known:
        raise ValueError(f"unknown kind {text!r}{near_match(text, known)} (known: {', '.join(known)})")
    return text


def _kind(node: Node) -> str:
    return node.value if node.value in _OWN_KINDS else _one_of(node, _kinds())


@functools.cache  # reads the metadata of every installed package
def _kinds() -> list[str]:
    from importlib.metadata import entry_points

    return sorted({point.name for point in entry_points(group="jupyter_hybrid.backends")})
