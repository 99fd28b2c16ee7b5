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
``claims/<attempt>-all``
    All shares are claimed: the job script does not start this program any more.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import json
import os
import resource
import signal
import struct
import sys
import threading
import time

TYPE_CHECKING = False  # typing takes as long to import as a small batch takes to run
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType, TracebackType
    from typing import Any

BEAT = 10.0  # seconds between heartbeats
SHOWN_AFTER = 0.2  # seconds after which a task that still runs is written down as running
FULL = 74  # exit status of a worker that could not write to the storage: EX_IOERR of sysexits.h
MARGIN = 5.0  # most seconds kept free before the walltime; a tenth of it if that is less
CRASHES = (signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)  # what code does to itself
FORWARDED = (signal.SIGTERM, signal.SIGUSR2)
RUNNING = struct.Struct("<?qqd")  # whether a task runs; which; where its part of the log begins; when it began


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
    """One run of one batch: its files, its heart, its tasks.

    A batch of several tasks is run by a child of the worker's process, which waits for it: a task that ends the child
    (a crash, ``os._exit``, the kernel that wants memory) fails alone, and another child goes on with the next one.
    """

    def __init__(self, folder: str, attempt: int, batch: int) -> None:
        self.folder, self.attempt, self.batch = folder, attempt, batch
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
        self.frames: Any = None  # hybrid_frames
        self.writer: Any = None
        self.pid = os.getpid()
        self.watching = False  # whether this process only waits for the one that runs the tasks, `child`
        self.child = 0
        self.running: Any = bytearray(RUNNING.size)
        self.death: tuple[int, float, str, str, int] | None = None  # the task that ended the last child: see bury
        self.spent = (0.0, 0)  # cpu time so far, and peak memory of the children that have died
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

    # --- processes ----------------------------------------------------------------------------------------------

    def nothing_left(self) -> bool:
        """Return whether this is a batch of a pulled array that comes when others have claimed all shares."""
        if not self.plan["pull"]:
            return False
        count = sum(stop - start for start, stop in self.plan["tasks"])
        number = sum(1 for _ in shares(count, self.plan["batches"]))
        try:  # the last one first: shares are claimed in order
            owners = (os.readlink(self.path("claims", f"{self.attempt}-{k}")) for k in reversed(range(number)))
            return str(self.batch) not in owners
        except FileNotFoundError:
            return False

    def several(self) -> bool:
        """Return whether this batch runs the user's code for more than one task in the process of the worker."""
        count = sum(stop - start for start, stop in self.plan["tasks"])
        if not self.plan["pull"]:
            count = min(self.plan["size"], count - (self.batch - self.plan["first"]) * self.plan["size"])
        return bool(count > 1 and self.spec["kind"] != "script")

    def watch(self) -> int | None:
        """Have a child run the batch, and another one go on after a task that has ended its process.

        Returns
        -------
        int or None
            The exit status of the batch, or ``None`` in the child.
        """
        import mmap

        self.watching, self.running = True, mmap.mmap(-1, RUNNING.size)
        while True:
            self.spent = cpu_seconds(), peak_memory() if self.death else 0
            killed = oom_kills()
            flush()
            alive, held = os.pipe()
            signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # one that comes now is for the child, once it is there
            self.child = os.fork()
            if not self.child:
                self.watching, self.pid = False, os.getpid()
                os.close(held)
                die_with_parent(alive)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            if not self.child:
                return None
            os.close(alive)
            os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOWAIT)
            child, self.child = self.child, 0  # before its number is free for another process
            status = os.waitpid(child, 0)[1]
            os.close(held)
            running, task, log_start, start = RUNNING.unpack(self.running)
            if running and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                time.sleep(1)  # who ends the whole job kills its processes one by one
            if not running or self.stop == "terminated":
                return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            cause, words = cause_of_death(status, oom_kills() > killed)
            self.death = task, time.monotonic() - start, cause, words, log_start
            self.running[:] = bytes(RUNNING.size)

    def bury(self, done: set[int]) -> None:
        """Write the end of the task that has ended its process, unless that came after its result."""
        if self.death is None or self.death[0] in done:
            return
        task, seconds, cause, words, log_start = self.death
        entry = self.writer.append(task, self.frames.ERROR, self.frames.encode((None, words, words)))
        self.say_done(entry, seconds, words, (log_start, self.log_position()), cause)
        self.failed += 1
        done.add(task)

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
                if stop == len(everything):
                    open(self.path("claims", f"{self.attempt}-all"), "w").close()
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
        import hybrid_frames

        self.frames = hybrid_frames
        faulthandler.enable(self.kept[2], all_threads=False)  # a crash tells the log where
        done = self.resume()
        self.bury(done)
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
        finally:
            self.running[:1] = b"\0"  # from here on it is the worker that ends, not a task
        with self.lock:
            self.ended.set()
            if why == "terminated":  # a scheduler that starts the batch anew finds what it has done so far
                self.writer.sync()
                self.writer.close()
            else:
                self.writer.finish(self.path("results", f"{self.batch}.bin"))
            cpu, rss = round(self.spent[0] + cpu_seconds(), 3), max(self.spent[1], peak_memory())
            self.say("end", why=why, cpu=cpu, rss=rss, failed=self.failed)
            os.fsync(self.status_file)
        return {"done": 1 if self.failed else 0, "walltime": 75, "terminated": 143}[why]

    def run_task(self, task: int, call: Callable[[int, Any], Any], items: Callable[[int], Any]) -> None:
        frames = self.frames
        self.restore()
        start = time.monotonic()
        log_start = self.log_position()
        self.current = (task, start)
        RUNNING.pack_into(self.running, 0, True, task, log_start, start)
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

    def say_done(self, entry: Any, seconds: float, error: str, log: tuple[int, int], cause: str = "") -> None:
        fields = {"task": entry.task, "o": entry.offset, "l": entry.length, "c": entry.checksum, "s": round(seconds, 6)}
        if error:
            fields["err"] = error
        if cause:
            fields["cause"] = cause
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
        import traceback

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
            import traceback

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


