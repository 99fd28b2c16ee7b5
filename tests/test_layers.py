"""The structure of the package, read from its import statements: those inside functions count too."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import jupyter_hybrid

PACKAGE = Path(jupyter_hybrid.__file__).parent

LAYERS = {
    "pure": "errors spec script backends.slots",
    "one kind of I/O each": "config process storage frames store worker cellrun",
    "backends": "backends backends.base backends.element backends.local backends.proctree backends.shim backends.slurm "
    "backends.slurm_output backends.spool backends.supervisor",
    "engine": "pool progress run submitter tracker launch results handles executor listing aggregate "
    "dataframe capture cellnames fingerprint cluster clean index practice practice_conf practice_processes",
    "faces": "cli verbs upkeep terminal doctor magics cellmagic linemagic completer __main__",
}
"""From the bottom to the top; a module may import from its own layer and from those below."""

RANK = {module: rank for rank, names in enumerate(LAYERS.values()) for module in names.split()}

PURE = {
    "__future__", "collections", "dataclasses", "datetime", "difflib", "enum", "functools", "itertools", "json",
    "math", "os", "pathlib", "re", "shlex", "typing",
}  # fmt: skip
PURE_CALLS = {"os": {"urandom"}, "pathlib": {"Path", "PurePath", "PurePosixPath"}}

HOOKS = {("handles", "widgets")}
"""How IPython shows a job: the hook is by its protocol a method of the object itself."""

NODE = ("worker", "cellrun", "frames")
"""Modules that are copied to the nodes, where the package need not be."""
JUPYTER = {"IPython", "ipywidgets", "jupyter_server", "tornado", "traitlets", "ipykernel", "comm"}
HEAVY = {"dask", "distributed", "dask_jobqueue", "numpy", "pandas", "pyarrow", "yaml", "matplotlib"} | JUPYTER
STARTERS = ("system", "popen", "fork", "forkpty", "exec", "spawn", "posix_spawn")


class Import(NamedTuple):
    """One imported module: its full name, the line, whether it is inside a function, and whether only for types."""

    module: str
    line: int
    lazy: bool
    typing: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {name_of(path) for path in PACKAGE.rglob("__init__.py")}
MODULES = sorted(set(TREES) - {""})


def imports(module: str) -> Iterator[Import]:
    """Find all imports of a module; relative ones as ``jupyter_hybrid.…``, and each imported submodule by itself."""

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["jupyter_hybrid", *module.split(".")]
                depth = node.level - (module in PACKAGES)
                base = ".".join([*here[: len(here) - depth], *([base] if base else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            submodules = [name for name in inside if name.removeprefix("jupyter_hybrid.") in TREES]
            if len(submodules) < len(inside):
                yield Import(base, node.lineno, lazy, typing)
            for name in submodules:
                yield Import(name, node.lineno, lazy, typing)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, lazy, True)
            for child in node.orelse:
                yield from walk(child, lazy, typing)
        else:
            inner = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inner, typing)

    yield from walk(TREES[module], False, False)


def own(module: str, typing: bool = False) -> Iterator[tuple[str, Import]]:
    """Find the imports of modules of this package."""
    for found in imports(module):
        inside = found.module.removeprefix("jupyter_hybrid.")
        if found.module.startswith("jupyter_hybrid.") and (typing or not found.typing):
            yield inside, found


def top(found: Import) -> str:
    return found.module.split(".")[0]


def test_the_reader_finds_imports_of_all_kinds() -> None:
    assert ("process", False) in {(name, found.lazy) for name, found in own("backends.shim")}
    assert ("errors", False) in {(name, found.lazy) for name, found in own("config")}
    assert "backends.base" in {name for name, _ in own("backends", typing=True)}
    assert {found.module for found in imports("config") if found.lazy} >= {"yaml", "jupyter_core.paths"}


def test_every_module_has_a_layer() -> None:
    unplaced = [
        module for module in MODULES if module not in RANK and module.split(".")[0] not in ("widgets", "server")
    ]
    assert not unplaced, f"say in LAYERS to which layer these belong: {', '.join(unplaced)}"


def rank(module: str) -> int:
    return RANK.get(module, len(LAYERS) - 1)  # what is inside widgets and server is a face


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    wrong = [
        f"line {found.line}: {module} imports {name}, which is above it"
        for name, found in own(module, typing=False)
        if rank(name) > rank(module) and (module, name) not in HOOKS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycles_when_modules_are_loaded() -> None:
    graph = {module: {name for name, found in own(module) if not found.lazy} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", LAYERS["pure"].split())
def test_pure_modules_do_no_io(module: str) -> None:
    foreign = {top(found) for found in imports(module) if not found.typing} - PURE - {"jupyter_hybrid"}
    assert not foreign, f"{module} is pure and imports {', '.join(sorted(foreign))}"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("open", "print", "input"), f"line {node.lineno}: {module} is pure and calls {called}"
            parts = called.split(".")
            if len(parts) > 1 and parts[0] in PURE_CALLS:
                assert parts[1] in PURE_CALLS[parts[0]], f"line {node.lineno}: {module} is pure and calls {called}"


def test_only_faces_and_cells_know_jupyter() -> None:
    # Capture reads a cell as IPython does, cellrun is a shell of its own.
    allowed = {"capture", "cellnames", "cellrun", "fingerprint"}
    wrong = [
        f"{module}, line {found.line}: {found.module}"
        for module in MODULES
        if rank(module) < len(LAYERS) - 1 and module not in allowed
        for found in imports(module)
        if top(found) in JUPYTER and not found.typing
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_when_they_are_needed() -> None:
    wrong = [
        f"{module}, line {found.line}: {found.module}"
        for module in ["", *MODULES]
        if module.split(".")[0] not in ("widgets", "server", "magics", "cellmagic", "linemagic", "completer")
        for found in imports(module)
        if top(found) in HEAVY and not found.lazy and not found.typing and not guarded(module, found.line)
    ]
    assert not wrong, "\n".join(wrong)


def guarded(module: str, line: int) -> bool:
    """Return whether a line is inside a condition or ``try`` at the top of a module of the node side."""
    return module in NODE and any(
        isinstance(node, (ast.If, ast.Try)) and node.lineno <= line <= (node.end_lineno or 0)
        for node in TREES[module].body
    )


@pytest.mark.parametrize("module", NODE)
def test_programs_of_the_node_need_no_package(module: str) -> None:
    assert not list(own(module))


def test_processes_start_in_one_place() -> None:
    # The worker and the cell run on the node, where process.py is not.
    wrong = []
    for module in MODULES:
        if module in ("process", "worker", "cellrun"):
            continue
        starters = {"subprocess", "multiprocessing", "pty"}
        names = {
            alias.asname or alias.name
            for node in ast.walk(TREES[module])
            if isinstance(node, ast.ImportFrom) and node.module in starters
            for alias in node.names
        }
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                first, _, rest = called.partition(".")
                if (
                    first in starters
                    or called in names
                    or (first == "os" and rest.startswith(STARTERS))
                    or called.startswith("asyncio.create_subprocess")
                ):
                    wrong.append(f"{module}, line {node.lineno}: {called}")
    assert not wrong, "\n".join(wrong)
