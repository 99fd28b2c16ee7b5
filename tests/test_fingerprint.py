from __future__ import annotations

import collections
import datetime
import enum
import functools
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_hybrid.fingerprint import UncacheableError, cell_keys, explain, fingerprint, function_keys, task_key

PROGRAM = '''
import abc, collections, dataclasses, datetime, enum, functools, json, pathlib, re, sys, threading, typing
import numpy as np
import pandas as pd

class Colour(enum.Enum):
    RED = 1
    BLUE = "b"
    def shade(self): return self.name

class Flags(enum.Flag):
    A = 1
    B = 2

@dataclasses.dataclass
class Point:
    """A point."""
    x: int
    tags: set = dataclasses.field(default_factory=set)
    def far(self): return self.x > limit

class Base(abc.ABC):
    @abc.abstractmethod
    def run(self): ...

class Child(Base):
    __slots__ = ("a", "b")
    kind = {"p", "q", "r"}
    def __init__(self): self.a = self.b = "v"
    def run(self): return super().run() or helper(3)
    @property
    def twice(self): return 2 * self.a
    @classmethod
    def make(cls): return cls()
    @staticmethod
    def plain(): return 0

limit = 10
ring = []
ring.append({"self": ring, "n": 1})

def helper(n):
    """Say something."""
    return main(n - 1) if n in {"a", "b", "c", 1} else limit

def decorate(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

@functools.lru_cache(maxsize=8)
def cached(n): return cached(n - 1)

@decorate
def decorated(): return [i for i in range(limit)]

def nested():
    class Inner:
        def set(self): self.one = self.two = self.three = 1
    return Inner, lambda: limit

async def later(): return await helper(2)

def numbers():
    yield from range(limit)

def main(a, b=(1, 2), *, c=frozenset("xyz")):
    """Do it."""
    return (helper(a), Colour.RED, Point(1), Child, decorated, ring, np.sin(1), cached, nested, later, numbers)

values = [
    {"b": 1, "a": {"z", "y", "x"}}, Colour.BLUE, Flags.A | Flags.B, Point(1, {"m", "n"}), Child(), ring, main,
    decorated, datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), pathlib.PurePosixPath("/a/b"),
    np.arange(6).reshape(2, 3).T, np.float32(1.5), np.array(["a", None], dtype=object), np.random.default_rng(3),
    pd.DataFrame({"s": ["a", "b", None], "n": [1, 2, 3], "c": pd.Categorical(["u", "v", "u"])}, index=list("xyz")),
    pd.Series([1.0, 2.0], name="w"), pd.date_range("2026-01-01", periods=3), functools.partial(main, 1), Point(2).far,
    collections.Counter("hello"), collections.OrderedDict(a=1), collections.defaultdict(list, k=[1]), len, str.upper,
    typing.Optional[int], main.__code__, json.dumps, json, collections.namedtuple("N", "a b"), range(3), slice(1),
    re.compile("a+"),
]
'''
TAIL = """
from jupyter_hybrid.fingerprint import cell_keys, fingerprint, function_keys
keys = [fingerprint(value) for value in values]
call = function_keys(main, (1, Child()), {"k": Colour.RED})
print(json.dumps([keys, call, cell_keys("y = main(x)", {"main": main})]))
"""