def die_with_parent(alive: int) -> None:
    """Have the kernel kill this process when its parent, which alone holds the other end of a pipe, is gone.

    What a killed watcher left behind would else run on beside the batch that is started anew. Linux's own way,
    prctl(PR_SET_PDEATHSIG), needs ctypes, whose import takes longer than a small batch.
    """
    with contextlib.suppress(OSError):
        fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(alive, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        if not os.read(alive, 1):  # it was gone before; else there is nothing to read yet, which is an error
            os._exit(1)


def oom_kills() -> int:
    """Return how many processes the kernel of this node has killed for want of memory since boot."""
    with contextlib.suppress(OSError), open("/proc/vmstat", "rb") as file:
        for line in file:
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0


def cause_of_death(status: int, oom: bool) -> tuple[str, str]:
    """Return cause and words for a task that has ended its process, from the status of wait(2).

    A crash is the doing of the task's code, a kill comes from outside.
    """
    if os.WIFEXITED(status):
        return "USER_ERROR", f"the task ended its process with exit status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    words = f"the task's process was killed by signal {number}{name}"
    if number == signal.SIGKILL and oom:
        return "OUT_OF_MEMORY", words + ": the node's memory was used up"
    if number == signal.SIGKILL:
        return "INFRASTRUCTURE", words + "; often the node's memory was used up"
    return "USER_ERROR" if number in CRASHES else "INFRASTRUCTURE", words


def peak_memory() -> int:
    """Return the largest resident size of this process and its ended children, in bytes."""
    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def cpu_seconds() -> float:
    """Return the cpu time of this process and its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main(argv: list[str]) -> int:
    """Run one batch; return the exit status of the process."""
    # The worker's own folder comes last: it must not shadow the user's modules.
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry != own] + [own]
    batch = _Batch(argv[0], int(argv[1]), int(argv[2]))
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
        if batch.watching:
            batch.stop = "terminated"
            forward(number)
            return
        if os.getpid() != batch.pid:  # a child of the user's code, which dies of it as any process does
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        batch.stop = "terminated"
        raise Terminated

    def warn(number: int, frame: FrameType | None) -> None:
        batch.stop = batch.stop or "walltime"
        if batch.watching:
            forward(number)

    def forward(number: int) -> None:
        if batch.child:
            os.kill(batch.child, number)

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGUSR2, warn)
    batch.say("start", host=os.uname().nodename, pid=os.getpid(), python=sys.version.split()[0], native=batch.native)
    try:
        if batch.nothing_left():
            batch.say("end", why="done", cpu=cpu_seconds(), rss=peak_memory(), failed=0)
            return 0
        status = batch.watch() if batch.several() else None
        if status is not None:
            os._exit(status)  # at once: a tidy end takes time, and there is nothing to tidy up
        return batch.run()
    except Terminated:
        batch.say("end", why="terminated")
        return 143
    except Exception as problem:  # noqa: BLE001  said to the user, not lost in a log
        import traceback

        traceback.print_exc()
        line = traceback.format_exception_only(type(problem), problem)[-1].strip()
        full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
        return refuse("the worker could not run the batch: " + line, FULL if full else 70)
