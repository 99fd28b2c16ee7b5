from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_hybrid import capture, cellnames, cellrun, frames
from jupyter_hybrid.errors import CaptureError


def names(source: str) -> capture.CellNames:
    return cellnames.analyse(textwrap.dedent(source))


@pytest.mark.parametrize(
    ("source", "reads", "writes"),
    [
        ("y = x", "x", "y"),
        ("x = 1\nprint(x)", "", "x"),
        ("x += 1", "x", "x"),
        ("x[0] = y; z.a = 1", "x y z", ""),
        ("if c:\n  x = 1\nprint(x)", "c x", "x"),
        ("if c:\n  x = 1\nelse:\n  x = 2\nprint(x)", "c", "x"),
        ("def f(a, b=d):\n  return a + b + g", "d g", "f"),
        ("def f(n):\n  return f(n - 1)\nf(3)", "", "f"),
        ("def f():\n  return x\nx = 2\nf()", "", "f x"),
        ("def f():\n  return x\nf()\nx = 2", "x", "f x"),
        ("def f():\n  return g()\ndef g():\n  return f() + k", "k", "f g"),
        ("h = lambda a, b=c: a + d", "c d", "h"),
        ("h = lambda n: h(n)", "", "h"),
        ("[i + k for i in xs if i in w]", "k xs w", ""),
        ("{i: j for i, j in zip(a, b)}", "a b", ""),
        ("sum(i for i in xs for k in i if lim)", "xs lim", ""),
        ("[y := i for i in xs]\nprint(y)", "xs y", "y"),
        ("def f(a=[q for q in r]): pass", "r", "f"),
        ("f'{x!r:{w}} {y}'", "x w y", ""),
        ("del x", "x", ""),
        ("x = 1\ndel x", "", ""),
        ("def f():\n  global n\n  n += 1\nf()", "n", "f n"),
        ("import os.path, numpy as np\nfrom a import b as c\nos; np; c", "", ""),
        ("@deco(arg)\ndef f(): return z", "deco arg z", "f"),
        ("@deco\ndef f(n): return f(n)", "deco", "f"),
        ("def f(a: T) -> R: pass\nx: U = 1\ny: V", "T R U V", "f x"),
        ("if (n := g(m)) > 1: pass", "g m", "n"),
        (
            "match p:\n  case {'a': q, **rest}: print(q, rest)\n  case [a, *b] | (a, b): a\n  case K(v=w): w",
            "p K",
            "q rest a b w",
        ),
        ("async def f():\n  async with a as b:\n    async for c in d: await e(c, b)\nawait f()", "a d e", "f"),
        ("async for c in d:\n  await e(c)\n[await g(i) async for i in h]", "d e g h", "c"),
        ("class A(B, metaclass=M):\n  q = w\n  def m(self): return g + q", "B M w g q", "A"),
        ("class A:\n  x = x", "x", "A"),
        ("class A:\n  def copy(self): return A()", "", "A"),
        ("try:\n  x = f()\nexcept E as e:\n  print(e, x)\nelse:\n  y = x", "f E x", "x y"),
        ("with open(p) as h, k() as (a, b): h", "p k", "h a b"),
        ("for i, (a, *b) in xs:\n  s += i\nprint(a)", "xs s a", "i a b s"),
        ("for i in xs:\n  if i:\n    print(last)\n  last = i", "xs last", "i last"),
        ("while go:\n  x = 1\n  break", "go", "x"),
        ("a = b = c; d, *e = a", "c", "a b d e"),
        ("print(len(x), __name__)", "x", ""),
        ("a and (b := c)\nb", "a c b", "b"),
        ("def f():\n  def g():\n    nonlocal v\n    v = w\n  v = 1\n  return g", "w", "f"),
        ("_tmp = 1\nx = _tmp", "", "_tmp x"),
        ("!echo $who {where}\nx = !ls {d}", "who where d", "x"),
        ("%timeit -n 10 f(x)", "f x", ""),
        ("%time y = f(x)\nprint(y)", "f x", "y"),
        ("%%time\ny = f(x)", "f x", "y"),
        ("%%capture out\ny = f(x)", "f x", "y out"),
        ("try:\n  import numpy as np\nexcept ImportError:\n  np = None", "", "np"),
    ],
)
def test_reads_and_writes(source: str, reads: str, writes: str) -> None:
    found = names(source)
    assert found.reads == set(reads.split())
    assert set(found.writes) == set(writes.split())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters")
