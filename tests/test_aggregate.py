"""Dask collections over the results of real arrays on the local pool, in threads and on a distributed client."""

from __future__ import annotations

import datetime
import operator
import subprocess
import sys
import threading
import types
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array
import dask.bag
import dask.dataframe
import numpy as np
import pandas as pd
import pytest

import jupyter_hybrid as hy
from jupyter_hybrid import aggregate, capture, executor, frames, launch
from jupyter_hybrid.errors import JobFailed, RemoteError, ResultLost
from jupyter_hybrid.pool import get_pool

# As in a notebook: what is defined here travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Point = namedtuple("Point", "x y")


@dataclass
class Fit:
    slope: float
    label: str


def array_of(fn: Callable[..., Any], *iterables: Any, batch: int | str = 10, **options: Any) -> hy.ArrayJob:
    return hy.Executor("local").array(fn, *iterables, batch=batch, **options).wait(120)


def double(seed: int) -> int:
    return 2 * seed


def picky(seed: int) -> float:
    if seed % 5 == 3:
        raise ValueError(f"seed {seed} is bad")
    return seed / 2


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    )
    connected = distributed.Client(cluster, set_as_default=False)
    yield connected
    connected.close()
    cluster.close()


@pytest.fixture(params=["threads", "client"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test twice: without and with an active client."""
    if request.param == "client":
        with request.getfixturevalue("client").as_current():
            yield request.param
    else:
        yield request.param


# --- where it runs ----------------------------------------------------------------------------------------------------


def where(value: object) -> tuple[int, str]:
    import os

    return os.getpid(), threading.current_thread().name


def test_threads_by_default() -> None:
    import os

    array = array_of(double, range(30))
    bag = array.to_bag().map(where)
    for pids in (
        {pid for pid, _ in bag.compute()},
        {pid for pid, _ in bag.take(3)},
        {bag.map(operator.itemgetter(0)).max().compute()},
        {dask.delayed(where)(array.to_delayed()[0]).compute()[0]},
        set(array.to_dataframe().map_partitions(lambda part: pd.Series(where(part)[:1]), meta=("", "int64")).compute()),
        {array.reduce(lambda a, b: where(0)[0])},
    ):
        assert pids == {os.getpid()}


def test_active_client(client: Any) -> None:
    workers = set(client.run(lambda: __import__("os").getpid()).values())
    array = array_of(double, range(30))
    with client.as_current():
        bag = array.to_bag().map(where)
        assert {pid for pid, _ in bag.compute()} <= workers
        assert bag.map(operator.itemgetter(0)).max().compute() in workers
        assert array.reduce(lambda a, b: where(0)[0]) in workers
        assert dask.delayed(where)(array.to_delayed()[0]).compute()[0] in workers


def test_import_is_light() -> None:
    code = "import sys, jupyter_hybrid.aggregate; print({'dask', 'numpy', 'pandas', 'distributed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 40, "auto"])
def test_all_collections(anywhere: str, batch: int | str) -> None:
    array = array_of(double, range(40), batch=batch)
    expected = [2 * seed for seed in range(40)]
    assert list(dask.compute(*array.to_delayed())) == expected
    assert array.to_bag().compute() == expected
    assert array.to_bag().npartitions >= 8
    assert array.to_dask_array().compute().tolist() == expected
    frame = array.to_dataframe()
    assert isinstance(frame, dask.dataframe.DataFrame)
    assert frame.known_divisions
    assert (frame.divisions[0], frame.divisions[-1]) == (0, 39)
    computed = frame.compute()
    assert computed.index.tolist() == list(range(40))
    assert computed["seed"].tolist() == list(range(40))
    assert computed["value"].tolist() == expected
    assert frame.loc[17].compute()["value"].tolist() == [34]
    assert frame["value"].mean().compute() == 39.0
    assert array.reduce(operator.add) == sum(expected)


def test_from_another_process(tmp_path: Path) -> None:
    array = array_of(double, range(12))
    code = f"import jupyter_hybrid as hy; print(hy.job({array.id!r}).to_dataframe().compute()['value'].sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 132


def test_waits_for_the_end(tmp_path: Path) -> None:
    go = tmp_path / "go"

    def hold(seed: int, go: str) -> int:
        import os
        import time

        while not os.path.exists(go):
            time.sleep(0.01)
        return seed

    array = hy.Executor("local").array(hold, range(4), [str(go)] * 4)
    asked = threading.Event()
    found: list[int] = []

    def ask() -> None:
        asked.set()
        found.append(array.reduce(operator.add))

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(60)
    assert not array.done()
    assert not found
    go.touch()
    thread.join(120)
    assert found == [6]


def test_reused_results() -> None:
    executor = hy.Executor("local", cache=True)
    executor.array(double, range(10, 30), batch=4).wait(120)
    array = executor.array(double, range(40)).wait(120)
    assert array.to_bag().compute() == [2 * seed for seed in range(40)]
    assert array.to_dataframe().compute()["seed"].tolist() == list(range(40))
    assert array.reduce(operator.add) == sum(range(0, 80, 2))


# --- data frame -------------------------------------------------------------------------------------------------------


def test_rows_of_many_kinds() -> None:
    values: list[tuple[Callable[[int], Any], list[str]]] = [
        (lambda i: {"a": i, "b": str(i)}, ["a", "b"]),
        (lambda i: types.MappingProxyType({"a": i}) if i < 0 else {"a": i}, ["a"]),
        (lambda i: Point(i, -i), ["x", "y"]),
        (lambda i: Fit(i / 2, f"n{i}"), ["slope", "label"]),
        (lambda i: pd.Series({"u": i, "v": i * 0.5}), ["u", "v"]),
        (np.float32, ["value"]),
        (lambda i: None if i % 2 else "text", ["value"]),
        (lambda i: datetime.datetime(2024, 1, 1 + i), ["value"]),
        (lambda i: [i, i], ["value"]),
        (np.arange, ["value"]),
    ]
    for make, columns in values:
        array = array_of(lambda i, make=make: make(i), range(12))
        frame = array.to_dataframe()
        computed = frame.compute()
        assert list(frame.columns) == list(computed.columns) == ["i", *columns]
        if columns == ["value"]:
            expected = pd.DataFrame({"value": [make(i) for i in range(12)]})
        else:
            expected = pd.DataFrame([make(i) for i in range(12)])
        for name in columns:
            found, wanted = computed[name].tolist(), expected[name].tolist()
            assert [str(one).replace("<NA>", "nan") for one in found] == [str(one) for one in wanted]
    assert array.to_dataframe().dtypes["i"] == "int64"


@pytest.mark.parametrize("make", [lambda i: [i, i], np.arange, lambda i: {i}, lambda i: b"x" * i, lambda i: (i, "a")])
def test_objects_stay_objects(make: Callable[[int], Any]) -> None:
    array = array_of(make, range(12))
    assert [type(value) for value in array.to_dataframe()["value"].compute()] == [type(make(1))] * 12


def test_integers_before_fractions_stay_whole_values() -> None:
    array = array_of(lambda i: 1 if i < 30 else 0.5, range(40))
    assert array.to_dataframe()["value"].compute().tolist() == [1.0] * 30 + [0.5] * 10


def test_missing_columns_are_missing_values() -> None:
    array = array_of(lambda i: {"a": i, "b": "x"} if i < 30 else {"a": i}, range(40))
    computed = array.to_dataframe().compute()
    assert computed["a"].tolist() == list(range(40))
    assert computed["b"].isna().tolist() == [False] * 30 + [True] * 10


def test_a_new_column_later_is_an_error() -> None:
    array = array_of(lambda i: {"a": i} if i < 30 else {"a": i, "late": i}, range(40))
    with pytest.raises(hy.HybridError, match=r"a column 'late' that those of the first tasks lack \(i, a\)"):
        array.to_dataframe().compute()


def test_data_frames_are_concatenated(anywhere: str) -> None:
    def table(seed: int, tag: str) -> pd.DataFrame:
        import pandas

        days = pandas.date_range("2024-01-01", periods=seed % 3, name="day")
        return pandas.DataFrame({"y": [float(seed)] * (seed % 3)}, index=days)

    array = array_of(table, range(1, 13), list("abcdefghijkl"))
    frame = array.to_dataframe()
    computed = frame.compute()
    assert list(computed.columns) == ["seed", "tag", "day", "y"]
    assert computed.index.tolist() == [i for i in range(12) for _ in range((i + 1) % 3)]
    assert computed["seed"].tolist() == [i + 1 for i in range(12) for _ in range((i + 1) % 3)]
    assert computed["day"].dtype.kind == "M"
    assert frame.groupby("tag")["y"].sum().compute()["b"] == 4.0


def test_arguments_that_are_no_scalars_stay_out() -> None:
    array = array_of(lambda seed, data: float(data.sum()), range(5), [np.ones(3)] * 5)
    assert list(array.to_dataframe().columns) == ["seed", "value"]


def test_argument_does_not_hide_a_value() -> None:
    array = array_of(lambda seed: {"seed": -seed}, range(5))
    assert array.to_dataframe().compute()["seed"].tolist() == [0, -1, -2, -3, -4]


def test_script_array(tmp_path: Path) -> None:
    script = tmp_path / "s.sh"
    script.write_text("exit 0\n")
    array = hy.submit_script(script, pool="local", array=range(5, 9))
    assert isinstance(array, hy.ArrayJob)
    computed = array.to_dataframe().compute()
    assert computed["index"].tolist() == [5, 6, 7, 8]
    assert computed["value"].tolist() == [0] * 4
    tasks = [(number, {"lr": rate}) for number, rate in enumerate([0.1, 0.2])]
    array = executor.run_script(b"exit 0", tasks, pool=get_pool("local"))
    assert array.to_dataframe().compute()["lr"].tolist() == [0.1, 0.2]


def cells(source: str, seeds: range, out: list[str] | None = None) -> hy.ArrayJob:
    captured = capture.collect(source, {}, inputs=None, outputs=out, extra_names=["seed"])
    run = launch.launch(
        get_pool("local"),
        kind="cell",
        name="cell",
        payload=captured.frames,
        items=[frames.encode({"seed": seed}) for seed in seeds],
        resources=hy.Resources(),
        batch=5,
        out=captured.out,
    )
    return hy.ArrayJob(run).wait(120)


def test_cells_with_one_name() -> None:
    array = cells("noise = seed / 4\nscore = 2 * noise", range(12), ["score"])
    expected = [seed / 2 for seed in range(12)]
    assert array.to_bag().compute() == expected == list(dask.compute(*array.to_delayed()))
    assert array.to_dask_array().compute().tolist() == expected
    assert array.reduce(max) == 5.5
    computed = array.to_dataframe().compute()
    assert computed.columns.tolist() == ["seed", "score"]
    assert computed["seed"].tolist() == list(range(12))
    assert computed["score"].tolist() == expected


def test_cells_with_several_names() -> None:
    array = cells("a = seed + 1\nb = str(seed)", range(12))
    assert array.to_bag().compute()[3] == {"a": 4, "b": "3"}
    computed = array.to_dataframe().compute()
    assert computed.columns.tolist() == ["seed", "a", "b"]
    assert computed["b"].tolist() == [str(seed) for seed in range(12)]


# --- array ------------------------------------------------------------------------------------------------------------


def test_stacked_arrays(anywhere: str) -> None:
    array = array_of(lambda i: np.full((3, 4), i, "float32"), range(20))
    stacked = array.to_dask_array()
    assert isinstance(stacked, dask.array.Array)
    assert stacked.shape == (20, 3, 4)
    assert stacked.dtype == np.float32
    assert stacked.sum(axis=(1, 2)).compute().tolist() == [12.0 * i for i in range(20)]


def test_large_arrays_are_not_copied() -> None:
    array = array_of(lambda i: np.full(3 << 20, i, "float64"), range(2), batch=2)
    stacked = array.to_dask_array()
    assert stacked.chunks[0] == (1, 1)

    def mapped(chunk: np.ndarray) -> np.ndarray:
        address = chunk.ctypes.data
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        files = [line[0].split("-") for line in maps if line[-1].endswith((".bin", ".part"))]
        return np.array([[any(int(low, 16) <= address < int(high, 16) for low, high in files)]])

    assert stacked.map_blocks(mapped, dtype=bool, chunks=(1, 1), meta=np.empty((0, 0), bool)).compute().all()


def test_unequal_shapes() -> None:
    array = array_of(lambda i: np.zeros(3 if i < 30 else 4), range(40))
    with pytest.raises(hy.HybridError, match=r"task 3\d of job \w+ has an array of float64, shape \(4,\)"):
        array.to_dask_array().compute()


def test_texts_and_times() -> None:
    array = array_of(lambda i: "x" * i, range(20))
    assert array.to_dask_array().compute().tolist() == ["x" * i for i in range(20)]
    array = array_of(lambda i: np.datetime64("2024-01-01") + i, range(20))
    assert array.to_dask_array().max().compute() == np.datetime64("2024-01-20")


# --- reduce -----------------------------------------------------------------------------------------------------------


def test_reduce_keeps_the_order(anywhere: str) -> None:
    array = array_of(lambda i: [i], range(100), batch="auto")
    assert array.reduce(operator.add) == list(range(100))
    assert array.reduce(operator.add, initial=["first"]) == ["first", *range(100)]
    assert array_of(str, range(30), batch=1).reduce(operator.add) == "".join(map(str, range(30)))


def test_reduce_deep_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    array = array_of(lambda i: (i,), range(600), batch=50)
    monkeypatch.setattr(aggregate, "_cores", lambda: 150)
    assert array.to_bag().npartitions == 600  # four levels
    assert array.reduce(operator.add) == tuple(range(600))


# --- failures ---------------------------------------------------------------------------------------------------------


def test_failed_tasks_raise(anywhere: str) -> None:
    array = array_of(picky, range(40))
    with pytest.raises(ValueError, match="seed 3 is bad") as raised:
        array.to_delayed()[3].compute()
    if anywhere == "threads":
        assert isinstance(raised.value.__cause__, RemoteError)
        assert "in picky" in str(raised.value.__cause__)
    if sys.version_info >= (3, 11):
        assert raised.value.__notes__ == [f"in task 3 of job {array.id} with arguments (3,)"]
    for compute in (
        lambda: array.to_bag().compute(),
        lambda: array.to_dataframe().compute(),
        lambda: array.to_dask_array().compute(),
        lambda: array.reduce(operator.add),
    ):
        with pytest.raises(ValueError, match=r"seed \d+ is bad"):
            compute()
    assert array.to_delayed()[4].compute() == 2.0


def test_failed_tasks_skipped(anywhere: str) -> None:
    array = array_of(picky, range(40))
    good = [seed for seed in range(40) if seed % 5 != 3]
    assert list(dask.compute(*array.to_delayed("skip"))) == [seed / 2 for seed in good]
    assert array.to_bag("skip").compute() == [seed / 2 for seed in good]
    assert array.to_dask_array("skip").compute().tolist() == [seed / 2 for seed in good]
    computed = array.to_dataframe("skip").compute()
    assert computed.index.tolist() == computed["seed"].tolist() == good
    assert array.reduce(operator.add, errors="skip") == sum(good) / 2


def test_lost_tasks() -> None:
    def die(seed: int) -> int:
        import os
        import signal

        if seed == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return seed

    array = array_of(die, range(12), batch=3)
    assert array.to_delayed()[4].compute() == 4
    with pytest.raises(JobFailed, match=r"task 5 of job .* killed by signal 9") as raised:
        array.to_delayed()[5].compute()
    assert raised.value.cause is hy.Cause.INFRASTRUCTURE
    with pytest.raises(JobFailed, match="task 5 of job"):
        array.reduce(operator.add)
    kept = [seed for seed in range(12) if seed != 5]
    assert array.to_bag("skip").compute() == kept
    assert array.to_dask_array("skip").compute().tolist() == kept
    assert array.to_dataframe("skip").compute()["value"].tolist() == kept


def test_nothing_is_left() -> None:
    array = array_of(lambda i: 1 / i, [0, 0, 0])
    assert array.to_delayed("skip") == []
    assert array.to_bag("skip").compute() == []
    assert array.reduce(max, initial=7, errors="skip") == 7
    with pytest.raises(TypeError, match="needs initial="):
        array.reduce(max, errors="skip")
    for build in (array.to_dataframe, array.to_dask_array):
        with pytest.raises(hy.HybridError, match="no task of job"):
            build("skip")
        with pytest.raises(ZeroDivisionError):
            build()


def test_unknown_errors_option() -> None:
    array = array_of(double, range(2))
    with pytest.raises(ValueError, match="errors='ignore' is neither 'raise' nor 'skip'"):
        array.to_bag("ignore")


def test_exit_of_a_task_does_not_end_the_notebook() -> None:
    def leave(seed: int) -> None:
        raise SystemExit(3)

    array = array_of(leave, range(2))
    with pytest.raises(JobFailed, match="SystemExit: 3"):
        array.to_bag().compute()


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(array: hy.ArrayJob, task: int) -> None:
    result = array.run.progress.results[task]
    with open(array.run.progress.result_path(result), "r+b") as file:
        file.seek(result.entry.offset + result.entry.length - 9)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def test_flipped_bit_is_found(anywhere: str) -> None:
    array = array_of(double, range(40), batch=20)
    built = array.to_bag()
    flip(array, 23)
    with pytest.raises(ResultLost, match=r"the result of task 23 of job \w+ is lost"):
        built.compute()
    for compute in (
        array.to_delayed()[23].compute,
        lambda: array.to_dataframe().compute(),
        lambda: array.to_dask_array("skip").compute(),
        lambda: array.reduce(operator.add),
    ):
        with pytest.raises(ResultLost, match="task 23"):
            compute()
    kept = [2 * seed for seed in range(40) if seed != 23]
    assert array.to_bag("skip").compute() == kept
    assert array.to_dataframe("skip").compute()["value"].tolist() == kept
    assert array.reduce(operator.add, errors="skip") == sum(kept)
    array.retry().wait(120)
    assert array.to_bag().compute() == [2 * seed for seed in range(40)]


def test_first_result_damaged() -> None:
    array = array_of(double, range(40), batch=20)
    flip(array, 0)
    with pytest.raises(ResultLost, match="task 0"):
        array.to_dataframe().compute()
    assert array.to_dataframe("skip").compute()["value"].tolist() == [2 * seed for seed in range(1, 40)]


def test_missing_and_cut_files() -> None:
    array = array_of(double, range(30), batch=10)
    paths = [array.run.progress.result_path(array.run.progress.results[task]) for task in (0, 10)]
    Path(paths[0]).unlink()
    data = Path(paths[1]).read_bytes()
    entry = array.run.progress.results[14].entry
    Path(paths[1]).write_bytes(data[: entry.offset + 20])
    with pytest.raises(ResultLost, match=r"task 0 of .* does not exist"):
        array.to_delayed()[0].compute()
    with pytest.raises(ResultLost, match=r"task 14 of .* ends at byte"):
        array.to_delayed()[14].compute()
    # Of the cut file only what was cut off is lost.
    assert array.to_bag("skip").compute() == [2 * seed for seed in (*range(10, 14), *range(20, 30))]


# --- live cluster -----------------------------------------------------------------------------------------------------


def test_local_cluster() -> None:
    array = array_of(double, range(20))
    with hy.dask_cluster("local", jobs=1, cpus=2, memory="500M") as cluster, cluster.get_client() as client:
        assert list(client.nthreads().values()) == [2]
        assert client.scheduler_info()["address"].startswith("tcp://127.0.0.1:")
        assert array.to_bag().map(where).map(operator.itemgetter(0)).distinct().compute() == list(
            client.run(lambda: __import__("os").getpid()).values()
        )


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(hy.HybridError, match=r"pip install jupyter_hybrid\[cluster\]"):
        hy.dask_cluster("local")


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="jobs=0"):
        hy.dask_cluster("local", jobs=0)
    with pytest.raises(hy.HybridError, match="unknown resource 'cpu'; did you mean 'cpus'"):
        hy.dask_cluster("local", cpu=2)
