"""Run folders: complete or absent, private, damage is named, one submission at a time."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_hybrid import storage as storage_module
from jupyter_hybrid.errors import ConfigError, JobNotFound, StoreError
from jupyter_hybrid.spec import JobSpec, Resources, new_id
from jupyter_hybrid.storage import Attempt, RunFolder, Storage, append_line, ranges, storage_folder, write_atomic


def spec() -> JobSpec:
    return JobSpec(new_id(), "name", "local", "function", 1, False, 1, Resources(), 1.0)


@given(st.sets(st.integers(0, 300)))
def test_ranges(numbers: set[int]) -> None:
    found = ranges(sorted(numbers))
    assert [number for start, stop in found for number in range(start, stop)] == sorted(numbers)
    assert all(stop < following for (_, stop), (following, _) in itertools.pairwise(found))


def test_complete_or_absent(tmp_path: Path) -> None:
    storage, job = Storage(tmp_path / "runs"), spec()
    with storage.create(job) as folder:
        assert list(storage.folders()) == []
    assert [each.id for each in storage.folders()] == [job.id]
    assert folder.spec == job
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700

    def broken(error: BaseException) -> None:
        with storage.create(spec()):
            raise error

    for error in (KeyError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            broken(error)
    with pytest.raises(StoreError, match="nothing was submitted"):
        broken(OSError(errno.ENOSPC, "No space left on device"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [job.id]


def test_an_existing_folder_is_never_removed(tmp_path: Path) -> None:
    storage, job = Storage(tmp_path / "runs"), spec()
    with storage.create(job):
        pass
    with pytest.raises(StoreError), storage.create(job):
        pass
    assert RunFolder(storage.root / job.id).spec == job


def test_storage_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="storage:"), Storage(root).create(spec()):
            pass
    with pytest.raises(ConfigError, match="share"):
        storage_folder("s3://bucket")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    storage, job = Storage(tmp_path), spec()
    with storage.create(job) as folder:
        pass
    for content in ("{", "[]", "{}", "null"):
        (folder / "spec.json").write_text(content)
        with pytest.raises(StoreError, match=r"spec\.json"):
            _ = RunFolder(folder.path).spec
        (folder / "attempt-1.json").write_text(content)
        with pytest.raises(StoreError, match="attempt-1"):
            folder.attempt(1)
    (folder / "spec.json").unlink()
    with pytest.raises(JobNotFound, match="removed"):
        _ = RunFolder(folder.path).spec


def test_answers_of_the_scheduler(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.submissions() == {}
    folder.record_submission("a.1.0", state="rejected", reason="x")
    folder.record_submission("a.1.0", state="submitted", native_id="5")
    with open(folder / "submissions.jsonl", "a") as file:
        file.write('{"tag": "b.1')  # killed, or the disk was full
    assert folder.submissions() == {"a.1.0": {"tag": "a.1.0", "state": "submitted", "native_id": "5"}}


def test_one_submission_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.submitting() as first:
        assert first is not None
        with RunFolder(tmp_path).submitting() as second:
            assert second is None
        child = os.fork()  # a child forked meanwhile must not keep the lock
        if child == 0:
            signal_end(tmp_path / "go")
    with folder.submitting() as again:
        assert again is not None
    (tmp_path / "go").touch()
    os.waitpid(child, 0)


def signal_end(path: Path) -> None:
    import time

    while not path.exists():
        time.sleep(0.01)
    os._exit(0)


def test_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage_module.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_threads_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    threads = [threading.Thread(target=write_atomic, args=(path, bytes([65 + n]) * 100_000)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = path.read_bytes()
    assert data == data[:1] * 100_000
    assert os.listdir(tmp_path) == ["file"]


def test_append_line(tmp_path: Path) -> None:
    for number in range(3):
        append_line(tmp_path / "file", {"n": number})
    assert [json.loads(line)["n"] for line in (tmp_path / "file").read_text().splitlines()] == [0, 1, 2]


def test_worker_is_made_again(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert (storage.worker / "batch.py").exists()
    shutil.rmtree(tmp_path / ".worker")
    assert (storage.worker / "batch.py").exists()
    assert len(os.listdir(tmp_path / ".worker")) == 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 100))
def test_attempt_round_trip(chunks: list[int], first: int) -> None:
    attempt = Attempt(2, first, sum(chunks), 1, False, ((0, sum(chunks)),), Resources(), tuple(chunks))
    assert Attempt.from_json(json.loads(json.dumps(attempt.to_json()))) == attempt
    assert [attempt.chunk_first(chunk) for chunk in range(len(chunks))] == [
        first + sum(chunks[:chunk]) for chunk in range(len(chunks))
    ]