def test_type_parameters() -> None:
    found = names("def g[T: B](x: T) -> T: return x + w\ntype X[K] = list[Q]\nclass C[T]: y = z\nX")
    assert found.reads == {"B", "w", "Q", "z"}
    assert found.writes == ("g", "X", "C")


@pytest.mark.parametrize(
    ("source", "required"),
    [
        ("print(x); x = 1", "x"),
        ("for i in a:\n  if i: print(last)\n  last = i", "a"),
        ("try:\n  unicode\nexcept NameError:\n  unicode = str", ""),
        ("def f(): return later\nlater = 1", ""),
        ("def f(): return never", "never"),
        ("from math import *\nprint(sin(x))", ""),
        ("%run setup.py\nprint(made)", ""),
        ("if c:\n  x = 1\nprint(x)", "c"),
    ],
)
def test_required(source: str, required: str) -> None:
    assert names(source).required == set(required.split())


def test_syntax_error_shows_the_cells_own_line() -> None:
    for source in ("x = 1\ny = = 2\n", "%matplotlib inline\ny = = 2\n"):
        with pytest.raises(SyntaxError) as caught:
            names(source)
        assert (caught.value.lineno, (caught.value.text or "").strip()) == (2, "y = = 2")
    with pytest.raises(SyntaxError, match="return"):
        names("return 1")


_NAMES = st.sampled_from("abcd")


def _statements() -> st.SearchStrategy[list[str]]:
    """Small programs over four names, as lists of lines."""
    simple = st.one_of(
        st.builds("{} = 1".format, _NAMES),
        st.builds("use({})".format, _NAMES),
        st.builds("{} += 1".format, _NAMES),
        st.builds("del {}".format, _NAMES),
        st.builds("{} = [{} for {} in use({})]".format, _NAMES, _NAMES, _NAMES, _NAMES),
        st.builds("{} = use((lambda {}: {}))".format, _NAMES, _NAMES, _NAMES),
    ).map(lambda line: [line])

    def nest(inner: st.SearchStrategy[list[str]]) -> st.SearchStrategy[list[str]]:
        def indent(head: str, body: list[str]) -> list[str]:
            return [head, *("  " + line for line in body)]

        bodies = st.lists(inner, min_size=1, max_size=3).map(lambda parts: [line for part in parts for line in part])
        return st.one_of(
            st.builds(lambda a, b: indent("if flip():", a) + indent("else:", b), bodies, bodies),
            st.builds(lambda n, a: indent(f"for {n} in some():", a), _NAMES, bodies),
            st.builds(
                lambda n, a: indent(f"def {n}():", ["global a, b", *(x.replace("del ", "") for x in a)]), _NAMES, bodies
            ),
            st.builds(lambda n: [f"if callable(globals().get('{n}')): {n}()"], _NAMES),
            st.builds(lambda a, b: indent("try:", [*a, "boom()"]) + indent("except ValueError:", b), bodies, bodies),
        )

    return st.lists(st.recursive(simple, nest, max_leaves=6), min_size=1, max_size=5).map(
        lambda parts: [line for part in parts for line in part]
    )


