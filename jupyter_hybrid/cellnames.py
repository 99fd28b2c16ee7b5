"""Which names a cell reads and writes, found from its syntax tree.

A cell is read, not run: :func:`analyse` follows the tree in the order of execution and keeps two sets, the names surely
assigned and the names possibly assigned at each point.
"""

from __future__ import annotations

import ast
import builtins
import dis
import re
import symtable
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_EAGER_SCOPES = ("listcomp", "setcomp", "dictcomp", "genexpr")
_EAGER_TYPES = ("class", "type parameter")
BUILTINS = frozenset(dir(builtins)) | {"get_ipython", "display", "exit", "quit"}
_MODULE_ATTRIBUTES = frozenset(vars(types.ModuleType("_"))) | {"__file__", "__builtins__", "__annotations__"}
_CATCH_ALL = {"NameError", "Exception", "BaseException"}
_BINDING_MAGICS = {"run", "pylab", "store", "load_ext", "reload_ext"}
_BINDERS = frozenset({"exec", "eval", "globals", "locals", "vars", "setattr", "get_ipython", "__import__"})
"""Names by whose use a cell can assign what its syntax does not tell."""
_EXPANSION = re.compile(r"\$\$?(\w+)|\{+\s*(\w+)")
_MAGIC_OPTIONS = re.compile(r"(?:\s*-[a-zA-Z](?:\s*\d+|\s+)?)*\s*")
_PYTHON_MAGICS = {"time": True, "capture": True, "timeit": False, "prun": False, "memit": False}
"""Magics whose body is Python, and whether what it assigns stays."""


@dataclass(frozen=True)
class CellNames:
    """What a cell does with names at its top level.

    Parameters
    ----------
    reads : frozenset of str
        Names that it may read before it has assigned them, also inside functions; builtins are not among them.
    required : frozenset of str
        Those of `reads` that nothing in the cell can have assigned before: without them it must fail.
    writes : tuple of str
        Names it may leave assigned, in order: by assignment, ``def``, ``class``, ``for``, ``with``, walrus.
    imports : tuple of str
        Names that only ``import`` binds.
    builtins : frozenset of str
        Builtins that it reads, which a notebook may have overridden.
    dynamic : bool
        Whether it may assign further names that its syntax does not tell: by ``exec``, ``globals()``,
        ``import *``, a magic.
    """

    reads: frozenset[str]
    required: frozenset[str]
    writes: tuple[str, ...]
    imports: tuple[str, ...] = ()
    builtins: frozenset[str] = frozenset()
    dynamic: bool = False


