"""SlurmBackend against a real Slurm."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jupyter_hybrid.backends.base import Backend, Observation, Submission
from jupyter_hybrid.backends.slurm import SlurmBackend, SubmitLater, available
from jupyter_hybrid.errors import PoolUnreachable, SubmitRejected, SubmitUnclear
from jupyter_hybrid.practice import PracticeSlurm
from jupyter_hybrid.process import run
from jupyter_hybrid.spec import Cause, JobState, Resources, new_id

pytestmark = pytest.mark.slurm
DEADLINE = 120.0


class Lab:
    """A backend on a practice cluster, with a folder for its scripts."""

    def __init__(self, cluster: PracticeSlurm, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.backend = SlurmBackend(cluster.env)
        self.ids: list[str] = []

    def submission(self, body: str, **changes: Any) -> Submission:
        tag = f"{new_id()}.1.0"
        script = self.folder / f"{tag}.sh"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o700)
        plain = Submission(tag, "test", script, self.folder, 0, 1, False, Resources())
        return replace(plain, **changes)

    def submit(self, body: str, **changes: Any) -> str:
        native_id = self.backend.submit(self.submission(body, **changes))
        self.ids.append(native_id)
        return native_id

    def command(self, *argv: str) -> str:
        done = run(argv, env=self.cluster.env)
        assert done.code == 0, done.words
        return done.out.strip()

    def query(self, native_id: str) -> list[Observation]:
        return sorted(self.backend.query([native_id]), key=lambda seen: -1 if seen.index is None else seen.index)

    def wait(self, native_id: str, reached: Callable[[Sequence[Observation]], bool]) -> list[Observation]:
        deadline = time.monotonic() + DEADLINE
        while not reached(seen := self.query(native_id)):
            assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {seen}"
            time.sleep(0.1)
        return seen

    def end(self, native_id: str) -> Observation:
        """Wait for the end of a plain job."""
        return self.wait(native_id, lambda seen: bool(seen) and all(one.state.final for one in seen))[0]

    def running(self, native_id: str) -> Observation:
        return self.wait(native_id, lambda seen: [one.state for one in seen] == [JobState.RUNNING])[0]


def lab_on(cluster: PracticeSlurm, folder: Path) -> Iterator[Lab]:
    lab = Lab(cluster, folder)
    yield lab
    for native_id in lab.ids:
        lab.backend.cancel(native_id)


@pytest.fixture
def lab(slurm: PracticeSlurm, tmp_path: Path) -> Iterator[Lab]:
    yield from lab_on(slurm, tmp_path)


@pytest.fixture
def accounting(slurm_enforcing: PracticeSlurm, tmp_path: Path) -> Iterator[Lab]:
    yield from lab_on(slurm_enforcing, tmp_path)


def states(seen: Sequence[Observation]) -> Counter[JobState]:
    return Counter(one.state for one in seen)


class TestLife:
    def test_it_is_a_backend(self, lab: Lab) -> None:
        assert isinstance(lab.backend, Backend)
        version = available(lab.cluster.env)
        assert version is not None
        assert version == lab.backend.snapshot().version

    def test_a_plain_job(self, lab: Lab) -> None:
        gate = lab.folder / "gate"
        body = f"echo here; pwd; until test -e {gate}; do sleep 0.1; done"
        native_id = lab.submit(body, resources=Resources.parse(cpus=2, memory="300M", time="5min"))
        seen = lab.running(native_id)
        assert (seen.native_id, seen.index, seen.host in lab.cluster.node_names) == (native_id, None, True)
        assert seen.started is not None
        assert abs(seen.started - time.time()) < DEADLINE
        gate.touch()
        seen = lab.end(native_id)
        assert (seen.state, seen.cause, seen.exit_code) == (JobState.COMPLETED, None, 0)
        assert seen.ended is not None
        assert (lab.folder / "0.out").read_text().splitlines() == ["here", str(lab.folder)]

    def test_exit_codes_and_signals(self, lab: Lab) -> None:
        failed, killed = lab.submit("exit 3"), lab.submit("kill -9 $$")
        seen = lab.end(failed)
        assert (seen.state, seen.cause, seen.exit_code) == (JobState.FAILED, Cause.USER_ERROR, 3)
        seen = lab.end(killed)
        assert (seen.state, seen.cause, seen.exit_code) == (JobState.FAILED, Cause.USER_ERROR, 137)

    def test_an_array(self, lab: Lab) -> None:
        variable = lab.backend.index_variable
        native_id = lab.submit(f"echo ${variable}; exit ${variable}", count=3, first=10, array=True)
        seen = lab.wait(native_id, lambda seen: len(seen) == 3 and all(one.state.final for one in seen))
        assert [(one.index, one.state, one.exit_code) for one in seen] == [
            (0, JobState.COMPLETED, 0),
            (1, JobState.FAILED, 1),
            (2, JobState.FAILED, 2),
        ]
        assert [(lab.folder / f"10+{i}.out").read_text() for i in range(3)] == ["0\n", "1\n", "2\n"]

    def test_a_thousand_waiting_elements_are_seen_one_by_one(self, lab: Lab) -> None:
        native_id = lab.submit("true", count=1000, array=True, resources=Resources(extra={"hold": None}))
        seen = lab.query(native_id)
        assert [one.index for one in seen] == list(range(1000))
        assert states(seen) == {JobState.PENDING: 1000}
        assert seen[0].reason == "JobHeldUser (held by you)"

    def test_all_jobs_in_one_command(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = [lab.submit("sleep 300") for _ in range(5)]
        for native_id in ids:
            lab.running(native_id)
        commands = []
        monkeypatch.setattr(
            "jupyter_hybrid.backends.slurm.run",
            lambda argv, **options: commands.append(argv[0]) or run(argv, **options),
        )
        assert states(lab.backend.query(ids)) == {JobState.RUNNING: 5}
        assert commands == ["squeue"]

    @pytest.mark.parametrize("name", ["a 'b' \"c\"", "two\nlines|x", "$(touch hacked)`x`;", "naïve 名前", "-rf %j"])
    def test_any_name(self, lab: Lab, name: str) -> None:
        submission = lab.submission("true", name=name)
        native_id = lab.backend.submit(submission)
        assert lab.backend.find([submission.tag]) == {submission.tag: native_id}
        assert lab.end(native_id).state is JobState.COMPLETED

    def test_what_is_not_asked_for_any_more_is_forgotten(self, lab: Lab) -> None:
        native_id = lab.submit("true", resources=Resources(extra={"hold": None}))
        for start in range(100_000, 102_000, 200):
            assert lab.backend.query([str(number) for number in range(start, start + 200)]) == []
            assert len(lab.backend._watched) <= 300
        [seen] = lab.query(native_id)
        assert seen.state is JobState.PENDING

    def test_foreign_variables_hide_no_job(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SQUEUE_PARTITION", "short")
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        monkeypatch.setenv("SLURM_MEM_PER_CPU", "7")
        native_id = lab.submit("echo mem=$SLURM_MEM_PER_CPU format=$SLURM_TIME_FORMAT")
        assert lab.end(native_id).state is JobState.COMPLETED
        said = (lab.folder / "0.out").read_text()
        assert "mem=7" not in said
        assert said.endswith("format=\n")


class TestFind:
    def test_a_job_whose_id_was_forgotten(self, lab: Lab) -> None:
        waiting = lab.submission("true", resources=Resources(extra={"hold": None}))
        array = lab.submission("true", count=4, array=True)
        ids = {one.tag: lab.backend.submit(one) for one in (waiting, array)}
        lab.ids += ids.values()
        lab.wait(ids[array.tag], lambda seen: states(seen) == {JobState.COMPLETED: 4})
        other = SlurmBackend(lab.cluster.env)
        assert other.find([*ids, f"{new_id()}.1.0"]) == ids
        assert other.find([]) == {}

    def test_an_sbatch_killed_before_it_answered(self, lab: Lab) -> None:
        submission = lab.submission("true")
        slow = lab.folder / "bin"
        slow.mkdir()
        real = lab.command("which", "sbatch")
        (slow / "sbatch").write_text(f'#!/bin/sh\n{real} "$@" > /dev/null\nkill -9 $$\n')
        (slow / "sbatch").chmod(0o700)
        with pytest.raises(SubmitUnclear):
            SlurmBackend({**lab.cluster.env, "PATH": f"{slow}:{os.environ['PATH']}"}).submit(submission)
        found = lab.backend.find([submission.tag])
        assert lab.end(found[submission.tag]).state is JobState.COMPLETED

    def test_a_refused_submission_is_not_found(self, lab: Lab) -> None:
        submission = lab.submission("true", resources=Resources(extra={"licenses": "nosuch"}))
        with pytest.raises(SubmitRejected, match="Invalid license specification"):
            lab.backend.submit(submission)
        submission = lab.submission("true", resources=Resources(cpus=8, nodes=2, extra={"mem": "1000000000"}))
        with pytest.raises(SubmitRejected, match="Memory specification can not be satisfied"):
            lab.backend.submit(submission)
        assert lab.backend.find([submission.tag]) == {}


class TestRefusals:
    @pytest.mark.parametrize(
        ("resources", "words"),
        [
            (Resources(partition="nosuch"), "Invalid partition name specified"),
            (Resources(constraint="nosuch"), "Invalid feature specification"),
            (Resources(gpus=1), "Requested node configuration is not available|Invalid generic resource"),
            (Resources(extra={"nosuch-option": "1"}), "unrecognized option"),
        ],
    )
    def test_slurms_own_words(self, lab: Lab, resources: Resources, words: str) -> None:
        with pytest.raises(SubmitRejected, match=words):
            lab.submit("true", resources=resources)

    def test_an_array_over_the_sites_limit(self, slurm_limited: PracticeSlurm, tmp_path: Path) -> None:
        lab = Lab(slurm_limited, tmp_path)
        size = lab.backend.snapshot().max_array
        assert size == 5
        with pytest.raises(SubmitRejected, match="MaxArraySize"):
            lab.submit("true", count=size + 1)
        native_id = lab.submit("true", count=size, resources=Resources(extra={"hold": None}))
        assert len(lab.query(native_id)) == size
        lab.backend.cancel(native_id)

    def test_more_than_the_partition_gives_waits_with_the_reason(self, lab: Lab) -> None:
        native_id = lab.submit("true", resources=Resources.parse(partition="short", time="1h"))
        seen = lab.wait(native_id, lambda seen: "PartitionTimeLimit" in seen[0].reason)[0]
        assert seen.state is JobState.PENDING
        assert "will never start" in seen.reason


class TestDependencies:
    def test_fulfilled(self, lab: Lab) -> None:
        gate = lab.folder / "gate"
        first = lab.submit(f"until test -e {gate}; do sleep 0.1; done", count=2, array=True)
        second = lab.submit("true", after=(first,))
        lab.wait(second, lambda seen: seen[0].reason == "Dependency (waits for other jobs)")
        gate.touch()
        assert lab.end(second).state is JobState.COMPLETED

    def test_failed(self, lab: Lab) -> None:
        gate = lab.folder / "gate"
        first = lab.submit(f"until test -e {gate}; do sleep 0.1; done; exit 1")
        second = lab.submit("true", after=(first,))
        array = lab.submit("true", after=(first,), count=3)
        gate.touch()
        seen = lab.end(second)
        assert (seen.state, seen.cause, seen.started) == (JobState.CANCELLED, Cause.DEPENDENCY_FAILED, None)
        ended = lab.wait(array, lambda seen: len(seen) == 3 and all(one.state.final for one in seen))
        assert {one.cause for one in ended} == {Cause.DEPENDENCY_FAILED}


class TestOrders:
    def test_cancel(self, lab: Lab) -> None:
        native_id = lab.submit("sleep 300")
        lab.running(native_id)
        lab.backend.cancel(native_id)
        seen = lab.end(native_id)
        assert (seen.state, seen.cause) == (JobState.CANCELLED, Cause.CANCELLED)
        lab.backend.cancel(native_id)
        lab.backend.cancel("999999")

    def test_cancel_elements_that_run(self, lab: Lab) -> None:
        native_id = lab.submit("sleep 300", count=4)
        lab.wait(native_id, lambda seen: states(seen) == {JobState.RUNNING: 4})
        lab.backend.cancel(native_id, [0, 2, 3])
        seen = lab.wait(native_id, lambda seen: states(seen)[JobState.CANCELLED] == 3)
        assert [one.index for one in seen if one.state is JobState.RUNNING] == [1]
        lab.backend.cancel(native_id, [])
        assert states(lab.query(native_id))[JobState.RUNNING] == 1

    def test_elements_cancelled_while_they_wait_leave_no_record_and_are_told_all_the_same(self, lab: Lab) -> None:
        native_id = lab.submit("true", count=1000, array=True, resources=Resources(extra={"hold": None}))
        lab.backend.cancel(native_id, range(0, 1000, 2))
        for _ in range(2):
            seen = lab.query(native_id)
            assert states(seen) == {JobState.PENDING: 500, JobState.CANCELLED: 500}
            assert [one.index for one in seen] == list(range(1000))
        assert seen[0].cause is Cause.CANCELLED
        # One who comes later and has not seen them wait cannot know: absence is not an answer.
        assert states(SlurmBackend(lab.cluster.env).query([native_id])) == {JobState.PENDING: 500}
        lab.backend.cancel(native_id)
        assert states(lab.query(native_id)) == {JobState.CANCELLED: 1000}

    def test_hold_and_release(self, lab: Lab) -> None:
        native_id = lab.submit("true", resources=Resources(extra={"begin": "now+1hour"}))
        lab.backend.hold(native_id)
        lab.wait(native_id, lambda seen: "JobHeld" in seen[0].reason)
        lab.backend.release(native_id)
        lab.wait(native_id, lambda seen: "JobHeld" not in seen[0].reason)
        lab.backend.cancel(native_id)
        lab.end(native_id)
        lab.backend.hold(native_id)
        lab.backend.release("999999")


class TestFailures:
    def test_a_log_folder_that_the_node_does_not_see(self, lab: Lab) -> None:
        native_id = lab.submit("true", logs=Path("/nonexistent/logs"))
        seen = lab.end(native_id)
        assert (seen.state, seen.cause, seen.exit_code) == (JobState.FAILED, Cause.INFRASTRUCTURE, None)

    def test_requeue_keeps_the_id_and_counts(self, lab: Lab) -> None:
        native_id = lab.submit('test -n "$SLURM_RESTART_COUNT" || sleep 300')
        lab.running(native_id)
        lab.command("scontrol", "requeue", native_id)
        seen = lab.wait(native_id, lambda seen: seen[0].restarts == 1)
        assert not seen[0].state.final
        seen = [lab.end(native_id)]
        assert (seen[0].state, seen[0].restarts) == (JobState.COMPLETED, 1)

    def test_preemption_requeues(self, lab: Lab) -> None:
        low = lab.submit(
            'test -n "$SLURM_RESTART_COUNT" || sleep 300',
            resources=Resources(partition="low", nodes=2, extra={"exclusive": None}),
        )
        lab.running(low)
        high = lab.submit("true", resources=Resources(partition="high", nodes=2, extra={"exclusive": None}))
        seen = lab.wait(low, lambda seen: seen[0].restarts == 1)
        assert not seen[0].state.final
        assert lab.end(high).state is JobState.COMPLETED
        assert lab.end(low).state is JobState.COMPLETED

    def test_a_node_dies(self, lab: Lab) -> None:
        node = lab.cluster.node_names[1]
        here = {"nodelist": node}
        lost = lab.submit("sleep 300", resources=Resources(extra={**here, "no-requeue": None}))
        again = lab.submit('test -n "$SLURM_RESTART_COUNT" || sleep 300', resources=Resources(extra=here))
        lab.running(lost)
        lab.running(again)
        lab.cluster.kill_node(node)
        try:
            seen = lab.end(lost)
            assert (seen.state, seen.cause) == (JobState.FAILED, Cause.NODE_FAILURE)
            [requeued] = lab.query(again)
            assert (requeued.state, requeued.restarts) == (JobState.PENDING, 1)
            pool = lab.backend.snapshot()
            assert (pool.total_cpus, pool.nodes) == (16, 2)
            assert pool.free_cpus <= 8
        finally:
            lab.cluster.start_node(node)
        assert lab.end(again).state is JobState.COMPLETED


def test_snapshot(lab: Lab) -> None:
    native_id = lab.submit("sleep 300", resources=Resources(cpus=3))
    waiting = lab.submit("true", count=5, resources=Resources(extra={"hold": None}))
    lab.running(native_id)
    pool = lab.backend.snapshot()
    assert (pool.nodes, pool.total_cpus, pool.free_cpus) == (2, 16, 13)
    assert pool.running >= 1
    assert pool.queued >= 5
    assert pool.memory == 16 * 2**30
    assert pool.max_array == 1001
    main = next(partition for partition in pool.partitions if partition.default)
    assert (main.name, main.nodes, main.total_cpus, main.available) == ("main", 2, 16, True)
    assert {partition.name: partition.time for partition in pool.partitions}["short"] == 300
    lab.backend.cancel(waiting)


def test_estimated_start(lab: Lab) -> None:
    whole = {"exclusive": None}
    first = lab.submit("sleep 300", resources=Resources.parse(nodes=2, time="10min", extra=whole))
    started = lab.running(first).started
    assert started is not None
    second = lab.submit("true", resources=Resources.parse(nodes=2, time="10min", extra=whole))
    seen = lab.wait(second, lambda seen: seen[0].estimated_start is not None)[0]
    assert seen.estimated_start is not None
    assert seen.estimated_start >= started + 600


def test_forgotten_jobs_are_absent_where_there_is_no_accounting(slurm_limited: PracticeSlurm, tmp_path: Path) -> None:
    lab = Lab(slurm_limited, tmp_path)
    native_id = lab.submit("true")
    lab.wait(native_id, lambda seen: not seen)
    # And a dependency on it counts as fulfilled, as submit() warns.
    assert lab.end(lab.submit("true", after=(native_id,))).state is JobState.COMPLETED


def test_a_controller_that_is_down(lab: Lab) -> None:
    native_id = lab.submit("sleep 300")
    lab.running(native_id)
    fresh = SlurmBackend(lab.cluster.env)
    submission = lab.submission("true")
    lab.cluster.stop_controller()
    try:
        with pytest.raises(PoolUnreachable) as raised:
            lab.backend.submit(submission)
        assert not isinstance(raised.value, SubmitUnclear)
        for order in (
            lambda: lab.backend.query([native_id]),
            lambda: lab.backend.find([submission.tag]),
            lambda: lab.backend.cancel(native_id),
            fresh.snapshot,
        ):
            with pytest.raises(PoolUnreachable):
                order()
    finally:
        lab.cluster.start_controller()
    assert lab.running(native_id).native_id == native_id
    assert lab.backend.find([submission.tag]) == {}
    assert lab.end(lab.submit("true")).state is JobState.COMPLETED


class TestAccounting:
    def test_cpu_time_and_peak_memory(self, accounting: Lab) -> None:
        body = f"exec {sys.executable} -c 'import time; x = bytearray(200 << 20); sum(range(10**7)); time.sleep(3)'"
        native_id = accounting.submit(body, resources=Resources.parse(memory="2G"))
        recorded(accounting, native_id)
        [seen] = accounting.query(native_id)
        assert seen.state is JobState.COMPLETED
        assert seen.cpu_seconds is not None
        assert seen.cpu_seconds > 0.05
        assert seen.peak_memory is not None
        assert 200 * 2**20 < seen.peak_memory < 2**30

    def test_out_of_memory(self, accounting: Lab) -> None:
        body = f"exec {sys.executable} -c 'import time; x = bytearray(400 << 20); time.sleep(300)'"
        native_id = accounting.submit(body, resources=Resources.parse(memory="50M"))
        recorded(accounting, native_id)
        [seen] = accounting.query(native_id)
        assert (seen.state, seen.cause) == (JobState.FAILED, Cause.OUT_OF_MEMORY)
        assert seen.peak_memory is not None
        assert seen.peak_memory > 50 * 2**20

    def test_a_job_on_a_named_cluster(self, accounting: Lab) -> None:
        cluster = accounting.command("sacctmgr", "-n", "-P", "show", "cluster", "format=Cluster")
        submission = accounting.submission("true", resources=Resources(extra={"clusters": cluster}))
        native_id = accounting.backend.submit(submission)
        assert native_id.endswith(f";{cluster}")
        assert accounting.end(native_id).state is JobState.COMPLETED
        forgotten(accounting, native_id.partition(";")[0])
        # This is the local cluster, so it is found without its name.
        assert accounting.backend.find([submission.tag]) == {submission.tag: native_id.partition(";")[0]}
        waiting = accounting.submit("true", resources=Resources(extra={"clusters": cluster, "hold": None}))
        assert accounting.query(waiting)[0].state is JobState.PENDING
        accounting.backend.cancel(waiting)
        assert accounting.end(waiting).state is JobState.CANCELLED

    def test_jobs_that_squeue_has_forgotten(self, accounting: Lab) -> None:
        array = accounting.submission("exit $SLURM_ARRAY_TASK_ID", count=2)
        native_id = accounting.backend.submit(array)
        cancelled = accounting.submit("sleep 300")
        accounting.running(cancelled)
        accounting.backend.cancel(cancelled)
        forgotten(accounting, native_id, cancelled)
        fresh = SlurmBackend(accounting.cluster.env)
        for _ in range(2):
            seen = sorted(fresh.query([native_id]), key=lambda one: one.index or 0)
            assert [(one.index, one.state, one.exit_code) for one in seen] == [
                (0, JobState.COMPLETED, 0),
                (1, JobState.FAILED, 1),
            ]
        [seen_cancelled] = fresh.query([cancelled])
        assert (seen_cancelled.state, seen_cancelled.cause) == (JobState.CANCELLED, Cause.CANCELLED)
        assert fresh.find([array.tag]) == {array.tag: native_id}
        assert fresh.query(["999999"]) == []

    def test_elements_that_ended_unseen_beside_some_that_run(self, accounting: Lab) -> None:
        body = "test $SLURM_ARRAY_TASK_ID = 0 || sleep 300"
        native_id = accounting.submit(body, count=2)
        deadline = time.monotonic() + DEADLINE
        while listed(accounting) & {f"{native_id}_0", f"{native_id}_1"} != {f"{native_id}_1"}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for backend in (accounting.backend, SlurmBackend(accounting.cluster.env)):
            seen = {one.index: one.state for one in backend.query([native_id])}
            assert seen == {0: JobState.COMPLETED, 1: JobState.RUNNING}

    def test_a_full_queue(self, accounting: Lab) -> None:
        user = accounting.command("id", "-un")
        accounting.command("sacctmgr", "-i", "add", "account", "few")
        accounting.command("sacctmgr", "-i", "add", "user", user, "account=few", "maxsubmitjobs=1")
        few = Resources(account="few", extra={"hold": None})
        accounting.submit("true", resources=few)
        with pytest.raises(SubmitLater, match="AssocMaxSubmitJobLimit"):
            accounting.submit("true", resources=few)
        with pytest.raises(SubmitRejected, match="Invalid account"):
            accounting.submit("true", resources=Resources(account="nosuch"))
        with pytest.raises(SubmitRejected, match="Invalid qos"):
            accounting.submit("true", resources=Resources(qos="nosuch"))


def listed(lab: Lab) -> set[str]:
    return set(lab.command("squeue", "-h", "-t", "all", "-o", "%i %F").split())


def forgotten(lab: Lab, *jobs: str) -> None:
    """Wait until squeue no longer lists these jobs, without the backend seeing anything."""
    deadline = time.monotonic() + DEADLINE
    while listed(lab) & set(jobs):
        assert time.monotonic() < deadline, f"still listed: {jobs}"
        time.sleep(0.2)


def recorded(lab: Lab, native_id: str) -> None:
    """Wait until the accounting database has a job's end."""
    deadline = time.monotonic() + DEADLINE
    while lab.command("sacct", "-n", "-P", "-X", "-j", native_id, "--format=State") not in ("COMPLETED", "FAILED"):
        assert time.monotonic() < deadline, f"no end of {native_id} in accounting"
        time.sleep(0.2)