@settings(max_examples=200, deadline=None)
@given(_statements(), st.lists(st.booleans(), min_size=12, max_size=12))
def test_what_a_run_misses_was_found(lines: list[str], coins: list[bool]) -> None:
    """Whatever a real run of the cell lacks, the analysis has named; what is required, no run can do without."""
    source = "\n".join(lines)
    try:
        compile(source, "<cell>", "exec")
    except SyntaxError:
        return
    found = names(source)
    toss = iter(coins * 50)

    def boom() -> None:
        if next(toss, False):
            raise ValueError

    def use(value: object) -> list[int]:
        if callable(value):
            value(1) if getattr(value, "__name__", "") == "<lambda>" else None
        return [1]

    namespace = {
        "use": use,
        "flip": lambda: next(toss, False),
        "some": lambda: [1] * (next(toss, False) + next(toss, False)),
        "boom": boom,
        "callable": builtins.callable,
    }
    missed: set[str] = set()
    left: set[str] = set()
    try:
        exec(compile(source, "<cell>", "exec"), namespace)
    except (TypeError, RecursionError, UnboundLocalError):
        pass
    except NameError as error:
        missed = {error.name} if "free variable" not in str(error) else set()
    else:
        left = {name for name in "abcd" if name in namespace}
    assert missed <= found.reads, source
    assert left <= set(found.writes), source


KERNEL = """
import sys, json
sys.path.insert(0, sys.argv[1])
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
config = Config()
config.HistoryManager.hist_file = ":memory:"
shell = InteractiveShell.instance(config=config, ipython_dir=sys.argv[1])
for cell in open(sys.argv[1] + "/cells.txt").read().split("\\n---\\n"):
    shell.run_cell(cell).raise_error()
from jupyter_hybrid import capture, cellrun, frames
job = capture.collect(open(sys.argv[1] + "/job.txt").read(), shell.user_ns)
with open(sys.argv[1] + "/payload.bin", "wb") as file:
    for frame in job.frames:
        data = bytes(frame)
        file.write(len(data).to_bytes(8, "little") + data)
print(json.dumps([sorted(job.inputs), list(job.out)]))
"""
NODE = """
import sys, pickle
sys.path[:0] = [sys.argv[1]]
import hybrid_cellrun
hybrid_cellrun.start()
data, frames = open(sys.argv[1] + "/payload.bin", "rb").read(), []
while data:
    size = int.from_bytes(data[:8], "little")
    frames.append(data[8:8 + size])
    data = data[8 + size:]
for _ in range(2):
    print(hybrid_cellrun.run_cell(pickle.loads(frames[0], buffers=frames[1:]), {}, lambda output: None))
"""


