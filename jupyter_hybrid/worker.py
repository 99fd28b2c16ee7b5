"""The program that runs one batch on a node.

It is copied to the pool's storage with ``frames.py`` and ``cellrun.py`` and started there as
``python <storage>/.worker/<hash>/batch.py <run folder> <attempt> <batch>``. The package need not be installed on the
node, and only the standard library is imported at the start. Syntax of Python 3.8, so that an older Python gets as far
as saying so.

Files it reads: ``spec.json``, ``attempt-<n>.json``, ``payload.bin``, ``items.bin``. Files it writes:

``status/<batch>.owner``
    Native id of the submission that runs the batch; a second submission of the same batch finds it and ends.
``status/<batch>.jsonl``
    One line an event: ``start``, ``claim``, ``run``, ``done``, ``beat``, ``end``.
``results/<batch>.part``, then ``.bin``
    Frames of each task as it ends; renamed when the batch has ended.
``outputs/<batch>.jsonl``
    What a cell displayed, one nbformat output a line.
``claims/<attempt>-<k>``
    Exclusive claim of the k-th share of a pulled array.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback

TYPE_CHECKING = False  # typing takes as long to import as a small batch takes to run
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType, TracebackType
    from typing import Any

BEAT = 10.0  # seconds between heartbeats
SHOWN_AFTER = 0.2  # seconds after which a task that still runs is written down as running
MARGIN = 5.0  # seconds kept free before the walltime


class Terminated(BaseException):
    """SIGTERM reached the batch."""


class ScriptFailed(Exception):
    """A script ended with a status other than 0."""


def shares(count: int, batches: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the shares into which a pulled array is cut, largest first.

    Guided self-scheduling (Polychronopoulos and Kuck, 1987): each share is half of an equal part of what is left.
    """
    start = 0
    while start < count:
        size = max(1, (count - start) // (2 * batches))
        yield start, start + size
        start += size


def flatten(ranges: Sequence[Sequence[int]]) -> list[int]:
    """Return the task numbers of a list of [start, stop) pairs."""
    return [task for start, stop in ranges for task in range(start, stop)]


class _Batch:
    """One run of one batch: its files, its heart, its tasks."""

    def __init__(self, folder: str, attempt: int, batch: int, frames: Any) -> None:
        self.folder, self.attempt, self.batch, self.frames = folder, attempt, batch, frames
        self.spec = self.read_json("spec.json")
        self.plan = self.read_json(f"attempt-{attempt}.json")
        self.native = os.environ.get("HYBRID_NATIVE_ID", "")
        self.started = time.monotonic()
        self.longest = 0.0
        self.stop = ""  # why no further task is started
        self.current: tuple[int, float] | None = None  # task and start of the running one
        self.shown: tuple[int, float] | None = None
        self.failed = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.status_file = -1
        self.outputs_file = -1
        self.writer: Any = None
        self.restarted = False

    def path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)

    def read_json(self, *parts: str) -> Any:
        with open(self.path(*parts)) as file:
            return json.load(file)

    # --- status -------------------------------------------------------------------------------------------------

    def say(self, event: str, **fields: Any) -> None:
        """Append one line to the status file by a single write."""
        line = json.dumps({"e": event, "t": time.time(), **fields}, separators=(",", ":")) + "\n"
        os.write(self.status_file, line.encode())

    def own(self) -> tuple[bool, bool]:
        """Return whether this submission may run the batch, and whether it has run before."""
        path = self.path("status", f"{self.batch}.owner")
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            with open(path) as file:
                owner = file.read()
            # An owner file without content: its writer died between two system calls; only one restart gets here.
            return owner in (self.native, ""), True
        os.write(descriptor, self.native.encode())
        os.fsync(descriptor)
        os.close(descriptor)
        return True, False

    def beat(self) -> None:
        """Write heartbeats until the batch has ended, and bring what is written to the storage."""
        last = time.monotonic()
        while not self.ended.wait(SHOWN_AFTER):
            now = time.monotonic()
            current = self.current
            with self.lock:
                if self.ended.is_set():
                    return
                if current is not None and current != self.shown and now - current[1] > SHOWN_AFTER:
                    self.shown = current
                    self.say("run", task=current[0])
                if now - last >= BEAT:
                    last = now
                    self.say("beat", rss=peak_memory(), task=None if current is None else current[0])
                    os.fsync(self.status_file)
            with contextlib.suppress(OSError):
                self.writer.sync()

    # --- tasks --------------------------------------------------------------------------------------------------

    def tasks(self, done: set[int]) -> Iterator[int]:
        """Yield the numbers of the tasks that this batch runs, in order."""
        everything = flatten(self.plan["tasks"])
        if not self.plan["pull"]:
            position = self.batch - self.plan["first"]
            size = self.plan["size"]
            mine = everything[position * size : (position + 1) * size]
            for task in mine:
                if task not in done:
                    yield task
            return
        for number, (start, stop) in enumerate(shares(len(everything), self.plan["batches"])):
            if self.stop:
                return
            if self.claim(number):
                self.say("claim", a=start, b=stop)
                for task in everything[start:stop]:
                    if task not in done:
                        yield task

    def claim(self, number: int) -> bool:
        """Return whether a share is this batch's own: claimed now, or by its own earlier run."""
        path = self.path("claims", f"{self.attempt}-{number}")
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            if not self.restarted:
                return False
            with open(path) as file:
                return file.read() == str(self.batch)
        os.write(descriptor, str(self.batch).encode())
        os.close(descriptor)
        return True

    def time_left(self) -> float:
        limit = self.plan["resources"].get("time")
        return float("inf") if limit is None else limit - MARGIN - (time.monotonic() - self.started)

    def run(self, restarted: bool) -> int:
        """Run the tasks of the batch and return the exit status."""
        self.restarted = restarted
        frames, part = self.frames, self.path("results", f"{self.batch}.part")
        done: set[int] = set()
        if restarted and os.path.exists(self.path("results", f"{self.batch}.bin")):
            return 0  # it had ended already
        if restarted and os.path.exists(part):
            self.writer = frames.Writer.resume(part)
            for entry in self.writer.entries:
                done.add(entry.task)
                self.say_done(entry, 0.0, "" if entry.kind == frames.VALUE else "failed before the restart", (0, 0))
        else:
            self.writer = frames.Writer(part)
        threading.Thread(target=self.beat, daemon=True).start()
        why = "done"
        try:
            call, items = self.prepare()
            for task in self.tasks(done):
                if self.stop:
                    why = self.stop
                    break
                if self.longest and self.longest > self.time_left():
                    why = "walltime"
                    break
                self.run_task(task, call, items)
            else:
                why = self.stop or why
        except Terminated:
            why = "terminated"
        with self.lock:
            self.ended.set()
            self.writer.finish(self.path("results", f"{self.batch}.bin"))
            self.say("end", why=why, cpu=cpu_seconds(), rss=peak_memory(), failed=self.failed)
            os.fsync(self.status_file)
        return {"done": 1 if self.failed else 0, "walltime": 75, "terminated": 143}[why]

    def run_task(self, task: int, call: Callable[[int, Any], Any], items: Callable[[int], Any]) -> None:
        frames = self.frames
        start = time.monotonic()
        log_start = log_position()
        self.current = (task, start)
        error = ""
        try:
            value = call(task, items(task))
            kind, data = frames.VALUE, self.encode_value(value)
            del value
        except Terminated:
            raise
        except BaseException as problem:  # noqa: BLE001  whatever the user's code raises is its result
            kind, (error, data) = frames.ERROR, self.encode_error(problem)
            self.failed += 1
        self.current = None
        flush()
        seconds = time.monotonic() - start
        self.longest = max(self.longest, seconds)
        entry = self.writer.append(task, kind, data)
        with self.lock:
            self.say_done(entry, seconds, error, (log_start, log_position()))

    def say_done(self, entry: Any, seconds: float, error: str, log: tuple[int, int]) -> None:
        fields = {"task": entry.task, "o": entry.offset, "l": entry.length, "c": entry.checksum, "s": round(seconds, 6)}
        if error:
            fields["err"] = error
        if log[1] != log[0]:
            fields["log"] = log
        self.say("done", **fields)

    def encode_value(self, value: Any) -> list[Any]:
        try:
            data: list[Any] = self.frames.encode(value)
            return data
        except Exception as problem:
            kind = type(value).__module__ + "." + type(value).__qualname__
            message = f"the result, a {kind}, cannot be pickled: {problem}"
            raise TypeError(message) from problem

    def encode_error(self, problem: BaseException) -> tuple[str, list[Any]]:
        """Return the first line of an exception and its frames: the exception itself, its text and traceback."""
        text = "".join(traceback.format_exception(type(problem), problem, own_frames(problem.__traceback__)))
        line = traceback.format_exception_only(type(problem), problem)[-1].strip()[:500]
        if not isinstance(problem, ScriptFailed):
            sys.stderr.write(text)
        problem = problem.with_traceback(None)
        try:
            data = self.frames.encode((problem, line, text))
            self.frames.decode([bytes(frame) for frame in data])
        except Exception:  # noqa: BLE001  an exception that does not pickle travels as text
            data = self.frames.encode((None, line, text))
        return line, data

    # --- payloads -----------------------------------------------------------------------------------------------

    def prepare(self) -> tuple[Callable[[int, Any], Any], Callable[[int], Any]]:
        """Return the callable of (task, item) and the reader of items."""
        frames = self.frames
        directory = self.spec["settings"].get("directory") or self.folder
        if directory not in sys.path:
            sys.path.insert(0, directory)
        if self.spec["kind"] == "script":
            call: Callable[[int, Any], Any] = self.call_script
        else:
            call = self.cell_caller() if self.spec["kind"] == "cell" else self.function_caller()
        path = self.path("items.bin")
        if not os.path.exists(path):
            return call, lambda task: ()
        reader = frames.Reader(path)
        return call, reader.load

    def function_caller(self) -> Callable[[int, Any], Any]:
        function, arguments, keywords = self.frames.Reader(self.path("payload.bin")).load(0)

        def call(task: int, item: Any) -> Any:
            return function(*arguments, *item, **keywords)

        return call

    def cell_caller(self) -> Callable[[int, Any], Any]:
        import hybrid_cellrun

        hybrid_cellrun.start()  # before the payload: functions with magics look the shell up when they are loaded
        payload = self.frames.Reader(self.path("payload.bin"))
        flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
        self.outputs_file = os.open(self.path("outputs", f"{self.batch}.jsonl"), flags, 0o600)

        def call(task: int, item: Any) -> Any:
            def emit(output: dict[str, Any]) -> None:
                line = json.dumps({"task": task, "t": time.time(), "output": output}) + "\n"
                os.write(self.outputs_file, line.encode())

            # Loaded anew for each task: what one changes in its inputs, the next must not see.
            return hybrid_cellrun.run_cell(payload.load(0), item or {}, emit)

        return call

    def call_script(self, task: int, item: Any) -> int:
        import subprocess

        environment = dict(os.environ)
        index, variables = item or (0, {})
        environment.update({name: str(value) for name, value in variables.items()})
        environment["HYBRID_ARRAY_INDEX"] = str(index)
        if self.spec["array"]:
            for name in ("SLURM_ARRAY_TASK_ID", "PBS_ARRAY_INDEX", "PBS_ARRAYID"):
                environment[name] = str(index)
        flush()
        command = [self.path("payload.sh"), *self.spec["settings"].get("arguments", ())]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        try:
            code = process.wait()
        except Terminated:
            process.terminate()
            process.wait()
            raise
        if code != 0:
            ended = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
            raise ScriptFailed("the script " + ended)
        return code


