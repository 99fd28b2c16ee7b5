"""Run folders on a pool's storage: what is written before a submission, and where everything is found.

The layout is in :class:`RunFolder`. A run folder is private to its user (0700), and complete or absent: ``spec.json``
is renamed into place last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import py_compile
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, JobNotFound, StoreError
from .spec import ID_PATTERN, JobSpec, Resources

_FOLDERS = ("status", "results", "logs", "claims", "outputs", "checkpoint")
_NODE_FILES = {"worker.py": "hybrid_worker.py", "frames.py": "hybrid_frames.py", "cellrun.py": "hybrid_cellrun.py"}
_NODE_MAIN = """\
import sys

from hybrid_worker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def data_folder() -> Path:
    """Return this user's data folder: ``$JUPYTER_HYBRID_HOME``, or ``hybrid`` in Jupyter's data directory."""
    given = os.environ.get("JUPYTER_HYBRID_HOME")
    if given:
        return Path(given).expanduser().absolute()
    from jupyter_core.paths import jupyter_data_dir

    return Path(jupyter_data_dir()) / "hybrid"


def storage_folder(storage: str | None) -> Path:
    """Return the folder of a pool's ``storage:`` entry (default: ``runs`` in the data folder)."""
    if storage is None:
        return data_folder() / "runs"
    if "://" in storage and not storage.startswith("file://"):
        raise ConfigError(f"storage {storage!r}: only folders that kernel and nodes share are supported")
    return Path(storage.removeprefix("file://")).expanduser().absolute()


