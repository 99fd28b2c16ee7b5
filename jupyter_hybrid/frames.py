"""Payload and result files: pickle protocol 5 with out-of-band buffers, checksums, mapped on load.

This one file runs in the notebook's kernel and, copied to the pool's storage, on nodes where jupyter_hybrid is not
installed: standard library only at import time, no relative import, syntax of Python 3.8.

A file is a row of records, then an index and a trailer, all little-endian::

    record   magic 4s, algorithm u8, kind u8, 0 u16, task i64, length u64, frames u64 | a length u64 for each frame
             | the pickle | buffers, each at a multiple of 64 in the file | zeros to 8 bytes | checksum u64
    index    for each record: task i64, kind u64, offset u64, length u64, checksum u64, frames u64
    trailer  magic 8s, algorithm u64, count u64, index offset u64, data checksum u64, index checksum u64

A record's checksum covers all of it that stands before, the data checksum all bytes before the index, and the
index checksum the index and the trailer before it: no bit of a file goes unverified.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import mmap
import os
import pickle
import struct
import sys
import weakref
from collections import namedtuple

TYPE_CHECKING = False  # typing takes as long to import as a small batch takes to run
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

try:
    from xxhash import xxh3_64, xxh3_64_intdigest
except ImportError:  # a node without it writes, and reads files of its own kind
    xxh3_64 = None  # type: ignore[assignment,misc]

VALUE, ERROR, PAYLOAD, BROKEN = 0, 1, 2, 3
"""Kinds of a record; `BROKEN` only ever comes out of :meth:`Reader.load_all`, with the error in the value's place."""

_RECORD_MAGIC, _TRAILER_MAGIC = b"HyR1", b"HyFrame1"
_XXH3, _BLAKE2 = 1, 2
_HEAD = struct.Struct("<4sBBHqQQ")
_INDEX = struct.Struct("<qQQQQQ")
_TRAILER = struct.Struct("<8sQQQQQ")
_SUM = struct.Struct("<Q")
_PICKLE_AT = _HEAD.size + 8  # in a record of one frame
_SMALLEST = _PICKLE_AT + _SUM.size
_ALIGN = 64
_INLINE = 16 << 10  # a smaller buffer costs less inside the pickle than as a frame of its own
_MAPPED = 1 << 20  # less is read rather than mapped: as fast, and a process may have only about 65,000 maps
_ZEROS = bytes(_ALIGN)
_IOV_MAX = 1000
_RETRY = "retry() runs only what is lost"


class FrameError(ValueError):
    """A payload or result file cannot be read."""


class FrameMissing(FrameError):
    """There is no such file, or no such task in it."""


class FrameTruncated(FrameError):
    """A file ends too early: its writer was interrupted, or it was cut."""


class FrameCorrupt(FrameError):
    """A file or record does not match its checksum."""


class FrameUnreadable(FrameError):
    """A record is intact but cannot be unpickled in this Python; the cause is chained."""


class Entry(namedtuple("Entry", "task kind offset length checksum")):
    """Where a record is and what it must hash to."""

    task: int
    kind: int
    offset: int
    length: int
    checksum: int
    __slots__ = ()


class _ByValue(Exception):
    """Something that only cloudpickle can pickle by value."""


class _Pickler(pickle.Pickler):
    """The C pickler, which would take what is defined in the notebook by reference: it gives up there."""

    def reducer_override(self, obj: Any) -> Any:
        module = getattr(obj, "__module__", "")
        if module == "__main__" or module is None:
            raise _ByValue
        return NotImplemented


