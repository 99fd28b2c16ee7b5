"""The program on the node, started as a scheduler starts it: restarts, double submissions, signals, bad tasks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_hybrid import frames, launch
from jupyter_hybrid.pool import get_pool
from jupyter_hybrid.progress import DONE, FAILED, WAITING, Progress
from jupyter_hybrid.spec import Resources
from jupyter_hybrid.storage import Attempt, RunFolder
from jupyter_hybrid.worker import shares

DEADLINE = 60.0


def prepare(
    function: Callable[..., Any],
    items: list[tuple[Any, ...]],
    *,
    batches: int = 1,
    pull: bool = False,
    resources: Resources | None = None,
) -> RunFolder:
    """Make a run folder as launch() does, submitted to nobody."""
    pool, asked = get_pool("local"), resources or Resources()
    spec = launch.make_spec(
        pool, kind="function", name="test", tasks=len(items), array=True, resources=asked, batch=0 if pull else 1
    )
    size = -(-len(items) // batches)
    attempt = Attempt(1, 0, batches, 0 if pull else size, pull, ((0, len(items)),), asked, (batches,))
    with pool.storage.create(spec) as folder:
        frames.write_file(folder / "payload.bin", [(0, frames.PAYLOAD, frames.encode((function, (), {})))])
        encoded = [(task, frames.VALUE, frames.encode(item)) for task, item in enumerate(items)]
        frames.write_file(folder / "items.bin", encoded)
        folder.write("attempt-1.json", json.dumps(attempt.to_json()).encode())
    return folder


def start(folder: RunFolder, batch: int = 0, native: str = "1", python: str = sys.executable) -> subprocess.Popen[str]:
    worker = get_pool("local").storage.worker / "batch.py"
    with open(folder / "logs" / f"{batch}.out", "ab") as log:
        return subprocess.Popen(
            [python, str(worker), str(folder.path), "1", str(batch)],
            env={**os.environ, "HYBRID_NATIVE_ID": native},
            stdout=log,
            stderr=log,
            text=True,
        )


def run(folder: RunFolder, batch: int = 0, native: str = "1", python: str = sys.executable) -> int:
    return start(folder, batch, native, python).wait(DEADLINE)


def progress_of(folder: RunFolder) -> Progress:
    progress = Progress(folder)
    progress.refresh()
    return progress


def log_of(folder: RunFolder, batch: int = 0) -> bytes:
    return (folder / "logs" / f"{batch}.out").read_bytes()


def until(reached: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    path = tmp_path / "marks"
    path.touch()
    return path


def marking(marks: Path) -> Callable[[int], int]:
    """Return a function that notes each run of a task, and holds at task 3 until the file `go` is there."""
    where = str(marks)

    def task(number: int) -> int:
        import os
        import time

        with open(where, "ab", buffering=0) as file:
            file.write(b"%d\n" % number)
        while number == 3 and not os.path.exists(where + ".go"):
            time.sleep(0.005)
        return number * number

    return task


def ran(marks: Path) -> Counter[int]:
    return Counter(int(line) for line in marks.read_text().split())


def go(marks: Path) -> None:
    Path(f"{marks}.go").touch()


def test_results_and_status(marks: Path) -> None:
    go(marks)
    folder = prepare(marking(marks), [(i,) for i in range(6)])
    assert run(folder) == 0
    progress = progress_of(folder)
    assert progress.complete
    assert [progress.load(i) for i in range(6)] == [0, 1, 4, 9, 16, 25]
    assert progress.batches[0].why == "done"
    assert progress.batches[0].peak_memory is not None
    assert not (folder / "results" / "0.part").exists()


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_restart_goes_on(marks: Path, number: signal.Signals, pull: bool) -> None:
    folder = prepare(marking(marks), [(i,) for i in range(8)], pull=pull)
    worker = start(folder)
    until(lambda: ran(marks)[3])
    worker.send_signal(number)
    assert worker.wait(DEADLINE) == (-9 if number is signal.SIGKILL else 143)
    before = progress_of(folder)
    assert before.marks == bytes([DONE] * 3 + [before.marks[3]] + [WAITING] * 4)
    go(marks)
    assert run(folder) == 0
    assert ran(marks) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1, 7: 1}
    for progress in (progress_of(folder), before):  # also for one who has looked all the time
        progress.refresh()
        assert progress.complete
        assert [progress.load(i) for i in range(8)] == [i * i for i in range(8)]
        assert progress.batches[0].why == "done"


def test_restart_after_the_end_runs_nothing_and_says_so(marks: Path) -> None:
    def task(number: int) -> int:
        with open(path, "a") as file:
            file.write(f"{number}\n")
        return 1 // number

    path = str(marks)
    folder = prepare(task, [(0,), (1,), (2,)])
    assert run(folder) == 1
    status = folder / "status" / "0.jsonl"
    status.write_bytes(status.read_bytes().rpartition(b'{"e":"end"')[0])  # killed before it could say so
    assert progress_of(folder).batches[0].why == ""
    assert run(folder) == 1, "who waits for this array with afterok must not start"
    progress = progress_of(folder)
    assert progress.batches[0].why == "done"
    assert progress.marks == bytes([FAILED, DONE, DONE])
    assert ran(marks) == {0: 1, 1: 1, 2: 1}
    assert [progress.load(1), progress.load(2)] == [1, 0]


def test_restart_with_torn_status_and_result(marks: Path) -> None:
    go(marks)
    folder = prepare(marking(marks), [(i,) for i in range(6)])
    worker = start(folder)
    assert worker.wait(DEADLINE) == 0
    part, status = folder / "results" / "0.part", folder / "status" / "0.jsonl"
    entries = progress_of(folder).results
    os.rename(folder / "results" / "0.bin", part)
    os.truncate(part, entries[4].entry.offset + 10)  # the node crashed: the fifth result is cut
    data = status.read_bytes()
    status.write_bytes(data[: data.index(b'"task":4') + 5])
    assert run(folder) == 0
    progress = progress_of(folder)
    assert [progress.load(i) for i in range(6)] == [0, 1, 4, 9, 16, 25]
    assert ran(marks) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2}


def test_second_submission_does_nothing(marks: Path) -> None:
    folder = prepare(marking(marks), [(i,) for i in range(5)])
    first = start(folder, native="100")
    until(lambda: ran(marks)[3])
    assert run(folder, native="101") == 0
    assert b"another submission" in log_of(folder)
    go(marks)
    assert first.wait(DEADLINE) == 0
    assert run(folder, native="101") == 0
    assert ran(marks) == dict.fromkeys(range(5), 1)


def test_several_submissions_at_once(marks: Path) -> None:
    go(marks)
    folder = prepare(marking(marks), [(i,) for i in range(20)])
    workers = [start(folder, native=native) for native in ("", "7", "8", "9")]
    assert [worker.wait(DEADLINE) for worker in workers] == [0, 0, 0, 0]
    assert ran(marks) == dict.fromkeys(range(20), 1)


@given(st.integers(0, 5000), st.integers(1, 1000))
def test_shares_cover_all_once(count: int, batches: int) -> None:
    found = list(shares(count, batches))
    assert [task for start, stop in found for task in range(start, stop)] == list(range(count))
    assert all(stop > start for start, stop in found)
    assert all(stop - start <= max(1, count // (2 * batches)) for start, stop in found)
    assert len(found) <= 2 * batches * (2 + max(1, count).bit_length())


def test_batches_pull_each_task_once(marks: Path) -> None:
    go(marks)
    folder = prepare(marking(marks), [(i,) for i in range(100)], batches=3, pull=True)
    workers = [start(folder, batch, native="5") for batch in range(3)]
    assert [worker.wait(DEADLINE) for worker in workers] == [0, 0, 0]
    assert ran(marks) == dict.fromkeys(range(100), 1)
    progress = progress_of(folder)
    assert [progress.load(i) for i in range(100)] == [i * i for i in range(100)]
    assert all(progress.batch_of(i) == progress.results[i].batch for i in range(100))


def test_killed_between_claim_and_word(marks: Path) -> None:
    go(marks)
    folder = prepare(marking(marks), [(i,) for i in range(10)], batches=2, pull=True)
    os.symlink("1", folder / "claims" / "1-0")  # batch 1 died here
    assert run(folder, 0) == 0
    assert sum(ran(marks).values()) == 8
    assert run(folder, 1) == 0
    assert ran(marks) == dict.fromkeys(range(10), 1)


def test_a_batch_that_comes_too_late_ends_at_once(marks: Path) -> None:
    go(marks)
    folder = prepare(marking(marks), [(i,) for i in range(50)], batches=2, pull=True)
    assert run(folder, 0) == 0
    (folder / "payload.bin").unlink()  # it has no need of it
    assert run(folder, 1) == 0
    progress = progress_of(folder)
    assert (progress.batches[1].why, progress.batches[1].claims) == ("done", [])
    assert ran(marks) == dict.fromkeys(range(50), 1)


def test_terminated_is_not_a_result_even_if_caught(marks: Path) -> None:
    def task(number: int) -> int:
        import time

        if number == 1:
            open(path + ".there", "w").close()
            try:
                time.sleep(60)
            except BaseException as error:
                raise RuntimeError("wrapped") from error
        return number

    path = str(marks)
    folder = prepare(task, [(i,) for i in range(4)])
    worker = start(folder)
    until(lambda: Path(path + ".there").exists())
    worker.terminate()
    assert worker.wait(DEADLINE) == 143
    progress = progress_of(folder)
    assert progress.batches[0].why == "terminated"
    assert progress.marks[0] == DONE
    assert set(progress.marks[1:]) <= {WAITING, 1}


@pytest.mark.parametrize(("seconds", "warn"), [(1.0, False), (3600.0, True)])
def test_walltime_ends_between_tasks(marks: Path, seconds: float, warn: bool) -> None:
    def task(number: int) -> int:
        import os
        import signal
        import time

        if number == 1:
            if warned:
                os.kill(os.getpid(), signal.SIGUSR2)
            else:
                time.sleep(0.6)
        return number

    warned = warn
    folder = prepare(task, [(i,) for i in range(5)], resources=Resources.parse(time=seconds))
    assert run(folder) == 75
    progress = progress_of(folder)
    assert progress.batches[0].why == "walltime"
    assert progress.marks == bytes([DONE, DONE, WAITING, WAITING, WAITING])
    assert progress.load(1) == 1


def test_short_walltime_runs_short_tasks(marks: Path) -> None:
    go(marks)
    folder = prepare(marking(marks), [(i,) for i in range(6)], resources=Resources.parse(time=4))
    assert run(folder) == 0
    assert progress_of(folder).complete


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.12", "3.13"])
def test_other_python_says_so(marks: Path, version: str) -> None:
    found = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    if not found or version == "{}.{}".format(*sys.version_info):
        pytest.skip(f"there is no other Python {version} here")
    folder = prepare(marking(marks), [(1,)])
    assert run(folder, python=str(found[0])) == 70
    batch = progress_of(folder).batches[0]
    assert batch.why == "infrastructure"
    assert f"the worker's Python is {version}" in batch.error
    assert "python:" in batch.error
    assert not ran(marks)


def bad_tasks() -> Callable[[str], Any]:
    def task(what: str) -> Any:
        import os
        import sys
        import threading

        class Odd(Exception):
            def __init__(self) -> None:
                super().__init__("odd")
                self.lock = threading.Lock()

        class Mute(Exception):
            def __str__(self) -> str:
                raise ValueError("no words")

        if what == "result":
            return threading.Lock()
        if what == "exception":
            raise Odd
        if what == "mute":
            raise Mute
        if what == "exit":
            sys.exit(3)
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "huge":
            raise ValueError("x" * 3_000_000)
        if what == "surrogate":
            raise FileNotFoundError(2, "not there", b"\xff".decode(errors="surrogateescape"))
        if what == "bytes":
            sys.stdout.buffer.write(b"\xff\xfe\n")
            print("\udcff")
        if what == "closes":
            sys.stdout.close()
            sys.stderr.close()
            raise ValueError("closed")
        if what == "closes descriptors":
            os.close(1)
            os.close(2)
        if what == "replaces":
            sys.stdout = sys.stderr = None  # type: ignore[assignment]
            raise ValueError("replaced")
        if what == "changes folder":
            os.chdir("/")
        if what.startswith("forks"):
            child = os.fork()
            if child == 0:
                if what == "forks and exits":
                    sys.exit(5)
                if what == "forks and raises":
                    raise ValueError("in the child")
                if what == "forks and returns":
                    return "from the child"
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("printed by", what)
        return os.getcwd()

    return task


BAD = [
    "result", "exception", "mute", "exit", "interrupt", "huge", "surrogate", "bytes", "closes", "closes descriptors",
    "replaces", "changes folder", "forks and exits", "forks and raises", "forks and returns",
]  # fmt: skip


def test_bad_tasks_do_not_fail_their_mates() -> None:
    items = [name for bad in BAD for name in (bad, "good after " + bad)]
    folder = prepare(bad_tasks(), [(item,) for item in items])
    assert run(folder) == 1
    progress = progress_of(folder)
    assert progress.complete
    assert progress.batches[0].why == "done"
    by_name = {item: number for number, item in enumerate(items)}
    for bad in BAD:
        good = by_name["good after " + bad]
        assert progress.load(good) == os.getcwd(), bad
        span = progress.results[good].log
        assert span is not None, bad
        assert log_of(folder)[slice(*span)] == f"printed by good after {bad}\n".encode()
    errors = {bad: progress.results[by_name[bad]].error for bad in BAD}
    assert "cannot be pickled" in errors["result"]
    assert errors["exception"].endswith("Odd: odd")
    assert "Mute" in errors["mute"]
    assert errors["exit"] == "SystemExit: 3"
    assert errors["interrupt"] == "KeyboardInterrupt"
    assert len(errors["huge"]) == 500
    assert errors["surrogate"].startswith("FileNotFoundError")
    assert errors["bytes"].startswith(("UnicodeEncodeError", "'utf-8'")) or not errors["bytes"]  # by the locale
    assert errors["closes"] == "ValueError: closed"
    assert errors["replaces"] == "ValueError: replaced"
    assert "OSError" in errors["closes descriptors"]
    assert errors["changes folder"] == ""
    assert progress.load(by_name["exception"])[0] is None
    assert progress.load(by_name["changes folder"]) == "/"
    assert [progress.load(by_name[f"forks and {how}"]) for how in ("exits", "raises", "returns")] == [5, 1, 0]
    assert b"ValueError: closed" in log_of(folder)


def deadly(marks: Path) -> Callable[[str], str]:
    """Return a function that notes its run and ends its process in the way that its argument names."""
    where = str(marks)

    def task(how: str) -> str:
        import ctypes
        import os
        import signal
        import threading

        with open(where, "a") as file:
            file.write(how + "\n")
        print("runs", how, flush=True)
        if how == "os._exit(0)":
            os._exit(0)
        if how == "os._exit(130)":
            os._exit(130)
        if how == "abort":
            os.abort()
        if how == "segfault":
            ctypes.string_at(0)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "real-time signal":
            os.kill(os.getpid(), 40)
        if how == "exit of a thread":
            thread = threading.Thread(target=os._exit, args=(4,))
            thread.start()
            threading.Event().wait()
        if how == "term by itself":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "pickle of the result":
            return Deadly()  # type: ignore[return-value]
        return how.upper()

    class Deadly:
        def __reduce__(self) -> str:
            import os

            os._exit(5)

    return task


DEADLY = {
    "os._exit(0)": ("USER_ERROR", "exit status 0"),
    "os._exit(130)": ("USER_ERROR", "exit status 130"),
    "abort": ("USER_ERROR", "signal 6 (SIGABRT)"),
    "segfault": ("USER_ERROR", "signal 11 (SIGSEGV)"),
    "kill": ("INFRASTRUCTURE", "signal 9 (SIGKILL)"),
    "real-time signal": ("INFRASTRUCTURE", "signal 40"),
    "exit of a thread": ("USER_ERROR", "exit status 4"),
    "term by itself": ("INFRASTRUCTURE", "signal 15 (SIGTERM)"),
    "pickle of the result": ("USER_ERROR", "exit status 5"),
}


@pytest.mark.parametrize("pull", [False, True])
def test_a_task_that_ends_its_process_fails_alone(marks: Path, pull: bool) -> None:
    items = [name for how in DEADLY for name in (how, "good after " + how)]
    folder = prepare(deadly(marks), [(item,) for item in items], pull=pull)
    assert run(folder) == 1
    progress = progress_of(folder)
    assert progress.complete
    assert Counter(marks.read_text().splitlines()) == dict.fromkeys(items, 1)
    for number, item in enumerate(items):
        result = progress.results[number]
        if item in DEADLY:
            cause, words = DEADLY[item]
            assert (str(result.death), str(result.cause)) == (cause, cause), item
            assert words in result.error, item
            assert words in progress.load(number)[1], item
        else:
            assert progress.load(number) == item.upper()
            assert result.cause is None
        assert result.log is not None
        assert log_of(folder)[slice(*result.log)].startswith(f"runs {item}\n".encode())
    crash = progress.results[items.index("segfault")].log
    assert crash is not None
    assert b"in string_at" in log_of(folder)[slice(*crash)]
    batch = progress.batches[0]
    assert (batch.why, batch.starts) == ("done", 1)
    assert run(folder) == 1, "started anew after its end, it runs nothing"
    assert Counter(marks.read_text().splitlines()) == dict.fromkeys(items, 1)


def test_what_dead_tasks_used_is_counted() -> None:
    def task(number: int) -> None:
        import os
        import time

        if number == 1:
            data = bytearray(200 << 20)
            data[::4096] = bytes(len(data) // 4096)
            while time.process_time() < 1:
                pass
            os._exit(1)

    folder = prepare(task, [(i,) for i in range(3)])
    assert run(folder) == 1
    batch = progress_of(folder).batches[0]
    assert batch.cpu_seconds is not None
    assert batch.cpu_seconds >= 1
    assert batch.peak_memory is not None
    assert batch.peak_memory > 200 << 20


def test_death_outside_a_task_is_that_of_the_batch(marks: Path) -> None:
    class Deadly:
        def __reduce__(self) -> Any:
            import os

            return os._exit, (9,)

    deadly = Deadly()
    folder = prepare(lambda number: (number, deadly), [(1,), (2,), (3,)])
    assert run(folder) == 9
    assert progress_of(folder).marks == bytes([WAITING] * 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_worker(marks: Path, number: signal.Signals) -> None:
    def task(value: int) -> None:
        import os
        import signal
        import threading

        signal.signal(signal.SIGIO, signal.SIG_IGN)
        with open(where + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(where + ".new", where + ".pid")
        while True:
            threading.Event().wait(60)

    where = str(marks)
    folder = prepare(task, [(i,) for i in range(3)])
    worker = start(folder)
    until(Path(where + ".pid").exists)
    child = int(Path(where + ".pid").read_text())
    assert child != worker.pid
    worker.send_signal(number)
    assert worker.wait(DEADLINE) == (143 if number is signal.SIGTERM else -9)
    until(lambda: not alive(child))
    assert progress_of(folder).marks[1:] == bytes([WAITING] * 2)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_kill_while_it_is_terminated_is_no_result_of_the_task(marks: Path) -> None:
    def task(number: int) -> None:
        import os
        import signal
        import threading

        signal.signal(signal.SIGTERM, lambda *_: open(where + ".told", "w").close())
        with open(where + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(where + ".new", where + ".pid")
        while True:
            threading.Event().wait(60)

    where = str(marks)
    folder = prepare(task, [(i,) for i in range(3)])
    worker = start(folder)
    until(Path(where + ".pid").exists)
    worker.terminate()
    until(Path(where + ".told").exists)
    os.kill(int(Path(where + ".pid").read_text()), signal.SIGKILL)
    assert worker.wait(DEADLINE) == 137
    progress = progress_of(folder)
    assert not progress.results
    assert progress.batches[0].why == ""


def test_a_warning_before_walltime_reaches_the_tasks(marks: Path) -> None:
    def task(number: int) -> int:
        import signal
        import threading

        warned = threading.Event()
        handler: Any = signal.getsignal(signal.SIGUSR2)

        def warn(*arguments: Any) -> None:
            handler(*arguments)
            warned.set()

        if number == 1:
            signal.signal(signal.SIGUSR2, warn)
            open(where + ".there", "w").close()
            while not warned.wait(0.01):
                pass
        return number

    where = str(marks)
    folder = prepare(task, [(i,) for i in range(4)])
    worker = start(folder)
    until(Path(where + ".there").exists)
    worker.send_signal(signal.SIGUSR2)
    assert worker.wait(DEADLINE) == 75
    progress = progress_of(folder)
    assert progress.batches[0].why == "walltime"
    assert progress.marks == bytes([DONE] * 2 + [WAITING] * 2)


def test_notes_are_not_the_error() -> None:
    def task() -> None:
        error = ValueError("the error")
        error.__notes__ = ["a note"]  # type: ignore[attr-defined]
        raise error

    folder = prepare(task, [()])
    assert run(folder) == 1
    assert progress_of(folder).results[0].error == "ValueError: the error"


def test_killed_child_dies_of_the_signal(marks: Path) -> None:
    def task() -> int:
        import os
        import signal
        import time

        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"!")  # Python forgets signals that come before it is back from the fork
            time.sleep(60)
            os._exit(7)
        os.read(reader, 1)
        os.kill(child, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    folder = prepare(task, [()])
    assert run(folder) == 0
    assert progress_of(folder).load(0) == -signal.SIGTERM


def test_damaged_payload() -> None:
    folder = prepare(bad_tasks(), [("x",)])
    data = bytearray((folder / "payload.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "payload.bin").write_bytes(data)
    assert run(folder) == 70
    batch = progress_of(folder).batches[0]
    assert batch.why == "infrastructure"
    assert "payload.bin" in batch.error
    assert "altered" in batch.error


def test_damaged_argument_fails_its_task_alone() -> None:
    folder = prepare(bad_tasks(), [("a",), ("b",), ("c",)])
    entry = frames.Reader(folder / "items.bin").entries[1]
    data = bytearray((folder / "items.bin").read_bytes())
    data[entry.offset + 50] ^= 1
    (folder / "items.bin").write_bytes(data)
    assert run(folder) == 1
    progress = progress_of(folder)
    assert progress.marks == bytes([DONE, FAILED, DONE])
    problem, line, _ = progress.load(1)
    assert problem is None
    assert "altered" in line
