"""How far a job is: status files as workers and accidents leave them, and the judgement of them as pure logic."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_hybrid.progress import DONE, FAILED, WAITING, Lost, Progress, ending, judge
from jupyter_hybrid.spec import Cause, JobSpec, JobState, Resources, new_id
from jupyter_hybrid.storage import Attempt, RunFolder
from jupyter_hybrid.store import BatchRow

NOTHING = BatchRow(0, JobState.PENDING, None, "", "", None, 0, None, None, None)


def make(top: Path, tasks: int, attempts: list[Attempt]) -> RunFolder:
    spec = JobSpec(new_id(), "name", "local", "function", tasks, True, 0, Resources(), 1.0)
    folder = RunFolder(top / spec.id)
    for name in ("status", "results"):
        os.makedirs(folder / name)
    folder.write("spec.json", json.dumps(spec.to_json()).encode())
    for attempt in attempts:
        add(folder, attempt)
    return folder


def add(folder: RunFolder, attempt: Attempt) -> None:
    folder.write(f"attempt-{attempt.number}.json", json.dumps(attempt.to_json()).encode())


def plan(number: int, first: int, batches: int, size: int, tasks: tuple[tuple[int, int], ...]) -> Attempt:
    return Attempt(number, first, batches, size, size == 0, tasks, Resources(), (batches,))


def say(folder: RunFolder, batch: int, event: str, **fields: Any) -> None:
    defaults: dict[str, Any] = {
        "start": {"host": "n", "pid": 1, "python": "3", "native": "1"},
        "done": {"o": 0, "l": 8, "c": 0, "s": 0.1},
        "beat": {"rss": 1, "task": None},
    }.get(event, {})
    line = json.dumps({"e": event, "t": 1.0, **defaults, **fields}) + "\n"
    with open(folder / "status" / f"{batch}.jsonl", "a") as file:
        file.write(line)


def read(folder: RunFolder) -> Progress:
    progress = Progress(folder)
    progress.refresh()
    return progress


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path, 3, [plan(1, 0, 1, 3, ((0, 3),))])
    progress = read(folder)
    path = folder / "status" / "0.jsonl"
    say(folder, 0, "start")
    say(folder, 0, "done", task=0)
    with open(path, "ab") as file:
        file.write(b'{"e":"do{"e":"done","t":1}\n[]\n\xff\xfe\n{"e":"done","task":99,"t":1,"o":0,"l":1,"c":1,"s":1}\n')
    say(folder, 0, "done", task=1, err="ValueError: x")
    with open(path, "ab") as file:
        file.write(b'{"e":"done","task":2,"t"')
    assert progress.refresh()
    assert progress.marks == bytes([DONE, FAILED, WAITING])
    assert not progress.refresh()
    with open(path, "ab") as file:
        file.write(b':1,"o":0,"l":8,"c":0,"s":0}\n')
    assert progress.refresh()
    assert progress.complete
    (folder / "status" / ".nfs0001").touch()
    (folder / "status" / "notes.jsonl").touch()
    progress.refresh()
    assert set(progress.batches) == {0}


def test_what_an_earlier_round_says_late_does_not_count(tmp_path: Path) -> None:
    folder = make(tmp_path, 2, [plan(1, 0, 2, 1, ((0, 2),))])
    say(folder, 0, "done", task=0)
    say(folder, 1, "done", task=1, err="bad")
    progress = read(folder)
    assert progress.complete
    add(folder, plan(2, 2, 1, 1, ((1, 2),)))
    say(folder, 1, "done", task=1)  # a batch that was thought to be dead
    progress.refresh()
    assert progress.marks == bytes([DONE, WAITING])
    say(folder, 2, "done", task=1)
    progress.refresh()
    assert progress.done == 2
    assert progress.results[1].batch == 2
    assert read(folder).done == 2


def test_a_plan_that_is_gone(tmp_path: Path) -> None:
    verdict = judge(read(make(tmp_path, 2, [])), {}, {}, True, False)
    assert (verdict.state, verdict.cause) == (JobState.FAILED, Cause.RESULT_LOST)


def test_look_makes_a_batch_known(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, [plan(1, 0, 1, 1, ((0, 1),))])
    progress = Progress(folder)
    progress.look(0)
    assert progress.batches == {} or progress.batches[0].started is None
    say(folder, 0, "start")
    progress.look(0)
    assert progress.batches[0].started == 1.0


@st.composite
def situations(draw: st.DrawFn) -> tuple[int, int, bool, list[tuple[int, str]], dict[int, Any], dict[int, Any], bool]:
    tasks, batches = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    pull = draw(st.booleans())
    done = draw(st.dictionaries(st.integers(0, tasks - 1), st.sampled_from(["", "bad"])))
    states = st.sampled_from(list(JobState))
    observed = draw(st.dictionaries(st.integers(0, batches - 1), states))
    lost = st.sampled_from([None, *[Lost(JobState.FAILED, cause, "why") for cause in Cause]])
    over = draw(st.dictionaries(st.integers(0, batches - 1), lost))
    return tasks, batches, pull, sorted(done.items()), observed, over, draw(st.booleans())


@settings(max_examples=60)  # each makes a folder
@given(situations())
def test_judgement(situation: Any) -> None:
    tasks, batches, pull, done, states, over, cancelled = situation
    size = 0 if pull else -(-tasks // batches)
    batches = batches if pull else -(-tasks // size)
    over = {number: loss for number, loss in over.items() if number < batches}
    with tempfile.TemporaryDirectory() as top:
        folder = make(Path(top), tasks, [plan(1, 0, batches, size, ((0, tasks),))])
        for task, error in done:
            number = 0 if pull else task // size
            if pull:
                say(folder, number, "claim", a=task, b=task + 1)
            say(folder, number, "done", task=task, **({"err": error} if error else {}))
        progress = read(folder)
    observed = {number: NOTHING._replace(batch=number, state=state) for number, state in states.items()}
    verdict = judge(progress, observed, over, True, cancelled)
    good = sum(not error for _, error in done)
    assert (verdict.state is JobState.COMPLETED) == (good == tasks)  # never by default, always when all is there
    ended = {task for task, _ in done}
    assert not ended & set(verdict.lost)
    all_over = all(number in over for number in range(batches))
    if len(done) == tasks or all_over:
        assert verdict.state.final
        assert (verdict.cause is None) == (verdict.state is JobState.COMPLETED)
    if verdict.state.final and good < tasks:
        assert ended | set(verdict.lost) == set(range(tasks))  # each task has ended or has a reason
    if not over and len(done) < tasks:
        assert not verdict.state.final
    assert (verdict.state is JobState.CANCELLED) <= (verdict.cause is Cause.CANCELLED)
    assert (verdict.state is JobState.TIMEOUT) <= (verdict.cause is Cause.TIMEOUT)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (NOTHING._replace(exit_code=137), "signal 9"),
        (NOTHING._replace(exit_code=127), "not found"),
        (NOTHING._replace(exit_code=73), "run folder"),
        (NOTHING._replace(exit_code=74), "disk full"),
        (NOTHING._replace(exit_code=1), "before its worker began"),
        (NOTHING._replace(cause=Cause.NODE_FAILURE, reason="node down"), "node down"),
        (None, "before its worker began"),
    ],
)
def test_ending(row: BatchRow | None, words: str) -> None:
    loss = ending(None, row)
    assert loss is not None
    assert words in loss.reason
    assert loss.state is JobState.FAILED