def flush() -> None:
    """Bring standard output and standard error to the log."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def log_position() -> int:
    """Return the size of the log so far, in bytes."""
    flush()
    try:
        return os.fstat(1).st_size
    except OSError:
        return 0


def own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this program."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def peak_memory() -> int:
    """Return the largest resident size of this process and its ended children, in bytes."""
    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def cpu_seconds() -> float:
    """Return the cpu time of this process and its ended children."""
    return round(sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)), 3)


def main(argv: list[str]) -> int:
    """Run one batch; return the exit status of the process."""
    import hybrid_frames

    # The worker's own folder comes last: it must not shadow the user's modules.
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry != own] + [own]
    batch = _Batch(argv[0], int(argv[1]), int(argv[2]), hybrid_frames)
    mine, restarted = batch.own()
    if not mine:
        sys.stdout.write(f"jupyter_hybrid: batch {batch.batch} is run by another submission; nothing to do\n")
        return 0
    flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
    batch.status_file = os.open(batch.path("status", f"{batch.batch}.jsonl"), flags, 0o600)
    version = "{}.{}".format(*sys.version_info)

    def refuse(message: str) -> int:
        sys.stderr.write(f"jupyter_hybrid: {message}\n")
        batch.say("end", why="infrastructure", err=message)
        return 70

    wanted = batch.spec["versions"].get("python", version)
    if batch.spec["kind"] != "script" and ".".join(wanted.split(".")[:2]) != version:
        return refuse(
            f"the worker's Python is {version} ({sys.executable} on {os.uname().nodename}), "
            f"the submitting kernel's is {wanted}: set 'python:' of the pool to a Python of that version"
        )

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    def warn(number: int, frame: FrameType | None) -> None:
        batch.stop = "walltime"

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGUSR2, warn)
    batch.say("start", host=os.uname().nodename, pid=os.getpid(), python=sys.version.split()[0], native=batch.native)
    try:
        return batch.run(restarted)
    except Terminated:
        batch.say("end", why="terminated")
        return 143
    except Exception as problem:  # noqa: BLE001  said to the user, not lost in a log
        traceback.print_exc()
        line = traceback.format_exception_only(type(problem), problem)[-1].strip()
        return refuse("the worker could not run the batch: " + line)
