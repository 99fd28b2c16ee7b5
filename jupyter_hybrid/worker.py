"""The program that runs one batch on a node.

It is copied to the pool's storage with ``frames.py`` and ``cellrun.py`` and started there as
``python <storage>/.worker/<hash>/batch.py <run folder> <attempt> <batch>``. The package need not be installed on the
node, and only the standard library is imported at the start. Syntax of Python 3.8, so that an older Python gets as far
as saying so.

Files it reads: ``spec.json``, ``attempt-<n>.json``, ``payload.bin``, ``items.bin``. Files it writes:

``status/<batch>.owner``
    A symbolic link to nothing that names the submission (its native id) that runs the batch; a second submission of
    the same batch finds it and ends. A link, because it is there with its content or not at all.
``status/<batch>.jsonl``
    One line an event: ``start``, ``claim``, ``run``, ``done``, ``beat``, ``end``.
``results/<batch>.part``, then ``.bin``
    Frames of each task as it ends; renamed when the batch has ended by itself.
``outputs/<batch>.jsonl``
    What a cell displayed, one nbformat output a line.
``claims/<attempt>-<k>``
    Exclusive claim of the k-th share of a pulled array: a link that names the batch.
"""

from __future__ import annotations

import contextlib
import errno
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
FULL = 74  # exit status of a worker that could not write to the storage: EX_IOERR of sysexits.h
MARGIN = 5.0  # most seconds kept free before the walltime; a tenth of it if that is less


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
        self.started, self.begun = time.monotonic(), time.time()
        self.longest = 0.0
        self.stop = ""  # why no further task is started
        self.current: tuple[int, float] | None = None  # task and start of the running one
        self.shown: tuple[int, float] | None = None
        self.failed = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.status_file = -1
        self.torn = ""
        self.outputs_file = -1
        self.writer: Any = None
        self.pid = os.getpid()
        self.streams = {1: sys.stdout, 2: sys.stderr}
        self.kept = {1: os.dup(1), 2: os.dup(2)}
        self.home = os.open(".", os.O_RDONLY)

    def path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)

    def read_json(self, *parts: str) -> Any:
        with open(self.path(*parts)) as file:
            return json.load(file)

    # --- status -------------------------------------------------------------------------------------------------

    def say(self, event: str, **fields: Any) -> None:
        """Append one line to the status file by a single write."""
        line = json.dumps({"e": event, "t": time.time(), **fields}, separators=(",", ":")) + "\n"
        data = memoryview((self.torn + line).encode())
        self.torn = "\n"  # what comes after a line that a full disk has cut short begins a new one
        while data:  # in one piece, unless the disk is full
            data = data[os.write(self.status_file, data) :]
        self.torn = ""

    def own(self) -> bool:
        """Return whether this submission may run the batch: it is the first one, or the same one started anew."""
        path = self.path("status", f"{self.batch}.owner")
        name = self.native or "-"
        try:
            os.symlink(name, path)
        except FileExistsError:
            return os.readlink(path) == name
        return True

    def beat(self) -> None:
        """Write heartbeats until the batch has ended, and bring what is written to the storage."""
        last = time.monotonic()
        while not self.ended.wait(SHOWN_AFTER):
            now = time.monotonic()
            current = self.current
            with self.lock, contextlib.suppress(OSError):  # a full disk may have room again at the next beat
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
            os.symlink(str(self.batch), path)
        except FileExistsError:
            return os.readlink(path) == str(self.batch)
        return True

    def time_left(self) -> float:
        """Return the seconds until no further task is started, by what was asked for or what the scheduler says."""
        limit = self.plan["resources"].get("time")
        end = os.environ.get("SLURM_JOB_END_TIME")
        if limit is None and end is not None and end.isdigit():
            limit = int(end) - self.begun
        return float("inf") if limit is None else limit - min(MARGIN, limit / 10) - (time.monotonic() - self.started)

    def resume(self) -> set[int]:
        """Open the result file, with what an earlier run of this batch left there; return the tasks it has ended."""
        part, finished = self.path("results", f"{self.batch}.part"), self.path("results", f"{self.batch}.bin")
        if os.path.exists(finished):
            os.rename(finished, part)  # killed before it could say so
        self.writer = self.frames.Writer.resume(part)
        said = self.said()
        for entry in self.writer.entries:
            failed = entry.kind != self.frames.VALUE
            self.failed += failed
            if (entry.task, entry.offset) not in said:
                self.say_done(entry, 0.0, "failed before the restart" if failed else "", (0, 0))
        return {entry.task for entry in self.writer.entries}

    def said(self) -> set[tuple[int, int]]:
        """Return task and offset of the ends that the status file tells, and end its last line if it is cut."""
        with open(self.path("status", f"{self.batch}.jsonl"), "rb") as file:
            data = file.read()
        if data and not data.endswith(b"\n"):
            os.write(self.status_file, b"\n")
        found = set()
        for line in data.splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event["e"] == "done":
                    found.add((event["task"], event["o"]))
        return found

    def run(self) -> int:
        """Run the tasks of the batch and return the exit status."""
        done = self.resume()
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
            if why == "terminated":  # a scheduler that starts the batch anew finds what it has done so far
                self.writer.sync()
                self.writer.close()
            else:
                self.writer.finish(self.path("results", f"{self.batch}.bin"))
            self.say("end", why=why, cpu=cpu_seconds(), rss=peak_memory(), failed=self.failed)
            os.fsync(self.status_file)
        return {"done": 1 if self.failed else 0, "walltime": 75, "terminated": 143}[why]

    def run_task(self, task: int, call: Callable[[int, Any], Any], items: Callable[[int], Any]) -> None:
        frames = self.frames
        self.restore()
        start = time.monotonic()
        log_start = self.log_position()
        self.current = (task, start)
        error = ""
        try:
            value = call(task, items(task))
            if os.getpid() != self.pid:
                leave_child(None)
            kind, data = frames.VALUE, self.encode_value(value)
            del value
        except BaseException as problem:  # noqa: BLE001  whatever the user's code raises is its result
            if os.getpid() != self.pid:
                leave_child(problem)
            if isinstance(problem, Terminated) or self.stop == "terminated":
                raise Terminated from None
            kind, (error, data) = frames.ERROR, self.encode_error(problem)
            self.failed += 1
        self.current = None
        flush()
        seconds = time.monotonic() - start
        self.longest = max(self.longest, seconds)
        entry = self.writer.append(task, kind, data)
        with self.lock:
            self.say_done(entry, seconds, error, (log_start, self.log_position()))

    def restore(self) -> None:
        """Undo what an earlier task did to what it shares with the next one: streams and working directory."""
        for number in (1, 2):
            try:
                os.fstat(number)
            except OSError:
                os.dup2(self.kept[number], number)
            if self.streams[number].closed:
                self.streams[number] = os.fdopen(number, "w", 1, "utf-8", "backslashreplace", closefd=False)
        sys.stdout, sys.stderr = self.streams[1], self.streams[2]
        os.fchdir(self.home)

    def log_position(self) -> int:
        """Return the size of the log so far, in bytes; 0 if it is no file."""
        flush()
        return os.fstat(self.kept[1]).st_size

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
        lines = traceback.format_exception_only(type(problem), problem)  # notes follow the exception's own line
        line = lines[-1 if isinstance(problem, SyntaxError) else 0].strip()[:500]
        if isinstance(problem, ScriptFailed):
            line = text = str(problem)
        else:
            try:
                sys.stderr.write(text)
            except Exception:  # noqa: BLE001  closed or replaced by the user's code
                os.write(self.kept[2], text.encode(errors="backslashreplace"))
        problem = problem.with_traceback(None)
        try:
            if type(problem).__module__.startswith("hybrid_"):
                raise TypeError("a class that the notebook cannot import")
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
                data = memoryview(line.encode())
                while data:
                    data = data[os.write(self.outputs_file, data) :]

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