@dataclass(frozen=True)
class Attempt:
    """One round of running the tasks of a job that are not done yet.

    Parameters
    ----------
    number : int
        1 for the first round; every retry adds one.
    first : int
        Number of its first batch; batch numbers are never used twice in a job.
    batches : int
        Number of its batches.
    size : int
        Tasks in a batch, where each batch has its own; not used if `pull`.
    pull : bool
        Whether batches pull shares of the tasks as they get free.
    tasks : tuple of (int, int)
        Half-open ranges of the task numbers to run.
    resources : Resources
        What each batch asks for.
    chunks : tuple of int
        Number of batches in each submission; more than one where the site limits the size of an array.
    """

    number: int
    first: int
    batches: int
    size: int
    pull: bool
    tasks: tuple[tuple[int, int], ...]
    resources: Resources
    chunks: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON mapping."""
        return {
            **self.__dict__,
            "tasks": [list(pair) for pair in self.tasks],
            "chunks": list(self.chunks),
            "resources": self.resources.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Attempt:
        """Return what :meth:`to_json` wrote."""
        return cls(
            **{
                **data,
                "tasks": tuple((start, stop) for start, stop in data["tasks"]),
                "chunks": tuple(data["chunks"]),
                "resources": Resources.from_json(data["resources"]),
            }
        )

    def chunk_first(self, chunk: int) -> int:
        """Return the number of the first batch of a submission."""
        return self.first + sum(self.chunks[:chunk])


def ranges(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return sorted whole numbers as half-open ranges."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return tuple(found)


class RunFolder:
    """The folder of one job; the truth about it.

    ::

        spec.json               the intent (JobSpec)
        payload.bin             function or cell with its shared arguments; payload.sh for a script
        items.bin               the tasks' own arguments
        keys.json               cache keys of the tasks
        reused.json             tasks whose results come from an earlier job, and the files that hold them
        attempt-<n>.json        which tasks a round runs, in which batches (Attempt)
        attempt-<n>.draft       the same, until the Store has the round; nobody runs a draft
        script.<first>.sh       exactly what the scheduler got for the submission that begins with that batch
        submissions.jsonl       what the scheduler answered, with native ids
        submit.lock             locked while a submission is under way
        cancelled-<n>           there if somebody cancelled that round
        end-<n>.json            how a round ended, where its workers could not tell
        logs/  status/  results/  outputs/  claims/  checkpoint/       written on the nodes, see worker.py
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @functools.cached_property
    def spec(self) -> JobSpec:
        """The intent."""
        data = self.read_json("spec.json")
        try:
            return JobSpec.from_json(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"job {self.id}: {self.path / 'spec.json'} is damaged: {error!r}") from error

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file of the folder."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            raise JobNotFound(f"job {self.id}: {self.path / name} is not there; the run folder was removed") from None
        except ValueError as error:
            raise StoreError(f"job {self.id}: {self.path / name} is damaged: {error}") from None

    def write(self, name: str, content: bytes, mode: int = 0o600) -> None:
        """Write a file so that it is whole or absent, whatever happens."""
        write_atomic(self.path / name, content, mode)

    def attempt(self, number: int) -> Attempt:
        """Return one round."""
        data = self.read_json(f"attempt-{number}.json")
        try:
            return Attempt.from_json(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"job {self.id}: attempt-{number}.json is damaged: {error!r}") from error

    def draft(self, attempt: Attempt) -> None:
        """Write down a round before the Store has it: left by a killed process, it was never promised to anybody."""
        self.write(f"attempt-{attempt.number}.draft", json.dumps(attempt.to_json()).encode())

    def adopt(self, number: int) -> None:
        """Make a draft the plan of a round, once the Store has the round; whoever comes first does it."""
        with contextlib.suppress(OSError):  # done already, or told to who reads the plan
            os.rename(self.path / f"attempt-{number}.draft", self.path / f"attempt-{number}.json")

    def attempts(self) -> list[Attempt]:
        """Return all rounds, first to last."""
        found: list[Attempt] = []
        while (self.path / f"attempt-{len(found) + 1}.json").exists():
            found.append(self.attempt(len(found) + 1))
        return found

    def submissions(self) -> dict[str, dict[str, Any]]:
        """Return what the scheduler answered, by tag; the last answer of a tag counts."""
        try:
            lines = (self.path / "submissions.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return {}
        answers: dict[str, dict[str, Any]] = {}
        for line in lines:
            with contextlib.suppress(ValueError):  # a torn last line is no answer
                answer = json.loads(line)
                answers[answer["tag"]] = answer
        return answers

    def record_submission(self, tag: str, **answer: Any) -> None:
        """Append what the scheduler answered to a submission."""
        append_line(self.path / "submissions.jsonl", {"tag": tag, **answer})

    def log(self, batch: int) -> Path:
        """Return the path of a batch's log."""
        plain = self.path / "logs" / f"{batch}.out"
        if plain.exists():
            return plain
        for attempt in reversed(self.attempts()):
            for chunk in range(len(attempt.chunks)):
                first = attempt.chunk_first(chunk)
                if first <= batch < first + attempt.chunks[chunk]:
                    return self.path / "logs" / f"{first}+{batch - first}.out"
        return plain

    def log_tail(self, batch: int, lines: int = 15) -> str:
        """Return the last lines of a batch's log, or an empty text."""
        try:
            with open(self.log(batch), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    @contextlib.contextmanager
    def submitting(self) -> Iterator[int | None]:
        """Hold the submission lock; yields its descriptor, or ``None`` where a submission is under way already.

        The submit command inherits the descriptor: the lock stays held while the command lives, even if this process
        is killed.

        Raises
        ------
        JobNotFound
            The run folder is not there.
        """
        try:
            descriptor = os.open(self.path / "submit.lock", os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:
            raise JobNotFound(f"job {self.id}: its run folder {self.path} was removed") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            yield None
            return
        try:
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor, too
            os.close(descriptor)

    def remove(self) -> None:
        """Remove the folder with all results; ``spec.json`` first, so that half a folder is no job."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / "spec.json")
        shutil.rmtree(self.path, ignore_errors=True)


def write_atomic(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file so that it is whole or absent: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")  # threads and hosts may write at the same time
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, mode)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
    os.rename(temporary, path)


def append_line(path: Path, data: Mapping[str, Any]) -> None:
    """Append one JSON line by a single write, and bring it to the disk."""
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # cut short when the disk was full
        view = memoryview(b"\n" * torn + json.dumps(data).encode() + b"\n")
        while view:  # in one piece, unless the disk is full
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Storage:
    """Where the run folders of a pool are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._worker: Path | None = None

    @contextlib.contextmanager
    def create(self, spec: JobSpec) -> Iterator[RunFolder]:
        """Make the run folder of a new job; on leaving the block the intent is complete and on disk.

        Whatever goes wrong in the block removes the folder.

        Raises
        ------
        StoreError
            The storage is full, read-only or not there.
        """
        folder, made = RunFolder(self.root / spec.id), False
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            os.mkdir(folder.path, 0o700)
            made = True
            for name in _FOLDERS:
                os.mkdir(folder.path / name, 0o700)
            yield folder
            folder.write("spec.json", json.dumps(spec.to_json()).encode())
            sync_folder(folder.path)
            sync_folder(self.root)
        except BaseException as error:
            if made:
                folder.remove()
            if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
                raise StoreError(
                    f"cannot write the run folder {folder.path}: {error.strerror}; nothing was submitted. "
                    f"Free space (jupyter hybrid clean) or set 'storage:' of pool {spec.pool!r} to another folder"
                ) from error
            raise

    def folders(self) -> Iterator[RunFolder]:
        """Yield every complete run folder."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                if ID_PATTERN.fullmatch(entry.name) and os.path.exists(os.path.join(entry.path, "spec.json")):
                    yield RunFolder(Path(entry.path))

    @property
    def worker(self) -> Path:
        """The folder that is started on the nodes: a copy of the worker and what it imports, made when first used."""
        if self._worker is None or not self._worker.exists():  # somebody may have cleaned up
            self._worker = self._make_worker()
        return self._worker

    def _make_worker(self) -> Path:
        package = Path(__file__).parent
        files = {name: (package / source).read_bytes() for source, name in _NODE_FILES.items()}
        files["batch.py"] = _NODE_MAIN.encode()
        digest = hashlib.sha256(b"\0".join(name.encode() + b"\0" + data for name, data in sorted(files.items())))
        folder = self.root / ".worker" / digest.hexdigest()[:16]
        if not folder.exists():
            os.makedirs(folder.parent, mode=0o700, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=folder.parent))
            for name, data in files.items():
                write_atomic(made / name, data)
                # Ready for this Python, whatever the nodes may write; never checked again, as the files never change.
                py_compile.compile(str(made / name), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
            try:
                os.rename(made, folder)
            except OSError as error:
                shutil.rmtree(made)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        return folder


_STORAGE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
}
