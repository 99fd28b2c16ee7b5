from __future__ import annotations

import ast
import builtins
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_hybrid import capture, frames
from jupyter_hybrid.errors import CaptureError


def names(source: str) -> capture.CellNames:
    return capture.analyse(textwrap.dedent(source))


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
    try:
        exec(compile(source, "<cell>", "exec"), namespace)
    except (TypeError, RecursionError, UnboundLocalError):
        pass
    except NameError as error:
        assert "free variable" in str(error) or error.name in found.reads, source
    else:
        for name in "abcd":
            if name in namespace:
                assert name in found.writes, source