def parse(source: str) -> Any:
    """Return the syntax tree of a cell (an ``ast.Module``) after IPython's own transformations.

    Raises
    ------
    SyntaxError
        As Python shows it, with the cell's own line.
    """
    # Only the lines of magics need IPython; a cell that is Python as it stands skips its transformer.
    try:
        return ast.parse(source)
    except SyntaxError:
        pass
    from IPython.core.inputtransformer2 import TransformerManager

    code = TransformerManager().transform_cell(source)
    try:
        return compile(code, "<cell>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except SyntaxError as error:
        lines = source.splitlines()
        if error.lineno and error.lineno <= len(lines) and len(lines) == len(code.splitlines()):
            error.text = lines[error.lineno - 1] + "\n"
        raise error.with_traceback(None) from None


def analyse(source: str) -> CellNames:
    """Return the names that a cell reads and writes.

    Raises
    ------
    SyntaxError
        The cell is neither Python nor IPython.
    """
    flow = _Flow()
    tree = parse(source)
    compile(tree, "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)  # `return` and the like
    flow.block(tree.body)
    flow.settle()
    left = [name for name in flow.order if name in flow.possible]
    return CellNames(
        reads=frozenset(flow.reads - BUILTINS),
        required=frozenset(flow.required - BUILTINS),
        writes=tuple(name for name in left if name not in flow.imported),
        imports=tuple(name for name in left if name in flow.imported),
        builtins=frozenset(flow.reads & BUILTINS),
        dynamic=flow.star or flow.magic or not flow.reads.isdisjoint(_BINDERS) or "__main__" in source,
    )


_LIKE = {
    "AsyncFor": "For",
    "TryStar": "Try",
    "AsyncFunctionDef": "FunctionDef",
    "ClassDef": "FunctionDef",
    **dict.fromkeys(("ListComp", "SetComp", "DictComp", "GeneratorExp"), "Lambda"),
}
"""Nodes that are treated like another kind."""


class _Flow(ast.NodeVisitor):
    """Definite assignment over the top level of a cell; what functions read counts when they are first used."""

    def __init__(self) -> None:
        self.definite: set[str] = set()
        self.possible: set[str] = set()
        self.pending: dict[str, set[str]] = {}  # what a function of the cell reads once it is used
        self.order: dict[str, None] = {}
        self.imported: set[str] = set()
        self.bound: set[str] = set()
        self.unbound: set[str] = set()
        self.late: set[str] = set()  # read from functions: at a time that is not known
        self.reads: set[str] = set()
        self.required: set[str] = set()
        self.star = False  # `import *` and the like: anything may have been assigned
        self.magic = False  # a magic of which nothing is known
        self.caught = 0  # depth of `try` that catches a NameError

    def visit(self, node: ast.AST) -> None:
        kind = type(node).__name__
        getattr(self, f"visit_{_LIKE.get(kind, kind)}", self.generic_visit)(node)

    # --- events ---

    def read(self, name: str, late: bool = False) -> None:
        if name not in self.definite and name not in _MODULE_ATTRIBUTES:
            self.reads.add(name)
            if self.star or self.caught:
                pass
            elif late:
                self.late.add(name)
            elif name not in self.possible:
                self.required.add(name)
        for inner in self.pending.pop(name, ()):
            self.read(inner, late=True)

    def bind(self, name: str, imported: bool = False) -> None:
        self.pending.pop(name, None)
        self.definite.add(name)
        self.possible.add(name)
        self.bound.add(name)
        self.order.setdefault(name)
        (self.imported.add if imported else self.imported.discard)(name)

    def unbind(self, name: str) -> None:
        self.definite.discard(name)
        self.possible.discard(name)
        self.unbound.add(name)

    def settle(self) -> None:
        """Count what unused functions read (they may be given back), and what nothing in the cell assigns."""
        for name in list(self.pending):
            self.read(name)
        self.required |= self.late - self.bound if not self.star else set()

    # --- control flow ---

    def block(self, statements: Iterable[ast.AST]) -> None:
        for statement in statements:
            self.visit(statement)

    def branches(self, *blocks: Callable[[], None]) -> None:
        """Run alternatives from the same start: surely assigned is what all assign, possibly what any does."""
        definite, possible, pending = self.definite, self.possible, self.pending
        ends = []
        for run in blocks:
            self.definite, self.possible = set(definite), set(possible)
            self.pending = {name: set(inner) for name, inner in pending.items()}
            run()
            ends.append((self.definite, self.possible, self.pending))
        self.definite = set.intersection(*(end[0] for end in ends))
        self.possible = set.union(*(end[1] for end in ends))
        self.pending = {}
        for _, _, inner in ends:
            for name, names in inner.items():
                self.pending.setdefault(name, set()).update(names)

    def maybe(self, *statements: Iterable[ast.AST]) -> None:
        """Statements that may run not at all."""
        self.branches(lambda: None, *(lambda body=body: self.block(body) for body in statements))

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.branches(lambda: self.block(node.body), lambda: self.block(node.orelse))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self.branches(lambda: self.visit(node.body), lambda: self.visit(node.orelse))

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self.maybe(node.values[1:])

    def loop(self, body: list[ast.AST]) -> None:
        once = _Flow()
        once.block(body)
        self.possible |= once.bound  # an earlier round may have assigned them
        self.bound |= once.bound
        self.definite -= once.unbound  # or deleted
        self.unbound |= once.unbound
        self.maybe(body)

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self.loop([*node.body, node.test])
        self.block(node.orelse)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self.loop([node.target, *node.body])
        self.block(node.orelse)

    def visit_Try(self, node: ast.Try) -> None:
        before = set(self.definite)
        catches = any(_catches_name_error(handler.type) for handler in node.handlers)
        self.caught += catches
        self.block(node.body)
        self.caught -= catches
        self.block(node.orelse)
        done, self.definite = self.definite, before  # a handler runs after any part of the body

        def finished() -> None:
            self.definite |= done

        self.branches(finished, *(lambda handler=handler: self.visit(handler) for handler in node.handlers))
        self.block(node.finalbody)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.type:
            self.visit(node.type)
        if node.name:
            self.bind(node.name)
        self.block(node.body)
        if node.name:
            self.unbind(node.name)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        self.maybe(*([case.pattern, *([case.guard] if case.guard else []), *case.body] for case in node.cases))

    def visit_MatchAs(self, node: ast.MatchAs) -> None:
        if node.pattern:
            self.visit(node.pattern)
        if node.name:
            self.bind(node.name)

    def visit_MatchStar(self, node: ast.MatchStar) -> None:
        if node.name:
            self.bind(node.name)

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        self.generic_visit(node)
        if node.rest:
            self.bind(node.rest)

    # --- names ---

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.read(node.id)
        elif isinstance(node.ctx, ast.Store):
            self.bind(node.id)
        else:
            self.read(node.id)
            self.unbind(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.value, ast.Lambda) and isinstance(node.targets[0], ast.Name) and len(node.targets) == 1:
            self.define(node.targets[0].id, node.value)
            return
        self.visit(node.value)
        self.block(node.targets)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.read(node.target.id)
        self.visit(node.value)
        self.visit(node.target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit(node.annotation)
        if node.value:
            self.visit(node.value)
        if node.value or not isinstance(node.target, ast.Name):
            self.visit(node.target)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.visit(node.target)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.bind(alias.asname or alias.name.partition(".")[0], imported=True)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                self.star = True  # it may bind anything
            else:
                self.bind(alias.asname or alias.name, imported=True)

    def visit_TypeAlias(self, node: Any) -> None:
        self.define(node.name.id, node)

    # --- scopes ---

    def define(self, name: str, node: ast.AST, *, now: bool = False) -> None:
        """Bind what `node` defines; its free names are read now or when `name` is first used."""
        immediate, deferred, assigned = _free_names(node)
        for inner in immediate:
            self.read(inner)
        deferred.discard(name)
        if now:  # a decorator may call it at once, though hardly recursively
            for inner in deferred:
                self.read(inner, late=True)
        self.bind(name)
        if not now:
            self.pending[name] = deferred
        self.assigned_inside(assigned)

    def assigned_inside(self, names: Iterable[str]) -> None:
        for name in names:  # by `global` in a function, or a walrus in a comprehension: perhaps
            self.possible.add(name)
            self.bound.add(name)
            self.order.setdefault(name)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.define(node.name, node, now=bool(node.decorator_list))

    def visit_Lambda(self, node: ast.AST) -> None:
        immediate, deferred, assigned = _free_names(node)
        for name in immediate:
            self.read(name)
        for name in deferred:
            self.read(name, late=True)
        self.assigned_inside(assigned)

    # --- magics ---

    def visit_Call(self, node: ast.Call) -> None:
        magic = _magic_call(node)
        if magic is None:
            self.generic_visit(node)
            return
        name, texts = magic
        self.star = self.star or name in _BINDING_MAGICS
        keeps = _PYTHON_MAGICS.get(name)
        self.magic = self.magic or (bool(name) and keeps is None)
        if keeps is not None and texts:
            code = texts[-1] if len(texts) == 2 else texts[0][_MAGIC_OPTIONS.match(texts[0]).end() :]  # type: ignore[union-attr]
            try:
                body = parse(code).body
            except SyntaxError:
                body = []
            if keeps:
                self.block(body)
            else:
                self.maybe(body)
            if name == "capture" and (word := texts[0].split(" ")[0]).isidentifier():
                self.bind(word)
        for text in texts:
            for match in _EXPANSION.finditer(text):
                word = match[1] or match[2]
                if word not in self.definite and not word.isdigit():
                    self.reads.add(word)


def _catches_name_error(kind: ast.expr | None) -> bool:
    return kind is None or any(isinstance(node, ast.Name) and node.id in _CATCH_ALL for node in ast.walk(kind))


def _magic_call(node: ast.Call) -> tuple[str, list[str]] | None:
    """Return name and texts of what IPython made of a magic or ``!command``: ``get_ipython().run_line_magic(…)``."""
    function = node.func
    if not (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Call)
        and isinstance(function.value.func, ast.Name)
        and function.value.func.id == "get_ipython"
    ):
        return None
    texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if function.attr in ("run_line_magic", "run_cell_magic") and texts:
        return texts[0], texts[1:]
    return ("", texts) if function.attr in ("system", "getoutput", "getoutputs") else None


def _updates(node: ast.AST) -> bool:
    """Whether a node needs the old value of its target, which the symbol table takes for a plain assignment."""
    return isinstance(node, ast.AugAssign) or isinstance(getattr(node, "ctx", None), ast.Del)


def _free_names(node: ast.AST) -> tuple[set[str], set[str], set[str]]:
    """Return the global names that a definition or comprehension reads at once, reads later, and assigns.

    Python's own symbol table decides what is global: it knows class scopes, ``global``, ``nonlocal``, type parameters
    and name mangling. Inside a coroutine everything is legal that is legal at the top level of a cell.
    """
    statement = node if isinstance(node, ast.stmt) else ast.Expr(value=node)  # type: ignore[arg-type]
    wrapper = ast.parse("async def _(): pass")
    wrapper.body[0].body = [statement]  # type: ignore[attr-defined]
    now: set[str] = set()
    later: set[str] = set()
    assigned = {inner.target.id for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)}
    if not isinstance(node, _COMPREHENSIONS):
        assigned = set()

    updated = {
        t.id for t in (getattr(n, "target", n) for n in ast.walk(node) if _updates(n)) if isinstance(t, ast.Name)
    }

    def walk(table: symtable.SymbolTable, deferred: bool) -> None:
        body_of_class = str(table.get_type()) == "class"
        for symbol in table.get_symbols():
            if symbol.is_global():
                if symbol.is_referenced() or symbol.get_name() in updated:
                    (later if deferred else now).add(symbol.get_name())
                if symbol.is_assigned():
                    assigned.add(symbol.get_name())
            elif body_of_class and symbol.is_local() and symbol.is_referenced():
                later.add(symbol.get_name())  # `x = x` in a class reads the global first; or it reads its own
        for child in table.get_children():
            eager = child.get_name() in _EAGER_SCOPES or str(child.get_type()).startswith(_EAGER_TYPES)
            walk(child, deferred or not eager)

    walk(symtable.symtable(ast.unparse(wrapper), "<cell>", "exec").get_children()[0], deferred=False)
    return now, later, assigned


def global_names(code: types.CodeType) -> frozenset[str]:
    """Return the global names that a code object and those inside it load."""
    known = _GLOBAL_NAMES.get(code)
    if known is None:
        loads = {op.argval for op in dis.get_instructions(code) if op.opname in _LOADS}
        known = frozenset(loads).union(*(global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))
        if len(_GLOBAL_NAMES) > 4096:
            _GLOBAL_NAMES.clear()
        _GLOBAL_NAMES[code] = known
    return known


def may_assign(code: types.CodeType, name: str) -> bool:
    """Return whether a function may assign a global name, by a ``global`` of its own or by means that do not tell."""
    own = any(op.opname == "STORE_GLOBAL" and op.argval == name for op in dis.get_instructions(code))
    if own or not global_names(code).isdisjoint(_BINDERS):
        return True
    return any(may_assign(inner, name) for inner in code.co_consts if isinstance(inner, types.CodeType))


_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_GLOBAL_NAMES: dict[types.CodeType, frozenset[str]] = {}