def encode(obj: Any) -> list[Any]:
    """Pickle an object; nothing is copied that exports a contiguous buffer of 16 KiB or more.

    Functions and classes of ``__main__`` go by value, through cloudpickle, which is imported only for them.

    Returns
    -------
    list of bytes or memoryview
        The pickle, then its out-of-band buffers, which are views of the object's own memory.
    """
    buffers: list[Any] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _INLINE:
            return True
        buffers.append(raw)
        return False

    # With modules registered for pickling by value, cloudpickle alone knows what goes by reference.
    registered = getattr(sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", None)
    if not (registered and registered()):
        stream = io.BytesIO()
        try:
            _Pickler(stream, 5, buffer_callback=keep).dump(obj)
        except Exception:  # noqa: BLE001 - cloudpickle can do more; what it cannot it says itself
            buffers.clear()
        else:
            return [stream.getvalue(), *buffers]
    import cloudpickle

    return [cloudpickle.dumps(obj, protocol=5, buffer_callback=keep), *buffers]


def decode(frames: Sequence[Any]) -> Any:
    """Return the object of :func:`encode`'s frames; arrays share the memory of their frames."""
    return pickle.loads(frames[0], buffers=frames[1:])


def _hasher(algorithm: int, path: str) -> Any:
    """Return a new hash object whose ``digest()`` has 8 bytes."""
    if algorithm == _XXH3:
        if xxh3_64 is None:
            raise FrameError(
                f"{path} has xxh3 checksums and this Python ({sys.executable}) has no xxhash: install the package "
                "xxhash here"
            )
        return xxh3_64()
    if algorithm == _BLAKE2:
        try:
            from _blake2 import blake2b  # hashlib's own, without loading OpenSSL, which takes longer than a small batch
        except ImportError:
            from hashlib import blake2b

        return blake2b(digest_size=8)
    raise FrameCorrupt(f"{path} names an unknown checksum algorithm ({algorithm}): it is damaged; {_RETRY}")


def _checksum(algorithm: int, data: Any, path: str) -> int:
    if algorithm == _XXH3 and xxh3_64 is not None:
        return int(xxh3_64_intdigest(data))
    hasher = _hasher(algorithm, path)
    hasher.update(data)
    return int.from_bytes(hasher.digest(), "big")


def _spans(offset: int, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and end of each frame, counted from the record, for a record at `offset` of the file."""
    start = _HEAD.size + 8 * len(lengths)
    spans = []
    for number, length in enumerate(lengths):
        if number:
            start += -(offset + start) % _ALIGN
        spans.append((start, start + length))
        start += length
    return spans


class Writer:
    """Appends records to a file that gets its index, and its name, when it is finished. For one thread.

    Parameters
    ----------
    path : str or path
        The partial file.
    resume : bool
        Keep the whole records of an existing file, and cut off what is behind them; it is emptied otherwise.
    portable : bool
        Use the standard library's checksum, for a reader that may not have xxhash.

    Attributes
    ----------
    entries : list of Entry
        The records written so far.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False, portable: bool = False) -> None:
        self.path = os.fspath(path)
        self.entries: list[Entry] = []
        self._frames: list[int] = []
        self._algorithm = _BLAKE2 if portable or xxh3_64 is None else _XXH3
        self._data = _hasher(self._algorithm, self.path)
        self._end = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resume else os.O_TRUNC)
        self._fd = os.open(self.path, flags, 0o600)
        if resume:
            try:
                self._scan()
                self._rewind()
            except BaseException:
                self.close()
                raise

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> Writer:
        """Reopen a partial file, or start it; its whole records are in `entries`."""
        return cls(path, resume=True)

    def _rewind(self) -> None:
        os.ftruncate(self._fd, self._end)
        os.lseek(self._fd, self._end, os.SEEK_SET)

    def _scan(self) -> None:
        size = os.fstat(self._fd).st_size
        if not size:
            return
        with mmap.mmap(self._fd, size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            while self._end + _SMALLEST <= size:
                magic, algorithm, kind, _, task, length, frames = _HEAD.unpack_from(data, self._end)
                if magic != _RECORD_MAGIC or not _SMALLEST <= length <= size - self._end:
                    break
                if not self.entries and algorithm in (_XXH3, _BLAKE2):
                    self._algorithm = algorithm
                    self._data = _hasher(algorithm, self.path)
                with data[self._end : self._end + length] as record, record[: -_SUM.size] as summed:
                    checksum = _checksum(self._algorithm, summed, self.path)
                    if algorithm != self._algorithm or checksum != _SUM.unpack_from(record, length - _SUM.size)[0]:
                        break
                    self._data.update(record)
                self._add(Entry(task, kind, self._end, length, checksum), frames)

    def _add(self, entry: Entry, frames: int) -> None:
        self.entries.append(entry)
        self._frames.append(frames)
        self._end = entry.offset + entry.length

    def append(self, task: int, kind: int, frames: Sequence[Any]) -> Entry:
        """Write one record; after an error (a full disk) the file is as it was before.

        Parameters
        ----------
        task : int
            Number of the task.
        kind : {VALUE, ERROR, PAYLOAD}
            What the record is.
        frames : list of bytes or memoryview
            From :func:`encode`.
        """
        lengths = [len(frame) for frame in frames]
        spans = _spans(self._end, lengths)
        summed = spans[-1][1] + -spans[-1][1] % 8
        length = summed + _SUM.size
        head = _HEAD.pack(_RECORD_MAGIC, self._algorithm, kind, 0, task, length, len(frames))
        parts = [head + struct.pack(f"<{len(lengths)}Q", *lengths)]
        position = len(parts[0])
        for (start, end), frame in zip(spans, frames):  # noqa: B905 - not in Python 3.8
            if start > position:
                parts.append(_ZEROS[: start - position])
            parts.append(frame)
            position = end
        if summed > position:
            parts.append(_ZEROS[: summed - position])
        hasher = _hasher(self._algorithm, self.path)
        for part in parts:
            hasher.update(part)
        checksum = int.from_bytes(hasher.digest(), "big")
        parts.append(_SUM.pack(checksum))
        self._write(parts)
        for part in parts:
            self._data.update(part)
        entry = Entry(task, kind, self._end, length, checksum)
        self._add(entry, len(frames))
        return entry

    def _write(self, parts: list[Any]) -> None:
        todo = [memoryview(part) for part in parts]
        try:
            while todo:
                written = os.writev(self._fd, todo[:_IOV_MAX])
                while todo and written >= len(todo[0]):
                    written -= len(todo.pop(0))
                if written:
                    todo[0] = todo[0][written:]
        except BaseException:
            self._rewind()
            raise

    def sync(self) -> None:
        """Have what was written on the disk."""
        os.fsync(self._fd)

    def finish(self, final_path: str | os.PathLike[str]) -> None:
        """Write the index, sync, rename to `final_path` and close."""
        rows = zip(self.entries, self._frames)  # noqa: B905 - not in Python 3.8
        index = b"".join(_INDEX.pack(*entry, frames) for entry, frames in rows)
        data = int.from_bytes(self._data.digest(), "big")
        tail = _TRAILER.pack(_TRAILER_MAGIC, self._algorithm, len(self.entries), self._end, data, 0)[: -_SUM.size]
        checksum = _checksum(self._algorithm, index + tail, self.path)
        self._write([index + tail + _SUM.pack(checksum)])
        self.sync()
        self.close()
        final = os.fspath(final_path)
        os.replace(self.path, final)
        folder = os.open(os.path.dirname(final) or ".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        except OSError as error:  # some network file systems have no such thing as a directory's sync
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(folder)

    def close(self) -> None:
        """Close the file as it is; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def write_file(
    path: str | os.PathLike[str], records: Iterable[tuple[int, int, Sequence[Any]]], *, portable: bool = False
) -> None:
    """Write a whole file at once, complete or not at all.

    Parameters
    ----------
    path : str or path
        The file; an existing one is replaced.
    records : iterable of (task, kind, frames)
        What :meth:`Writer.append` takes.
    portable : bool
        As for :class:`Writer`.
    """
    folder, name = os.path.split(os.fspath(path))
    partial = os.path.join(folder, f".{name}.{os.urandom(6).hex()}.tmp")
    try:
        with Writer(partial, portable=portable) as writer:
            for task, kind, frames in records:
                writer.append(task, kind, frames)
            writer.finish(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


@functools.lru_cache
def _mapper() -> Any:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    failed = ctypes.c_void_p(-1).value
    anything = ctypes.c_char * sys.maxsize  # one type for all lengths: each new one would be kept for ever

    def map_private(fd: int, offset: int, length: int) -> memoryview:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = libc.mmap(None, length, protection, mmap.MAP_PRIVATE, fd, offset)
        if address == failed:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map {length} bytes: {os.strerror(code)}")
        memory = anything.from_address(address)
        weakref.finalize(memory, libc.munmap, address, length).atexit = False
        return memoryview(memory).cast("B")[:length]

    return map_private


def _view(fd: int, offset: int, length: int) -> memoryview:
    """Return bytes of a file as private, writable memory that lives as long as a view of it.

    The class `mmap.mmap` holds a file descriptor of its own (until Python 3.13): a process may have only about 1,000.
    """
    if length < _MAPPED:
        lead = offset % _ALIGN
        data = memoryview(bytearray(lead + length))[lead:]
        return data[: os.preadv(fd, [data], offset)]
    lead = offset % mmap.ALLOCATIONGRANULARITY
    return _mapper()(fd, offset - lead, lead + length)[lead:]  # type: ignore[no-any-return]


def _open_view(path: str, entry: Entry | None = None) -> memoryview:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        whose = "" if entry is None else f" (task {entry.task})"
        raise FrameMissing(f"{path}{whose} does not exist; {_RETRY}") from None
    try:
        size = os.fstat(fd).st_size
        if entry is None:
            return _view(fd, 0, size)
        if size < entry.offset + entry.length:
            raise FrameTruncated(
                f"{path} ends at byte {size}, before task {entry.task} (bytes {entry.offset} to "
                f"{entry.offset + entry.length}); {_RETRY}"
            )
        return _view(fd, entry.offset, entry.length)
    finally:
        os.close(fd)


def _verified(view: memoryview, entry: Entry, algorithm: int, path: str) -> list[memoryview]:
    """Return the frames of a record, once verified; algorithm 0 is the one it names."""
    corrupt = FrameCorrupt(f"task {entry.task} in {path} does not match its checksum: it was altered; {_RETRY}")
    if len(view) != entry.length or entry.length < _SMALLEST:
        raise corrupt
    magic, recorded, kind, _, task, length, count = _HEAD.unpack_from(view)
    if magic != _RECORD_MAGIC:
        if magic[:3] == _RECORD_MAGIC[:3]:
            raise FrameCorrupt(f"task {entry.task} in {path} has format {magic!r}, not {_RECORD_MAGIC!r}; {_RETRY}")
        raise corrupt
    checksum = _checksum(algorithm or recorded, view[: -_SUM.size], path)
    if not entry.checksum == checksum == _SUM.unpack_from(view, entry.length - _SUM.size)[0] or (
        kind,
        task,
        length,
    ) != (
        entry.kind,
        entry.task,
        entry.length,
    ):
        raise corrupt
    lengths = struct.unpack_from(f"<{count}Q", view, _HEAD.size)
    return [view[start:end] for start, end in _spans(entry.offset, lengths)]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from looking through many new objects again and again: all of them live."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _record(view: memoryview, entry: Entry, algorithm: int, path: str) -> Any:
    frames = _verified(view, entry, algorithm, path)
    try:
        return decode(frames)
    except Exception as error:
        raise FrameUnreadable(
            f"task {entry.task} in {path} is intact but cannot be unpickled here ({type(error).__name__}: {error}); "
            "install what it needs, in the versions that wrote it"
        ) from error


def read_entry(source: str | os.PathLike[str] | Reader, entry: Entry) -> Any:
    """Return the object of one record, also of a file that is still being written.

    Parameters
    ----------
    source : str, path or Reader
        The file.
    entry : Entry
        As :meth:`Writer.append` returned it.

    Raises
    ------
    FrameError
        The file is missing, cut short or altered, or the object cannot be unpickled here.
    """
    path = source.path if isinstance(source, Reader) else os.fspath(source)
    return _record(_open_view(path, entry), entry, 0, path)


def read_entries(path: str | os.PathLike[str], entries: Sequence[Entry]) -> list[Any]:
    """Return the object of each of some records, or the `FrameError` of one that cannot be read; opens the file once.

    For records that lie near each other: what is between the first and the last is mapped, or read if it is small.
    """
    path = os.fspath(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return [FrameMissing(f"{path} (task {entry.task}) does not exist; {_RETRY}") for entry in entries]
    try:
        size = os.fstat(fd).st_size
        start = min((entry.offset for entry in entries), default=0)
        stop = max((end for entry in entries if (end := entry.offset + entry.length) <= size), default=start)
        view = _view(fd, start, stop - start)
    finally:
        os.close(fd)
    found: list[Any] = []
    for entry in entries:
        at = entry.offset - start
        if at + entry.length > len(view):
            found.append(FrameTruncated(f"{path} ends at byte {size}, before the end of task {entry.task}; {_RETRY}"))
            continue
        try:
            found.append(_record(view[at : at + entry.length], entry, 0, path))
        except FrameError as error:
            found.append(error)
    return found


def verify_entry(path: str | os.PathLike[str], entry: Entry) -> None:
    """Check a record against its checksum without unpickling it; raises the :class:`FrameError` that loading would."""
    _verified(_open_view(os.fspath(path), entry), entry, 0, os.fspath(path))


class Reader:
    """A finished file, mapped (from 1 MiB): arrays come out of it writable and without being copied.

    Writing into such an array changes neither the file nor what a later load returns. The mapping lives as long as
    the reader or any array from it.

    Parameters
    ----------
    path : str or path
        The file.

    Attributes
    ----------
    entries : dict of int to Entry
        The records by task; of several for one task, the last.

    Raises
    ------
    FrameMissing, FrameTruncated, FrameCorrupt
        There is no such file, it was not finished, or its index is altered.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._open()

    def _open(self) -> None:
        self._view = data = _open_view(self.path)
        self._taken: set[int] = set()
        tail = len(data) - _TRAILER.size
        magic = bytes(data[tail : tail + 8]) if tail >= 0 else b""
        if magic[:7] != _TRAILER_MAGIC[:7]:
            if len(data) < _TRAILER.size or data[:4] == _RECORD_MAGIC:
                raise FrameTruncated(f"{self.path} has no index: it was cut or never finished; {_RETRY}")
            raise FrameCorrupt(f"{self.path} is no result file, or an altered one; {_RETRY}")
        if magic != _TRAILER_MAGIC:
            raise FrameError(f"{self.path} has format {magic[7:]!r}, newer than this one; upgrade jupyter_hybrid")
        _, algorithm, count, index, self._data_checksum, checksum = _TRAILER.unpack_from(data, tail)
        if index + count * _INDEX.size != tail:
            raise FrameCorrupt(f"the index of {self.path} does not fit the file: it was altered; {_RETRY}")
        if _checksum(algorithm, data[index : -_SUM.size], self.path) != checksum:
            raise FrameCorrupt(f"the index of {self.path} does not match its checksum: it was altered; {_RETRY}")
        self._algorithm = algorithm
        with _uncollected():
            self._rows = list(_INDEX.iter_unpack(data[index:tail]))
        self._end = index
        self._entries: dict[int, Entry] | None = None

    @property
    def entries(self) -> dict[int, Entry]:  # noqa: D102 - an attribute, documented there
        if self._entries is None:
            self._entries = {row[0]: Entry(*row[:5]) for row in self._rows}
        return self._entries

    def load(self, task: int) -> Any:
        """Return the object of a task, after verifying its checksum."""
        entry = self.entries.get(task)
        if entry is None:
            raise FrameMissing(f"{self.path} has no task {task}; {_RETRY}")
        if task in self._taken:
            self._open()  # what was handed out may have been written into
        self._taken.add(task)
        view = self._view[entry.offset : entry.offset + entry.length]
        return _record(view, entry, self._algorithm, self.path)

    def load_all(self) -> list[tuple[int, int, Any]]:
        """Return (task, kind, object) of all tasks; a record that cannot be read is `BROKEN`, with its `FrameError`."""
        if self._taken:
            self._open()
        data, rows, loads, at = self._view, self._rows, pickle.loads, _PICKLE_AT
        with _uncollected(), contextlib.suppress(Exception):  # found again, and named, one by one
            if (
                all(row[5] == 1 for row in rows)
                and len({row[0] for row in rows}) == len(rows)
                and _checksum(self._algorithm, data[: self._end], self.path) == self._data_checksum
            ):
                return [(task, kind, loads(data[o + at : o + size])) for task, kind, o, size, _, _ in rows]
        result: list[tuple[int, int, Any]] = []
        for task, entry in self.entries.items():
            try:
                result.append((task, entry.kind, self.load(task)))
            except FrameError as error:  # noqa: PERF203 - one by one is the point
                result.append((task, BROKEN, error))
        return result