def leave_child(problem: BaseException | None) -> None:
    """End a process that the user's code forked and that came back from it, as Python would have ended it."""
    code: Any = 0
    if isinstance(problem, SystemExit):
        code = problem.code or 0
    elif problem is not None:
        code = 1
        with contextlib.suppress(Exception):
            traceback.print_exception(type(problem), problem, own_frames(problem.__traceback__))
    flush()
    os._exit(code if isinstance(code, int) else 1)


def flush() -> None:
    """Bring standard output and standard error to the log."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed or replaced by the user's code
            stream.flush()


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
    if not batch.own():
        sys.stdout.write(f"jupyter_hybrid: batch {batch.batch} is run by another submission; nothing to do\n")
        return 0
    flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
    batch.status_file = os.open(batch.path("status", f"{batch.batch}.jsonl"), flags, 0o600)
    version = "{}.{}".format(*sys.version_info)

    def refuse(message: str, code: int = 70) -> int:
        sys.stderr.write(f"jupyter_hybrid: {message}\n")
        with contextlib.suppress(OSError):  # the exit status says it, too
            batch.say("end", why="infrastructure", err=message)
        return code

    wanted = batch.spec["versions"].get("python", version)
    if batch.spec["kind"] != "script" and ".".join(wanted.split(".")[:2]) != version:
        return refuse(
            f"the worker's Python is {version} ({sys.executable} on {os.uname().nodename}), "
            f"the submitting kernel's is {wanted}: set 'python:' of the pool to a Python of that version"
        )

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != batch.pid:  # a child of the user's code, which dies of it as any process does
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        batch.stop = "terminated"
        raise Terminated

    def warn(number: int, frame: FrameType | None) -> None:
        batch.stop = "walltime"

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGUSR2, warn)
    batch.say("start", host=os.uname().nodename, pid=os.getpid(), python=sys.version.split()[0], native=batch.native)
    try:
        return batch.run()
    except Terminated:
        batch.say("end", why="terminated")
        return 143
    except Exception as problem:  # noqa: BLE001  said to the user, not lost in a log
        traceback.print_exc()
        line = traceback.format_exception_only(type(problem), problem)[-1].strip()
        full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
        return refuse("the worker could not run the batch: " + line, FULL if full else 70)