def travel(folder: Path, cells: list[str], job: str) -> tuple[list[str], list[str], str]:
    """Run cells in one IPython, capture the last one there, and run it twice in another Python."""
    (folder / "cells.txt").write_text("\n---\n".join(textwrap.dedent(cell) for cell in cells))
    (folder / "job.txt").write_text(textwrap.dedent(job))
    shutil.copy(cellrun.__file__, folder / "hybrid_cellrun.py")

    def python(program: str) -> str:
        command = [sys.executable, "-c", program, str(folder)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    inputs, out = json.loads(python(KERNEL).splitlines()[-1])
    first, second = [line for line in python(NODE).splitlines() if line.startswith("{")]
    assert first == second
    return inputs, out, first


def test_functions_of_the_notebook_travel_with_what_they_read(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def triple(x):\n    return 3 * x\n")
    cells = [
        """
        import dataclasses, functools, asyncio
        import numpy as np
        from beside import triple
        scale, unused, big = 2, open("/dev/null"), np.ones(100_000)
        def even(n): return True if n == 0 else odd(n - 1)
        def odd(n): return False if n == 0 else even(n - 1)
        def fact(n): return 1 if n < 2 else n * fact(n - 1)
        def decorate(function):
            @functools.wraps(function)
            def inner(*args): return scale * function(*args)
            return inner
        """,
        """
        @decorate
        def decorated(x): return x + scale
        def counter():
            n = 0
            def step():
                nonlocal n
                n += 1
                return n
            return step
        step = counter()
        class Base:
            def value(self): return scale
        class Model(Base):
            def __init__(self, x): self.x = x
            def value(self): return super().value() * self.x + offset
        @dataclasses.dataclass
        class Point:
            x: int
            y: list = dataclasses.field(default_factory=list)
        def numbers(n): yield from range(n)
        async def later(x):
            await asyncio.sleep(0)
            return x * scale
        def files():
            names = !ls beside.py
            return list(names)
        offset = 1
        model = Model(5)
        registry = {"even": even}
        """,
        "def fact(n): return -1 if n < 2 else n * fact(n - 1)",
    ]
    inputs, out, results = travel(
        tmp_path,
        cells,
        """
        results = [even(10), fact(4), decorated(1), step(), model.value(), Point(1), dataclasses.asdict(Point(2))]
        results += [list(numbers(3)), await later(4), triple(2), files(), float(big.sum()), registry["even"](3)]
        _hidden = 1
        """,
    )
    assert "unused" not in inputs
    assert "odd" not in inputs
    assert out == ["results"]
    expected = (
        "[True, -24, 6, 1, 11, Point(x=1, y=[]), {'x': 2, 'y': []}, [0, 1, 2], 8, 6, ['beside.py'], 100000.0, False]"
    )
    assert results == f"{{'results': {expected}}}"


def test_the_cell_and_its_functions_share_their_variables_on_the_node(tmp_path: Path) -> None:
    _, _, results = travel(
        tmp_path,
        ["scale = 2\nlog = []\ndef f(x):\n    log.append(x)\n    return x * scale"],
        "before = f(1)\nscale = 10\nafter = f(1)\nseen = list(log)",
    )
    assert results == "{'before': 2, 'scale': 10, 'after': 10, 'seen': [1, 1]}"


def test_refusals_name_the_variable() -> None:
    with open(os.devnull, "w") as handle:
        namespace = {
            "__name__": "__main__",
            "data": {"log": [1, handle]},
            "temperature": 1.0,
            "big": bytearray(2 << 20),
        }
        with pytest.raises(CaptureError, match="does not have: 'temprature'; did you mean 'temperature'"):
            capture.collect("print(temprature)", namespace)
        with pytest.raises(CaptureError, match=r"variable 'data'\['log'\]\[1\] \(_io.TextIOWrapper\).*--in"):
            capture.collect("print(data)", namespace)
        with pytest.raises(
            CaptureError, match=r"variable 'big' \(bytearray\) has 2.0 MB; the limit is 1.0 MB.*storage"
        ):
            capture.collect("print(big, temperature)", namespace, limit=1 << 20)
        assert capture.collect("print(data)", namespace, inputs=["temperature"]).inputs == {"temperature": 1.0}
        with pytest.raises(CaptureError, match="--in names what the notebook does not have: 'nothing'"):
            capture.collect("1", namespace, inputs=["nothing"])
        assert capture.collect("print(seed, big)", namespace, extra_names=["seed", "big"]).inputs == {}
    with pytest.raises(SyntaxError):
        capture.collect("x = = 1", {})


def test_many_variables_over_the_limit_are_named_by_size() -> None:
    namespace = {"a": bytearray(700_000), "b": bytearray(600_000), "c": 1}
    with pytest.raises(
        CaptureError, match=r"'a' \(bytearray\) has 0.7 MB, .*'b' has 0.6 MB.* together 1.2 MB; the limit"
    ):
        capture.collect("a, b, c", namespace, limit=1 << 20)


def test_outputs_inputs_and_sizes() -> None:
    namespace = {"x": bytearray(50_000), "sum": len, "len": builtins.len}
    job = capture.collect("import os\n_t = x\ny = sum(_t)\nfor i in y: pass\ndef f(): pass", namespace)
    assert set(job.inputs) == {"x", "sum"}
    assert (job.out, job.explicit_out) == (("y", "i", "f"), False)
    assert job.sizes["x"] > 50_000
    assert frames.decode(job.frames)["inputs"] == job.inputs
    assert capture.collect("q = y = x", namespace, outputs=["q", "y"]).out == ("q", "y")


def notebook_function(source: str, **namespace: object) -> Any:
    names: dict[str, Any] = {"__name__": "__main__", **namespace}
    exec(textwrap.dedent(source), names)
    return names["f"]


def test_arguments_and_what_functions_read_are_checked() -> None:
    lock = threading.Lock()
    data = capture.check_function(notebook_function("def f(x): return x + g", g=1), (1,), {"y": 2})
    function, args, kwargs = frames.decode(data)
    assert (function(1), args, kwargs) == (2, (1,), {"y": 2})
    cases = {
        "argument 1 .*lock": (len, (1, lock), {}),
        r"argument 'key'\[0\] .*lock": (len, (), {"key": [lock]}),
        "function 'f', global 'guard' .*lock": (notebook_function("def f(): return guard", guard=lock), (), {}),
        "function 'f', global 'g', global 'guard'": (
            notebook_function("def g(): return guard\ndef f(): return g()", guard=lock),
            (),
            {},
        ),
        "function 'f', closure variable 'held'": (
            notebook_function("def make(held):\n    def f(): return held\n    return f\nf = make(guard)", guard=lock),
            (),
            {},
        ),
        "function 'f', default 0": (notebook_function("def f(a=guard): pass", guard=lock), (), {}),
    }
    for message, (function, args, kwargs) in cases.items():
        with pytest.raises(CaptureError, match=message):
            capture.check_function(function, args, kwargs)
    heavy = notebook_function("def f(): return table", table=bytearray(3 << 20))
    with pytest.raises(
        CaptureError, match=r"function 'f', global 'table' \(bytearray\) has 3.0 MB; the limit is 1.0 MB"
    ):
        capture.check_function(heavy, limit=1 << 20)


@pytest.mark.parametrize(
    "source",
    [
        "nosuch = 1",
        "if c:\n  nosuch = 1",
        "def f():\n  global nosuch\n  nosuch = 1\nf()",
        "import nosuch",
        "for nosuch in []: pass",
        "given.append(1)",
        "exec('nosuch = 1')",
        "globals()['nosuch'] = 1",
        "from os import *",
        "def f():\n  exec('nosuch = 1', globals())\nf()",
        "%run other.py",
        "%unknown_magic",
        "%%capture nosuch\n1",
        "get_ipython().push({'nosuch': 1})",
        "import __main__\n__main__.nosuch = 1",
        "binds()",
        "hidden()",
        "Binder().bind()",
    ],
)
def test_what_a_cell_may_assign_can_be_asked_back(source: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", "c": 1, "given": [], "nosuch": 0}
    functions = """
def binds():
    global nosuch
    nosuch = 1
def hidden():
    globals()['nosuch'] = 1
class Binder:
    @staticmethod
    def bind():
        def inner():
            global nosuch
            nosuch = 1
        inner()
"""
    wanted = ["given" if "given" in source else "nosuch"]
    if source.startswith(("binds", "hidden", "Binder")):
        exec(functions, namespace)
    assert capture.collect(source, namespace, outputs=wanted).out == tuple(wanted)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("score = 1", "'scores'; did you mean 'score'?"),
        ("scores = 1\ndel scores", "'scores'"),
        ("print(data)", "'scores'"),  # the notebook has such a variable, the node does not
        ("def f():\n  scores = 1\nf()", "'scores'"),
        ("!ls", "'scores'"),
        ("%time x = 1", "'scores'"),
        ("[scores for scores in data]", "'scores'"),
    ],
)
def test_what_a_cell_never_assigns_is_refused(source: str, words: str) -> None:
    namespace = {"__name__": "__main__", "data": [1], "scores": 2, "len": len}
    with pytest.raises(CaptureError) as caught:
        capture.collect(source, namespace, outputs=["scores"])
    assert f"--out names what the cell does not assign: {words}" in str(caught.value)


def test_names_of_the_array_can_be_asked_back() -> None:
    assert capture.collect("y = seed", {}, outputs=["seed", "y"], extra_names=["seed"]).out == ("seed", "y")


def test_only_own_names_are_near_to_in() -> None:
    with pytest.raises(CaptureError, match=r"'pirnt'$"):
        capture.collect("y = 1", {}, inputs=["pirnt"])
    with pytest.raises(CaptureError, match="did you mean 'print'"):
        capture.collect("pirnt(1)", {})
    with pytest.raises(CaptureError, match="did you mean 'paint'"):
        capture.collect("y = 1", {"paint": 1}, inputs=["pint"])
