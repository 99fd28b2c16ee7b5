"""Loading and writing results, as ratios to numpy's and pickle's own ways; run as a script for a table."""

from __future__ import annotations

import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.frames import PAYLOAD, VALUE, Reader, encode, write_file

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

Row = tuple[str, float, float]
"""What was measured, seconds (median) and the median ratio to its floor."""


def interleaved(floor: Callable[[], Any], ours: dict[str, Callable[[], Any]], rounds: int, name: str) -> list[Row]:
    """Time the floor and its contenders in turn, after one round that does not count."""
    contenders = {name: floor, **ours}
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for round_ in range(rounds + 1):
        for key, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_:
                seconds[key].append(time.perf_counter() - start)
    return [
        (key, statistics.median(taken), statistics.median(a / b for a, b in zip(taken, seconds[name], strict=True)))
        for key, taken in seconds.items()
    ]


def large_arrays(folder: Path, rounds: int = 11, count: int = 100, megabytes: int = 10) -> list[Row]:
    """Load the results of an array that ran on the local pool and sum each, against `np.load(mmap_mode="r")`."""

    def make(seed: int) -> Any:
        import numpy as np

        return np.random.default_rng(seed).random(megabytes * 125_000)

    npys = [folder / f"{seed}.npy" for seed in range(count)]
    for seed, path in enumerate(npys):
        np.save(path, make(seed))
    arrays = {batch: hy.Executor("local").array(make, range(count), batch=batch) for batch in ("auto", 1)}

    def floor() -> None:
        for path in npys:
            np.load(path, mmap_mode="r").sum()

    def all_results(array: hy.ArrayJob) -> None:
        for each in array.results():
            each.sum()

    def one_by_one(array: hy.ArrayJob) -> None:
        for task in array:
            task.result().sum()

    def by_dask(array: hy.ArrayJob) -> None:
        array.to_dask_array().sum().compute()

    ours: dict[str, Callable[[], Any]] = {}
    for batch, array in arrays.items():
        array.wait(600)
        ours[f"  arr.results(), batch={batch!r}"] = partial(all_results, array)
        ours[f"  arr[i].result(), batch={batch!r}"] = partial(one_by_one, array)
        ours[f"  arr.to_dask_array().sum(), batch={batch!r}"] = partial(by_dask, array)
    return interleaved(floor, ours, rounds, 'np.load(mmap_mode="r") and sum, one by one')


def small_results(folder: Path, rounds: int = 15, count: int = 10_000, files: int = 32) -> list[Row]:
    """Load many small results, against `pickle.load` in a loop over one file."""

    def each_load_all(paths: list[Path]) -> list[Any]:
        return [Reader(path).load_all() for path in paths]

    rows = []
    kinds: dict[str, Callable[[int], Any]] = {
        "a float": lambda i: i / 7,
        "a dict of two floats": lambda i: {"score": i / 7, "loss": -i / 3},
    }
    for words, make in kinds.items():
        with (folder / "floor.pickle").open("wb") as file:
            for i in range(count):
                pickle.dump(make(i), file, 5)
        write_file(folder / "one.bin", [(i, VALUE, encode(make(i))) for i in range(count)])
        parts = [folder / f"part{n}.bin" for n in range(files)]
        for n, path in enumerate(parts):
            write_file(path, [(i, VALUE, encode(make(i))) for i in range(n, count, files)])

        def floor() -> list[Any]:
            with (folder / "floor.pickle").open("rb") as file:
                return [pickle.load(file) for _ in range(count)]

        rows += interleaved(
            floor,
            {
                "  Reader(path).load_all()": lambda: Reader(folder / "one.bin").load_all(),
                f"  Reader(path).load_all(), {files} files": partial(each_load_all, parts),
            },
            rounds,
            f"pickle.load of {count:,} times {words}, one file",
        )
    return rows


def items(folder: Path, rounds: int = 7, count: int = 10_000) -> list[Row]:
    """Encode and write the arguments of many tasks, fsync included, against `pickle.dump` and fsync."""

    def floor() -> None:
        with (folder / "floor.pickle").open("wb") as file:
            for i in range(count):
                pickle.dump(((i, "seed"), {"rate": 0.1}), file, 5)
            file.flush()
            os.fsync(file.fileno())

    def ours() -> None:
        records = ((i, PAYLOAD, encode(((i, "seed"), {"rate": 0.1}))) for i in range(count))
        write_file(folder / "items.bin", records)

    return interleaved(floor, {"  encode and write_file": ours}, rounds, f"pickle.dump of {count:,} items, fsync")


def test_large_results_load_nearly_as_fast_as_mapped_arrays(table: Any, tmp_path: Path) -> None:
    # The aim is 1.1. A checksum is a second look at every byte, taken by all cores: what it costs beyond that depends
    # on how busy they are.
    for what, seconds, ratio in large_arrays(tmp_path):
        note = f"{1000 * seconds:.0f} ms; the aim is 1.1"
        if what.startswith("  arr.results()"):
            table.hold(f"100 results of 10 MB, summed:{what[1:]} / np.load(mmap)", ratio, 1.75, note=note)
        elif what.startswith("  "):
            table.show("100 results of 10 MB, summed:" + what[1:], ratio, note=note)


def test_small_results_load_as_fast_as_one_pickle(table: Any, tmp_path: Path) -> None:
    for what, seconds, ratio in small_results(tmp_path):
        if what.startswith("  "):
            table.hold("10,000 small results:" + what[1:], ratio, 1.5, note=f"{1000 * seconds:.0f} ms")


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="bench-frames-", dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        os.environ["JUPYTER_HYBRID_HOME"] = os.path.join(folder, "home")
        rows = [*small_results(Path(folder)), *items(Path(folder)), *large_arrays(Path(folder))]
    print(f"{'':62} {'ms':>8} {'ratio':>6}")
    for name, seconds, ratio in rows:
        print(f"{name:62} {seconds * 1e3:8.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