def run(folder: Path, name: str, source: str, seed: int) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(source)
    env = {**os.environ, "PYTHONHASHSEED": str(seed)}
    done = subprocess.run([sys.executable, folder / name], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_same_in_other_processes_files_and_lines(tmp_path: Path) -> None:
    moved = "# moved\n" * 40 + re.sub("(?m)^( +)return", r"\n\1# why\n\n\1return", PROGRAM) + TAIL
    documented = moved.replace('"""Say something."""', '"""Say another thing."""')
    first = run(tmp_path / "a", "one.py", PROGRAM + TAIL, 1)
    for seed, source in ((2, moved), (3, documented), (4, PROGRAM + TAIL)):
        assert run(tmp_path / f"b{seed}", "two.py", source, seed) == first
    assert len(set(first[0])) == len(first[0])


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("limit = 10", "limit = 11", "the global 'limit' changed"),
        ("return main(n - 1)", "return main(n - 2)", "the global 'helper' changed"),
        ("b=(1, 2)", "b=(1, 3)", "the default of 'b' changed"),
        ('frozenset("xyz")', 'frozenset("xyw")', "the default of 'c' changed"),
        ("np.sin(1)", "np.cos(1)", "the code of the function changed"),
        ("cached(n - 1)", "cached(n + 1)", "the global 'cached' changed"),
        ("self.x > limit", "self.x >= limit", "the global 'Point' changed"),
        ("range(limit)]", "range(limit) if i]", "the global 'decorated' changed"),
        ('"n": 1}', '"n": 2}', "the global 'ring' changed"),
        ("self.one = ", "self.one = self.zero = ", "the global 'nested' changed"),
        ("RED = 1", "RED = 2", "the global 'Colour' changed"),
    ],
)
def test_what_changed_is_named(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    tail = TAIL.replace("keys = [fingerprint(value) for value in values]", "keys = []")
    before = run(tmp_path, "one.py", PROGRAM + tail, 1)[1]
    after = run(tmp_path, "two.py", PROGRAM.replace(old, new) + tail, 1)[1]
    assert sentence in explain(before, after)


def test_explain() -> None:
    old = {"python": "3.11", "code": "1", "argument:2": "1", "argument:x": "1", "closure:c": "1", "in:gone": "1"}
    new = {"python": "3.12", "code": "1", "argument:2": "2", "argument:x": "2", "closure:c": "2", "in:new": "1"}
    assert explain(old, new) == [
        "Python changed from 3.11 to 3.12",
        "argument 2 changed",
        "argument 'x' changed",
        "the closure variable 'c' changed",
        "the variable 'new' is new",
        "the variable 'gone' is no longer used",
    ]
    assert explain(old, dict(old)) == []


def test_a_cell_counts_by_what_it_does() -> None:
    one = cell_keys("# twice\ny = (x *\n  2)  # here\n%matplotlib inline\n", {"x": 1}, ["y"])
    same = cell_keys("y = x * 2\n\n%matplotlib inline", {"x": 1}, ["y"])
    assert one == same
    assert explain(one, cell_keys("y = x * 3\n%matplotlib inline", {"x": 1}, ["y"])) == ["the code of the cell changed"]
    assert explain(one, cell_keys("y = x * 2\n%matplotlib inline", {"x": 2}, ["y"])) == ["the variable 'x' changed"]
    assert task_key(one, {"seed": 1}) == task_key(same, {"seed": 1}) != task_key(one, {"seed": 2})


def test_a_module_beside_the_notebook_counts_by_its_source(tmp_path: Path) -> None:
    program = "import json, model\nfrom jupyter_hybrid.fingerprint import *\ndef f(x): return model.fit(x)\n"
    program += "print(json.dumps([function_keys(f), fingerprint(model.fit), fingerprint(model.Net())]))"

    def keys(step: str, other: str, name: str) -> Any:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.py").write_text(f"import step\nclass Net: pass\ndef fit(x):\n    return {step}\n")
        (folder / "step.py").write_text(other)
        return run(folder, "main.py", program, 0)

    first = keys("x + 1", "size = 1", "a")
    assert keys("x + 1  # same", "size = 1", "b") == first
    for step, other in (("x + 2", "size = 1"), ("x + 1", "size = 2")):
        changed = keys(step, other, f"c{len(step + other)}{other[-1]}")
        assert explain(first[0], changed[0]) == ["the global 'model' changed"]
        assert changed[1] != first[1]
        assert changed[2] != first[2]


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner, max_size=4)
        | st.sets(st.text() | st.integers(), max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(_values)
def test_copies_are_equal(value: Any) -> None:
    import pickle

    assert fingerprint(pickle.loads(pickle.dumps(value))) == fingerprint(value)
    assert fingerprint([value, value]) == fingerprint([value, pickle.loads(pickle.dumps(value))])


@settings(deadline=None)
@given(_values, _values)
def test_different_values_differ(one: Any, other: Any) -> None:
    if repr(one) != repr(other) and one != other:
        assert fingerprint(one) != fingerprint(other)


class Node:
    def __init__(self, name: int) -> None:
        self.name = name
        self.links: list[Node] = []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_graphs_with_cycles(edges: list[tuple[int, int]]) -> None:
    """The same graph built again, and met in another context, has the same fingerprint; a changed one has not."""

    def build() -> list[Node]:
        nodes = [Node(number) for number in range(6)]
        for start, end in edges:
            nodes[start].links.append(nodes[end])
        return nodes

    one, other = build(), build()
    alone = fingerprint(one[0])
    assert fingerprint(other[0]) == alone
    assert fingerprint([one[1], one[0]]) == fingerprint([other[1], other[0]])
    reached, pending = set(), [other[0]]
    while pending:
        node = pending.pop()
        if node.name not in reached:
            reached.add(node.name)
            pending += node.links
    other[3].name = 99
    assert (fingerprint(other[0]) != alone) == (3 in reached)


def test_many_paths_through_one_cycle_are_walked_once() -> None:
    nodes = [Node(number) for number in range(60)]
    for node in nodes:
        node.links = nodes  # a depth-first walk without memory would take 60! steps
    assert fingerprint(nodes[0]) == fingerprint(nodes[0])


def test_distinctions() -> None:
    values: list[Any] = [
        *(1, True, 1.0, "1", b"1", bytearray(b"1"), (1,), [1], {1}, frozenset({1}), {1: 1}, None, "", (), [], {}),
        *(0.0, -0.0, float("nan"), [[1], 2], [1, [2]], ["ab"], ["a", "b"], datetime.date(2026, 1, 1), Path("a")),
        *(
            np.arange(3),
            np.arange(3.0),
            np.arange(3).reshape(3, 1),
            np.int64(1),
            np.int32(1),
            np.zeros(0),
            np.zeros((0, 2)),
        ),
        *(pd.Series([1]), pd.Series([1], name="a"), pd.Index([1]), pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]})),
        *(pd.Series(["a", None]), pd.Series(["a", "None"]), pd.Series(["a", ""]), np, pd, len, str.upper, str.lower),
        *(collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1), int, float, enum.Enum),
        *(lambda: ["a" for i in "x"], lambda: ["b" for i in "x"], lambda: "a", lambda: "b"),
        *(lambda x: x, lambda x: -x, lambda x=1: x, functools.partial(len), "a".join, "b".join),
    ]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_a_docstring_counts_only_where_it_is_used() -> None:
    def function(text: str, value: str) -> str:
        names: dict[str, Any] = {}
        exec(f"def f(x):\n    {text!r}\n    return x + {value!r}", names)
        return fingerprint(names["f"])

    assert function("One.", "c") == function("Two.", "c")
    assert function("One.", "One.") != function("Two.", "Two.")


