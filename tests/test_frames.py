from __future__ import annotations

import ast
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from jupyter_hybrid import frames
from jupyter_hybrid.frames import (
    BROKEN,
    ERROR,
    PAYLOAD,
    VALUE,
    Entry,
    FrameCorrupt,
    FrameError,
    FrameMissing,
    FrameTruncated,
    FrameUnreadable,
    Reader,
    Writer,
    decode,
    encode,
    read_entry,
    write_file,
)

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if left.dtype.hasobject:
            return all(same(a, b) for a, b in zip(left.ravel(), right.ravel(), strict=True))
        return bool(left.tobytes() == right.tobytes())
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def through_file(path: Path, obj: Any) -> Any:
    write_file(path, [(0, VALUE, encode(obj))])
    return Reader(path).load(0)


def mapped(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def run_alone(code: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that has nothing but the standard library, as on a bare node."""
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
# numpy itself makes datetimes native when it pickles them
dtypes = st_np.scalar_dtypes().filter(lambda dtype: dtype.isnative or dtype.kind not in "mM")
arrays = st_np.arrays(dtypes, st_np.array_shapes(min_dims=0, min_side=0, max_side=6))
nested = st.recursive(
    plain | arrays | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


class TestRoundTrip:
    @quick
    @given(nested)
    def test_any_nested_object(self, tmp_path: Path, obj: Any) -> None:
        assert same(decode(encode(obj)), obj)
        assert same(through_file(tmp_path / "f", obj), obj)

    @quick
    @given(st.lists(st.integers(0, 300_000), max_size=6), st.lists(nested, max_size=6))
    def test_any_mix_of_sizes(self, tmp_path: Path, sizes: list[int], small: list[Any]) -> None:
        objects = [np.arange(size, dtype="u1") for size in sizes] + small + [[np.ones(size) for size in sizes]]
        entries = []
        with Writer(tmp_path / "part") as writer:
            for task, obj in enumerate(objects):
                entries.append(writer.append(task, VALUE, encode(obj)))
                assert same(read_entry(tmp_path / "part", entries[-1]), obj)
            writer.finish(tmp_path / "f")
        loaded = Reader(tmp_path / "f").load_all()
        assert [task for task, _, _ in loaded] == list(range(len(objects)))
        assert all(same(obj, objects[task]) for task, _, obj in loaded)
        assert list(Reader(tmp_path / "f").entries.values()) == entries

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((0, 7)),
            np.array(3.5),
            np.arange(90_000.0).reshape(300, 300)[::2, ::3],
            np.asfortranarray(np.arange(90_000.0).reshape(300, 300)),
            np.zeros(5_000, dtype=[("a", "i4"), ("b", "f8", (3,)), ("c", "S5")]),
            np.array([1, "two", None, np.arange(40_000)], dtype=object),
            np.arange("2024-01-01", "2030-01-01", dtype="M8[h]"),
            np.ma.masked_greater(np.arange(40_000), 7),
            np.arange(40_000, dtype=">i8"),
            np.full(40_000, "é"),
        ],
        ids=lambda array: f"{array.dtype}-{array.shape}",
    )
    def test_arrays(self, tmp_path: Path, array: np.ndarray) -> None:
        back = through_file(tmp_path / "f", array)
        assert same(back, array)
        assert back.flags.writeable
        assert back.flags.f_contiguous == array.flags.f_contiguous or not array.flags.forc

    def test_pandas(self, tmp_path: Path) -> None:
        table = pd.DataFrame(
            {
                "x": np.arange(30_000.0),
                "text": [f"ü{i}" for i in range(30_000)],
                "when": pd.date_range("2024", periods=30_000, freq="min", tz="Europe/Berlin"),
                "kind": pd.Categorical(["a", "b", None] * 10_000),
                "maybe": pd.array([1, None, 3] * 10_000, dtype="Int64"),
            }
        )
        pd.testing.assert_frame_equal(through_file(tmp_path / "f", table), table)
        indexed = table.set_index(["kind", "x"])
        pd.testing.assert_frame_equal(through_file(tmp_path / "f", indexed), indexed)

    def test_arrow(self, tmp_path: Path) -> None:
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"x": np.arange(50_000), "s": ["a", None] * 25_000, "l": [[1, 2], []] * 25_000})
        assert through_file(tmp_path / "f", table).equals(table)

    def test_large_bytes(self, tmp_path: Path) -> None:
        data = os.urandom(1 << 20) * 64
        assert through_file(tmp_path / "f", data) == data

    def test_more_buffers_than_one_writev_takes(self, tmp_path: Path) -> None:
        many = [np.full(3_000, i) for i in range(2_500)]
        assert same(through_file(tmp_path / "f", many), many)

    def test_sharing_is_kept(self, tmp_path: Path) -> None:
        array = np.arange(50_000)
        first, second = through_file(tmp_path / "f", [array, array])
        assert first is second

    def test_read_only_stays_read_only(self, tmp_path: Path) -> None:
        array = np.arange(50_000)
        array.flags.writeable = False
        assert not through_file(tmp_path / "f", array).flags.writeable

    def test_encode_copies_no_array(self) -> None:
        array = np.zeros(50_000)
        pickled, view = encode(array)
        assert np.shares_memory(np.frombuffer(view), array)
        assert len(pickled) < 1_000


class TestByValue:
    CODE = """
import enum, json, sys, typing
sys.path[:0] = json.loads(sys.argv[1])
from jupyter_hybrid.frames import PAYLOAD, encode, write_file
import numpy as np
assert "cloudpickle" not in sys.modules
encode([np.zeros(9), {"a": 1}])
assert "cloudpickle" not in sys.modules
factor = 3
def scaled(x): return factor * x
class Model:
    def __init__(self): self.weights = np.ones(50_000)
    def total(self): return scaled(self.weights.sum())
class Colour(enum.Enum): RED = 1
T = typing.TypeVar("T")
objects = [scaled, Model(), Colour.RED, T, lambda x: x + factor, [Model().total], {"nested": (Model,)}]
write_file(sys.argv[2], [(i, PAYLOAD, encode(o)) for i, o in enumerate(objects)])
"""

    def test_what_main_defines_travels(self, tmp_path: Path) -> None:
        arguments = [sys.executable, "-c", self.CODE, json.dumps(sys.path), str(tmp_path / "f")]
        subprocess.run(arguments, check=True, timeout=60)
        scaled, model, red, variable, plus, (total,), nested = [obj for _, _, obj in Reader(tmp_path / "f").load_all()]
        assert (scaled(2), plus(2), model.total(), total()) == (6, 5, 150_000, 150_000)
        assert red.name == "RED"
        assert variable.__name__ == "T"
        assert nested["nested"][0]().total() == 150_000
        assert not any(hasattr(sys.modules["__main__"], name) for name in ("scaled", "Model", "Colour"))

    def test_a_module_registered_by_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import cloudpickle

        module = types.ModuleType("notebook_neighbour")
        exec("def double(x): return 2 * x", module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        by_reference = encode(module.double)
        cloudpickle.register_pickle_by_value(module)
        try:
            by_value = encode(module.double)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
        monkeypatch.delitem(sys.modules, module.__name__)
        assert decode(by_value)(4) == 8
        with pytest.raises(ModuleNotFoundError):
            decode(by_reference)

    def test_what_nothing_can_pickle(self, tmp_path: Path) -> None:
        with (tmp_path / "open").open("wb") as file, pytest.raises((TypeError, pickle.PicklingError)):
            encode({"file": file})


class TestMapping:
    def test_arrays_are_aligned_and_private(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        write_file(path, [(i, VALUE, encode((i, np.full(200_000 + i, i)))) for i in range(5)])
        before = path.read_bytes()
        reader = Reader(path)
        for i in range(5):
            _, array = reader.load(i)
            assert array.ctypes.data % 64 == 0
            array[:] = -1
        assert path.read_bytes() == before
        assert all((obj[1] == task).all() for task, _, obj in reader.load_all())
        assert (reader.load(3)[1] == 3).all()

    @pytest.mark.parametrize("size", [1_000, 20_000, 1_000_000])
    def test_entries_of_a_growing_file(self, tmp_path: Path, size: int) -> None:
        with Writer(tmp_path / "part") as writer:
            writer.append(0, VALUE, encode("odd"))
            entry = writer.append(1, VALUE, encode(np.arange(size)))
            array = read_entry(tmp_path / "part", Entry(*json.loads(json.dumps(entry))))
            array += 1
            writer.finish(tmp_path / "f")
        assert (read_entry(Reader(tmp_path / "f"), entry) == np.arange(size)).all()

    def test_map_lives_as_long_as_an_array(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        write_file(path, [(0, VALUE, encode(np.arange(500_000)))])
        array = Reader(path).load(0)[10:20]
        path.unlink()
        assert mapped(path) == 1
        assert array.tolist() == list(range(10, 20))
        del array
        assert mapped(path) == 0

    def test_open_files(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        write_file(path, [(0, VALUE, encode(np.arange(200_000)))])
        before = len(os.listdir("/proc/self/fd"))
        kept = [(reader := Reader(path), reader.load(0)) for _ in range(1_500)]
        kept += [(reader, read_entry(path, reader.entries[0])) for reader, _ in kept]
        assert mapped(path) > 0
        assert len(kept) == 3_000
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(FrameMissing):
            Reader(tmp_path / "none")
        assert len(os.listdir("/proc/self/fd")) == before


class TestWriter:
    def test_files_are_private(self, tmp_path: Path) -> None:
        write_file(tmp_path / "f", [])
        assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600
        assert Reader(tmp_path / "f").load_all() == []
        assert [p.name for p in tmp_path.iterdir()] == ["f"]

    def test_kinds_and_tasks(self, tmp_path: Path) -> None:
        error = ZeroDivisionError("division by zero")
        write_file(tmp_path / "f", [(-1, PAYLOAD, encode(len)), (2**40, ERROR, encode(error))])
        loaded = Reader(tmp_path / "f").load_all()
        assert [(task, kind) for task, kind, _ in loaded] == [(-1, PAYLOAD), (2**40, ERROR)]
        assert repr(loaded[1][2]) == repr(error)

    def test_last_record_of_a_task_counts(self, tmp_path: Path) -> None:
        write_file(tmp_path / "f", [(0, ERROR, encode("first")), (1, VALUE, encode(1)), (0, VALUE, encode("second"))])
        assert Reader(tmp_path / "f").load_all() == [(0, VALUE, "second"), (1, VALUE, 1)]

    def test_resume_after_any_cut(self, tmp_path: Path) -> None:
        whole = tmp_path / "whole"
        objects = [1.5, np.arange(3_000), {"a": "b"}, None]
        with Writer(whole) as writer:
            entries = [writer.append(i, VALUE, encode(obj)) for i, obj in enumerate(objects)]
            data = whole.read_bytes()
            writer.finish(whole)
        finished = whole.read_bytes()
        part = tmp_path / "part"
        for cut in [*range(0, len(data), 97), *range(len(data), len(finished) + 1)]:
            part.write_bytes(finished[:cut])
            with Writer.resume(part) as writer:
                assert writer.entries == [e for e in entries if e.offset + e.length <= cut]
                for i in range(len(writer.entries), len(objects)):
                    writer.append(i, VALUE, encode(objects[i]))
                writer.finish(tmp_path / "f")
            assert (tmp_path / "f").read_bytes() == finished

    def test_resume_starts_what_is_not_there(self, tmp_path: Path) -> None:
        with Writer.resume(tmp_path / "part") as writer:
            assert writer.entries == []

    def test_killed_writer_loses_nothing_it_announced(self, tmp_path: Path) -> None:
        part = tmp_path / "part"
        code = f"""
import sys; sys.path[:0] = {sys.path!r}
import json, numpy as np
from jupyter_hybrid.frames import VALUE, Writer, encode
writer = Writer.resume({str(part)!r})
for task in range(len(writer.entries), 10**6):
    print(json.dumps(writer.append(task, VALUE, encode(np.full(1 + task * 37 % 9_000, task)))), flush=True)
"""
        announced: dict[int, Entry] = {}
        for round_ in range(4):
            with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for _ in range(50 + 31 * round_):
                    entry = Entry(*json.loads(process.stdout.readline()))
                    announced[entry.task] = entry
                process.send_signal(signal.SIGKILL)
            with Writer.resume(part) as writer:
                kept = {entry.task: entry for entry in writer.entries}
            assert announced.items() <= kept.items()
        for task, entry in kept.items():
            assert (read_entry(part, entry) == np.full(1 + task * 37 % 9_000, task)).all()

    def test_full_disk_leaves_whole_records(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Writer(tmp_path / "part") as writer:
            writer.append(0, VALUE, encode("fits"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            try:
                with pytest.raises(OSError, match="File too large"):
                    writer.append(1, VALUE, encode(np.zeros(100_000)))
                with pytest.raises(OSError, match="File too large"):
                    write_file(tmp_path / "g", [(0, VALUE, encode(np.zeros(100_000)))])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            writer.append(1, VALUE, encode("smaller"))
            writer.finish(tmp_path / "f")
        assert [obj for _, _, obj in Reader(tmp_path / "f").load_all()] == ["fits", "smaller"]
        assert [p.name for p in tmp_path.iterdir()] == ["f"]


class TestDamage:
    OBJECTS = [0.5, {"a": 1.0, "b": 2.0}, [np.arange(2_500), "x"], np.float32(3), "text", np.arange(4_100.0)]

    def write(self, path: Path) -> tuple[bytes, list[Entry]]:
        write_file(path, [(10 + i, VALUE, encode(obj)) for i, obj in enumerate(self.OBJECTS)])
        return path.read_bytes(), list(Reader(path).entries.values())

    def check(self, path: Path, entries: list[Entry], touched: range) -> None:
        """Exactly the touched records are reported, or the file is; every value that comes out is right."""
        end = entries[-1].offset + entries[-1].length
        try:
            loaded = Reader(path).load_all()
        except FrameError as error:
            assert touched.stop > end
            assert str(path) in str(error)  # noqa: PT017
            return
        assert touched.stop <= end
        assert len(loaded) == len(entries)
        for (task, kind, obj), entry in zip(loaded, entries, strict=True):
            if entry.offset < touched.stop and touched.start < entry.offset + entry.length:
                assert kind == BROKEN
                assert isinstance(obj, FrameCorrupt)
                assert str(path) in str(obj)
                assert f"task {task}" in str(obj)
                with pytest.raises(FrameError):
                    Reader(path).load(task)
                with pytest.raises(FrameError):
                    read_entry(path, entry)
            else:
                assert kind == VALUE
                assert same(obj, self.OBJECTS[task - 10])

    @quick
    @given(st.data())
    def test_any_bit(self, tmp_path: Path, data: st.DataObject) -> None:
        path = tmp_path / "f"
        content, entries = self.write(path)
        position = data.draw(st.integers(0, len(content) - 1))
        damaged = bytearray(content)
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(damaged)
        self.check(path, entries, range(position, position + 1))

    @quick
    @given(st.data())
    @example(None)
    def test_any_overwritten_range(self, tmp_path: Path, data: st.DataObject | None) -> None:
        path = tmp_path / "f"
        content, entries = self.write(path)
        start = data.draw(st.integers(0, len(content) - 1)) if data else 0
        length = min(data.draw(st.integers(1, 5_000)) if data else len(content), len(content) - start)
        fill = bytes(255 - byte for byte in content[start : start + length])
        path.write_bytes(content[:start] + fill + content[start + length :])
        self.check(path, entries, range(start, start + length))

    def test_every_bit_of_a_small_file(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        write_file(path, [(7, VALUE, encode(0.5)), (8, VALUE, encode("b"))])
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                loaded = Reader(path).load_all()
            except FrameError:
                continue
            assert sorted(kind for _, kind, _ in loaded) == [VALUE, BROKEN]
            assert (7, VALUE, 0.5) in loaded or (8, VALUE, "b") in loaded

    def test_every_truncation(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        content, entries = self.write(path)
        for size in [*range(0, len(content), 211), *range(len(content) - 400, len(content))]:
            path.write_bytes(content[:size])
            with pytest.raises(FrameTruncated, match=r"retry\(\) runs only what is lost"):
                Reader(path)
            for entry in entries:
                if entry.offset + entry.length > size:
                    with pytest.raises(FrameTruncated, match=f"task {entry.task}"):
                        read_entry(path, entry)
                else:
                    assert same(read_entry(path, entry), self.OBJECTS[entry.task - 10])

    @quick
    @given(st.binary(max_size=400))
    def test_arbitrary_bytes(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "f"
        path.write_bytes(content)
        with pytest.raises(FrameError):
            Reader(path)
        with pytest.raises(FrameError):
            read_entry(path, Entry(0, 0, 0, max(len(content), 1), 0))
        with Writer.resume(path) as writer:
            assert writer.entries == []

    def test_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        with pytest.raises(FrameMissing, match="does not exist"):
            Reader(path)
        with pytest.raises(FrameMissing, match="task 3"):
            read_entry(path, Entry(3, 0, 0, 100, 0))
        write_file(path, [(0, VALUE, encode(1))])
        with pytest.raises(FrameMissing, match="no task 1"):
            Reader(path).load(1)

    def test_newer_version(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        content, _ = self.write(path)
        path.write_bytes(content.replace(b"HyFrame1", b"HyFrame2"))
        with pytest.raises(FrameError, match="upgrade jupyter_hybrid"):
            Reader(path)

    def test_intact_but_not_importable(self, tmp_path: Path) -> None:
        pickled = b"cno_such_module\nthing\n."
        write_file(tmp_path / "f", [(0, VALUE, encode(1)), (1, VALUE, [pickled])])
        with pytest.raises(FrameUnreadable, match="no_such_module"):
            Reader(tmp_path / "f").load(1)
        good, bad = Reader(tmp_path / "f").load_all()
        assert good == (0, VALUE, 1)
        assert bad[1] == BROKEN
        assert isinstance(bad[2].__cause__, ModuleNotFoundError)

    def test_nothing_is_unpickled_before_its_checksum_is_right(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        trap = tmp_path / "trap"
        evil = f"cos\nmkdir\n(V{trap}\ntR.".encode()
        write_file(path, [(0, VALUE, [b"N." + bytes(len(evil) - 2)])])
        content = path.read_bytes()
        path.write_bytes(content.replace(b"N." + bytes(len(evil) - 2), evil))
        assert Reader(path).load_all()[0][1] == BROKEN
        assert not trap.exists()


class TestOnABareNode:
    def test_syntax_of_python_3_8(self) -> None:
        ast.parse(Path(frames.__file__).read_text(), feature_version=(3, 8))

    def test_copied_file_writes_what_the_kernel_reads(self, tmp_path: Path) -> None:
        shutil.copy(frames.__file__, tmp_path / "frames.py")
        write_file(tmp_path / "payload", [(0, PAYLOAD, encode(1))])
        with Writer(tmp_path / "part") as writer:
            writer.append(0, PAYLOAD, encode(1))
            writer.finish(tmp_path / "fast")
        code = """
import sys; sys.path.insert(0, sys.argv[1])
import frames
assert frames.xxh3_64 is None
with frames.Writer(sys.argv[1] + "/part") as writer:
    for task in range(3):
        entry = writer.append(task, frames.VALUE, frames.encode({"task": task, "data": bytearray(100_000)}))
        assert frames.read_entry(sys.argv[1] + "/part", entry)["task"] == task
    writer.finish(sys.argv[1] + "/result")
assert len(frames.Reader(sys.argv[1] + "/result").load_all()) == 3
assert frames.Reader(sys.argv[1] + "/payload").load(0) == 1
frames.Reader(sys.argv[1] + "/fast")
"""
        bare = run_alone(code, tmp_path)
        assert "FrameError" in bare.stderr.splitlines()[-1]
        assert "install the package xxhash" in bare.stderr
        loaded = Reader(tmp_path / "result").load_all()
        assert [obj["task"] for _, _, obj in loaded] == [0, 1, 2]
        (tmp_path / "result").rename(tmp_path / "part")
        with Writer.resume(tmp_path / "part") as writer:
            assert len(writer.entries) == 3
            writer.append(3, VALUE, encode("from the kernel"))
            writer.finish(tmp_path / "result")
        assert Reader(tmp_path / "result").load(3) == "from the kernel"

    def test_imports_only_the_standard_library(self, tmp_path: Path) -> None:
        shutil.copy(frames.__file__, tmp_path / "frames.py")
        code = "import sys; sys.path.insert(0, sys.argv[1]); import frames; print(*sys.modules)"
        done = run_alone(code, tmp_path)
        assert done.returncode == 0, done.stderr
        loaded = {name.partition(".")[0] for name in done.stdout.split()}
        assert loaded - set(sys.stdlib_module_names) <= {"frames", "__main__"}
        assert not loaded & {"hashlib", "asyncio", "concurrent", "logging"}