def test_equal_arrays_in_any_layout() -> None:
    array = np.arange(24.0).reshape(4, 6)
    expected = fingerprint(array[:, ::2].copy())
    assert fingerprint(array[:, ::2]) == expected
    assert fingerprint(np.asfortranarray(array[:, ::2])) == expected
    times = np.array(["2026-01-01", "NaT"], dtype="M8[s]")
    assert fingerprint(times) == fingerprint(times.copy())
    records = np.zeros(2, dtype=[("a", "i4"), ("b", "f8")])
    assert fingerprint(records["b"]) == fingerprint(np.zeros(2))


def test_the_part_without_a_fingerprint_is_named() -> None:
    with open(os.devnull) as file, pytest.raises(UncacheableError, match=r"argument 0\['log'\]\[1\].*TextIOWrapper"):
        function_keys(len, [{"log": [1, file]}])
    lock = threading.Lock()
    function = types.FunctionType(compile("lambda: guard", "", "eval").co_consts[0], {"guard": lock}, "f")
    with pytest.raises(UncacheableError, match="the global 'guard'"):
        function_keys(function)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UncacheableError, match="nested too deeply"):
        fingerprint(deep)
    while deep:  # a recursive deallocation would overflow the stack
        deep = deep[0]


def test_functions_of_installed_packages_count_by_name_and_version() -> None:
    assert fingerprint(textwrap.dedent) != fingerprint(textwrap.indent)
    assert set(function_keys(textwrap.dedent)) == {"python", "code"}
