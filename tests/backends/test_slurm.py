"""Slurm's commands and parsers, on what a real Slurm has printed (``tests/fixtures/slurm.jsonl``)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_hybrid.backends import slurm_output
from jupyter_hybrid.backends.base import Submission
from jupyter_hybrid.backends.slurm import (
    SubmitLater,
    foreign_variables,
    job_name,
    order_error,
    parse_submit,
    ranges,
    submit_command,
    submit_error,
)
from jupyter_hybrid.backends.slurm_output import (
    STATES,
    elements,
    outcome,
    parse_config,
    parse_names,
    parse_sacct,
    parse_sinfo,
    parse_squeue,
    waiting_reason,
)
from jupyter_hybrid.errors import HybridError, PoolUnreachable, ResourceError, SubmitRejected, SubmitUnclear
from jupyter_hybrid.process import Completed
from jupyter_hybrid.spec import Cause, JobState, Resources

TAG = "k7f2q9xm1a.1.0"
RECORDS: Mapping[str, Mapping[str, Any]] = {
    record["name"]: record
    for line in (Path(__file__).parents[1] / "fixtures" / "slurm.jsonl").read_text().splitlines()
    if (record := json.loads(line))
}


def out(name: str) -> str:
    return str(RECORDS[name]["out"])


def refused(name: str) -> Exception:
    record = RECORDS[name]
    return submit_error(Completed((), int(record["rc"]), record["out"], record["err"]))


def submission(**changes: Any) -> Submission:
    plain = Submission(
        tag=TAG,
        name="train",
        script=Path("/data/run/script.sh"),
        logs=Path("/data/run/logs"),
        first=0,
        count=1,
        array=False,
        resources=Resources(),
    )
    return replace(plain, **changes)


def options(**changes: Any) -> dict[str, str]:
    argv = submit_command(submission(**changes))
    assert argv[0] == "sbatch"
    assert argv[-1] == "/data/run/script.sh"
    assert all(word.startswith("--") for word in argv[1:-1])
    return dict(word[2:].partition("=")[::2] for word in argv[1:-1])


class TestSubmit:
    def test_a_plain_job(self) -> None:
        assert options() == {
            "parsable": "",
            "job-name": f"train.{TAG}",
            "comment": TAG,
            "open-mode": "append",
            "requeue": "",
            "chdir": "/data/run",
            "output": "/data/run/logs/0.out",
            "nodes": "1",
            "ntasks-per-node": "1",
            "cpus-per-task": "1",
        }

    def test_all_resources(self) -> None:
        wanted = Resources.parse(
            nodes=2,
            tasks_per_node=3,
            cpus=4,
            gpus=2,
            memory=2**30 + 1,
            time="1-02:03:04",
            partition="p",
            qos="q",
            account="a",
            constraint="x&y",
            priority=-5,
            extra={"reservation": "the course", "exclusive": None, "gres-flags": "-1"},
        )
        got = options(resources=wanted, after=("12", "13;other"))
        assert (
            got.items()
            >= {
                "nodes": "2",
                "ntasks-per-node": "3",
                "cpus-per-task": "4",
                "gres": "gpu:2",
                "mem": "1025M",
                "time": "1-02:03:04",
                "signal": "B:USR2@90",
                "partition": "p",
                "qos": "q",
                "account": "a",
                "constraint": "x&y",
                "nice": "5",
                "dependency": "afterok:12:13",
                "kill-on-invalid-dep": "yes",
                "reservation": "the course",
                "exclusive": "",
                "gres-flags": "-1",
            }.items()
        )

    @pytest.mark.parametrize(
        ("changes", "array", "output"),
        [
            ({"array": True}, "0-0", "%a.out"),
            ({"count": 100}, "0-99", "%a.out"),
            ({"count": 10, "first": 1000, "array": True}, "0-9", "1000+%a.out"),
            ({"first": 7}, None, "7.out"),
        ],
    )
    def test_arrays_and_their_logs(self, changes: dict[str, Any], array: str | None, output: str) -> None:
        got = options(**changes)
        assert got.get("array") == array
        assert got["output"] == f"/data/run/logs/{output}"

    def test_a_percent_sign_in_the_log_folder_is_no_pattern(self) -> None:
        assert options(logs=Path("/data/100%j"))["output"] == "/data/100%%j/0.out"

    @pytest.mark.parametrize(
        ("seconds", "signal"), [(60, None), (179, None), (180, "B:USR2@60"), (600, "B:USR2@60"), (601, "B:USR2@90")]
    )
    def test_warning_ahead_of_the_walltime(self, seconds: int, signal: str | None) -> None:
        assert options(resources=Resources(time=timedelta(seconds=seconds))).get("signal") == signal

    def test_a_positive_priority_is_not_in_the_users_hands(self) -> None:
        assert "nice" not in options(resources=Resources(priority=10))

    @pytest.mark.parametrize("key", ["array", "wrap", "parsable", "Bad", "a b", "--mem", "a=b", "", "wait", "error"])
    def test_extra_options_that_would_break_the_submission(self, key: str) -> None:
        with pytest.raises(ResourceError, match="extra option"):
            submit_command(submission(resources=Resources(extra={key: "1"})))

    def test_a_dependency_of_the_users_own_does_not_replace_after(self) -> None:
        extra = Resources(extra={"dependency": "singleton"})
        assert options(resources=extra)["dependency"] == "singleton"
        with pytest.raises(ResourceError, match="'dependency'"):
            submit_command(submission(resources=extra, after=("7",)))

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("train", "train"),
            ('é名 "q" |pipe\n$(rm -rf /)`x`', "e_q_pipe_rm_-rf_x"),
            ("名", "job"),
            ("", "job"),
            ("-rf", "rf"),
            ("x" * 100, "x" * 40),
        ],
    )
    def test_job_names(self, name: str, expected: str) -> None:
        assert job_name(name, TAG) == f"{expected}.{TAG}"

    @given(st.text())
    def test_any_name_is_safe_and_its_tag_is_found_again(self, name: str) -> None:
        shown = job_name(name, TAG)
        assert set(shown) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")
        assert not shown.startswith(("-", "."))
        assert parse_names(f"17|PENDING|Priority|{shown}", [TAG]) == {TAG: "17"}

    def test_native_id(self) -> None:
        assert parse_submit(out("sbatch-parsable")) == "8606"
        assert parse_submit("Welcome to 2 clusters!\n17;east\n") == "17;east"
        assert parse_submit("Submitted batch job 17\n") is None


class TestSubmitErrors:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("err-partition", "Invalid partition name specified"),
            ("err-array-big", "Invalid job array specification"),
            ("err-constraint", "Invalid feature specification"),
            ("err-opt", "unrecognized option '--nosuchopt'"),
            ("err-time", "Invalid --time specification"),
            ("sbatch-license", "Invalid license specification"),
            ("sbatch-gres", "Requested node configuration is not available"),
            ("sbatch-toobig-mem", "Memory specification can not be satisfied"),
            ("err-empty", "Batch script is empty!"),
            ("lab2-err-account", "Invalid account or account/partition combination"),
            ("lab2-err-qos", "Invalid qos specification"),
            ("lab2-err-partition-group", "User's group not permitted to use this partition"),
        ],
    )
    def test_refusals_carry_slurms_own_words(self, name: str, words: str) -> None:
        error = refused(name)
        assert type(error) is SubmitRejected
        assert words in str(error)
        assert "sbatch:" not in str(error)

    def test_advice(self) -> None:
        assert "sinfo -s" in str(refused("err-partition"))
        assert "MaxArraySize" in str(refused("lab2-err-array-toomany"))

    @pytest.mark.parametrize("name", ["lab2-err-maxsubmit", "lab2-err-maxsubmit-array"])
    def test_a_full_queue_may_take_it_later(self, name: str) -> None:
        error = refused(name)
        assert isinstance(error, SubmitLater)
        assert error.temporary
        assert "AssocMaxSubmitJobLimit" in str(error)

    def test_a_controller_that_is_down_has_taken_nothing(self) -> None:
        error = refused("lab2-down-sbatch")
        assert isinstance(error, PoolUnreachable)
        assert not isinstance(error, SubmitUnclear)

    def test_a_controller_that_hangs_may_have_taken_it(self) -> None:
        assert isinstance(refused("lab2-hung-sbatch"), SubmitUnclear)

    @pytest.mark.parametrize("code", [-9, -15, 0])
    def test_an_sbatch_that_was_killed_or_said_nothing_may_have_submitted(self, code: int) -> None:
        assert isinstance(submit_error(Completed((), code, "", "")), SubmitUnclear)


class TestOrderErrors:
    @staticmethod
    def error(name: str) -> Exception | None:
        record = RECORDS[name]
        return order_error(Completed(("scancel", "34"), int(record["rc"]), record["out"], record["err"]))

    @pytest.mark.parametrize("name", ["lab2-hung-scancel", "lab2-down-scancel", "lab2-down-scontrol"])
    def test_not_reached(self, name: str) -> None:
        assert isinstance(self.error(name), PoolUnreachable)

    @pytest.mark.parametrize("name", ["lab2-other-scancel", "lab2-other-scontrol"])
    def test_another_users_job(self, name: str) -> None:
        error = self.error(name)
        assert isinstance(error, HybridError)
        assert not isinstance(error, PoolUnreachable)
        assert "Slurm refused scancel 34" in str(error)

    @pytest.mark.parametrize("name", ["lab3-hold-finished", "lab3-hold-unknown"])
    def test_what_has_ended_is_no_error(self, name: str) -> None:
        assert self.error(name) is None


class TestStates:
    @pytest.mark.parametrize(
        ("text", "reason", "status", "expected"),
        [
            ("COMPLETED", "None", "0", (JobState.COMPLETED, None, 0)),
            ("FAILED", "NonZeroExitCode", "768", (JobState.FAILED, Cause.USER_ERROR, 3)),
            ("FAILED", "None", "3:0", (JobState.FAILED, Cause.USER_ERROR, 3)),
            ("FAILED", "JobLaunchFailure", "9", (JobState.FAILED, Cause.USER_ERROR, 137)),
            ("FAILED", "None", "0:9", (JobState.FAILED, Cause.USER_ERROR, 137)),
            ("FAILED", "JobLaunchFailure", "4021", (JobState.FAILED, Cause.INFRASTRUCTURE, None)),
            ("FAILED", "None", "0:53", (JobState.FAILED, Cause.INFRASTRUCTURE, None)),
            ("FAILED", "BadConstraints", "1", (JobState.FAILED, Cause.SUBMIT_REJECTED, None)),
            ("FAILED", "None", "0:125", (JobState.FAILED, Cause.OUT_OF_MEMORY, None)),
            ("OUT_OF_MEMORY", "OutOfMemory", "125", (JobState.FAILED, Cause.OUT_OF_MEMORY, None)),
            ("OOM", "", "", (JobState.FAILED, Cause.OUT_OF_MEMORY, None)),
            ("CANCELLED by 1000", "", "0:0", (JobState.CANCELLED, Cause.CANCELLED, None)),
            ("CANCELLED+", "", "0:0", (JobState.CANCELLED, Cause.CANCELLED, None)),
            ("CANCELLED", "Dependency", "0", (JobState.CANCELLED, Cause.CANCELLED, None)),
            ("CANCELLED", "DependencyNeverSatisfied", "0", (JobState.CANCELLED, Cause.DEPENDENCY_FAILED, None)),
            ("TIMEOUT", "TimeLimit", "0", (JobState.TIMEOUT, Cause.TIMEOUT, None)),
            ("DEADLINE", "", "", (JobState.TIMEOUT, Cause.TIMEOUT, None)),
            ("NODE_FAIL", "NodeDown", "15", (JobState.FAILED, Cause.NODE_FAILURE, None)),
            ("PREEMPTED", "", "0", (JobState.FAILED, Cause.PREEMPTED, None)),
            ("BOOT_FAIL", "", "", (JobState.FAILED, Cause.INFRASTRUCTURE, None)),
            ("CG", "None", "256", (JobState.RUNNING, None, None)),
            ("PENDING", "DependencyNeverSatisfied", "0", (JobState.PENDING, None, None)),
        ],
    )
    def test_outcomes(
        self, text: str, reason: str, status: str, expected: tuple[JobState, Cause | None, int | None]
    ) -> None:
        assert outcome(text, reason, status) == expected

    def test_every_state_that_slurm_lists_is_known(self) -> None:
        listed = (
            "PENDING,RUNNING,SUSPENDED,COMPLETED,CANCELLED,FAILED,TIMEOUT,NODE_FAIL,PREEMPTED,BOOT_FAIL,DEADLINE,"
            "OUT_OF_MEMORY,COMPLETING,CONFIGURING,RESIZING,RESV_DEL_HOLD,REQUEUED,REQUEUE_FED,REQUEUE_HOLD,REVOKED,"
            "SIGNALING,SPECIAL_EXIT,STAGE_OUT,STOPPED"
        )
        assert set(listed.split(",")) <= STATES.keys()

    @pytest.mark.parametrize("flag", ["REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL", "REQUEUED", "SPECIAL_EXIT"])
    def test_a_job_that_may_run_again_has_not_ended(self, flag: str) -> None:
        assert not outcome(flag)[0].final

    def test_an_unknown_state_is_unknown_and_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        slurm_output._unknown_states.clear()
        with caplog.at_level(logging.WARNING):
            assert outcome("TELEPORTED")[0] is JobState.UNKNOWN
            assert outcome("TELEPORTED")[0] is JobState.UNKNOWN
        assert [record.message for record in caplog.records] == [
            "unknown Slurm job state 'TELEPORTED': shown as UNKNOWN"
        ]

    @pytest.mark.parametrize(
        ("reason", "meaning"),
        [
            ("Priority", "jobs of higher priority"),
            ("PartitionTimeLimit", "will never start"),
            ("QOSMaxCpuPerUserLimit", "as much running as you may"),
            ("AssocGrpCpuLimit", "limit of the account"),
            ("ReqNodeNotAvail, UnavailableNodes:n3", "down, drained or reserved"),
            ("job requeued in held state", "held after a failed start"),
        ],
    )
    def test_reasons_keep_slurms_word_and_explain_it(self, reason: str, meaning: str) -> None:
        assert waiting_reason(reason).startswith(f"{reason} (")
        assert meaning in waiting_reason(reason)

    def test_an_unknown_reason_is_shown_as_it_is(self) -> None:
        assert waiting_reason("FedJobLock") == "FedJobLock"


class TestSqueue:
    def test_a_node_failure_with_and_without_requeue(self) -> None:
        jobs = {job.native_id: job for job in parse_squeue(out("lab3-squeue"))}
        failed = jobs["26"]
        assert (failed.state, failed.cause, failed.host) == (JobState.FAILED, Cause.NODE_FAILURE, "node2")
        assert (failed.started, failed.ended) == (1795248696.0, 1795248699.0)
        again = jobs["27"]
        assert (again.state, again.restarts, again.estimated_start) == (JobState.PENDING, 1, 1795248820.0)
        assert again.started is None
        assert again.reason.startswith("BeginTime (")

    def test_a_folder_that_the_node_does_not_see_is_told(self) -> None:
        [seen] = parse_squeue("7|N/A|FAILED|53|0|1700000000|1700000000|node1|JobLaunchFailure|")
        assert seen.cause is Cause.INFRASTRUCTURE
        assert seen.reason.startswith("FAILED, JobLaunchFailure (the node could not enter the run folder")
        again = parse_sacct("7|FAILED|0:53|1700000000|1700000000|node1|00:00:00||mem=1G|None")["7", None]
        assert (again.cause, again.reason.partition(" (")[0]) == (Cause.INFRASTRUCTURE, "FAILED")
        assert "storage" in again.reason

    def test_the_record_of_a_refused_job(self) -> None:
        [job] = [job for job in parse_squeue(out("lab3-squeue")) if job.native_id == "29"]
        assert (job.state, job.cause, job.started) == (JobState.FAILED, Cause.SUBMIT_REJECTED, None)

    def test_array_elements_and_running_jobs(self) -> None:
        jobs = {(job.native_id, job.index): job for job in parse_squeue(out("lab3-squeue"))}
        assert jobs["13", 1000].state is JobState.PENDING
        assert [index for number, index in jobs if number == "23"] == list(range(1, 1000, 2))
        assert [index for number, index in jobs if number == "31"] == [0, 2, 4, 6, 8]
        assert jobs["25", 10].state is JobState.CANCELLED
        running = jobs["30", None]
        assert (running.state, running.reason, running.host) == (JobState.RUNNING, "", "node1")
        assert running.ended is None
        assert running.exit_code is None

    @given(st.text())
    def test_no_text_breaks_it(self, text: str) -> None:
        parse_squeue(text)
        parse_squeue("|".join([text] * 9))
        parse_squeue("12|3|" + "|".join([text] * 7))


class TestSacct:
    def test_endings(self) -> None:
        jobs = {number: job for (number, _), job in parse_sacct(out("lab3-sacct")).items()}
        assert {number: job.cause for number, job in jobs.items()} == {
            "1": None,
            "2": Cause.USER_ERROR,
            "3": Cause.USER_ERROR,
            "4": Cause.INFRASTRUCTURE,
            "5": Cause.OUT_OF_MEMORY,  # FAILED 0:9 with a peak of 178 MiB, 50 MiB asked for
            "6": Cause.OUT_OF_MEMORY,  # the same inside srun
            "8": Cause.CANCELLED,
            "9": Cause.DEPENDENCY_FAILED,
            "10": Cause.SUBMIT_REJECTED,
            "11": None,
        }
        assert jobs["11"].cpu_seconds == 2.444
        assert jobs["11"].peak_memory == 4668 * 1024
        assert jobs["3"].exit_code == 137
        assert jobs["9"].started is None

    @staticmethod
    def adapted(name: str, columns: str) -> str:
        """Bring a record of other columns into the order of SACCT_FORMAT; what it lacks is empty."""
        given_columns = columns.split(",")
        rows = [line.split("|") for line in out(name).splitlines() if not line.startswith("JobID|")]
        wanted = slurm_output.SACCT_FORMAT.split(",")
        return "\n".join(
            "|".join(dict(zip(given_columns, row, strict=False)).get(w, "") for w in wanted) for row in rows
        )

    def test_out_of_memory_in_a_step_only(self) -> None:
        text = self.adapted("lab2-cg-oom-srun-sacct", "JobID,JobName,State,ExitCode,DerivedExitCode,MaxRSS,Reason")
        assert parse_sacct(text)["39", None].cause is Cause.OUT_OF_MEMORY

    def test_out_of_memory_of_a_job_that_exits_with_0(self) -> None:
        text = self.adapted("lab2-cg-oom-child-sacct", "JobID,JobName,State,ExitCode,DerivedExitCode,MaxRSS,Reason")
        job = parse_sacct(text)["40", None]
        assert (job.state, job.cause) == (JobState.FAILED, Cause.OUT_OF_MEMORY)

    def test_the_last_run_of_a_requeued_job_counts(self) -> None:
        text = self.adapted("lab2-sacct-nodefail-D", "JobID,JobIDRaw,State,ExitCode,Submit,Start,End,NodeList")
        jobs = parse_sacct(text)
        assert (jobs["20", None].state, jobs["20", None].restarts) == (JobState.PENDING, 1)
        assert (jobs["19", None].state, jobs["19", None].cause) == (JobState.FAILED, Cause.NODE_FAILURE)
        assert jobs["21", 1].cause is Cause.NODE_FAILURE

    def test_a_preempted_job_that_waits_again_has_not_ended(self) -> None:
        jobs = parse_sacct(self.adapted("lab2-sacct-preempt-D", "JobID,State,ExitCode,Submit,Start,End"))
        assert jobs["28", 0].state is JobState.PENDING

    def test_array_elements_with_times_and_memory(self) -> None:
        columns = "JobID,JobIDRaw,State,ExitCode,DerivedExitCode,Start,End,Elapsed,MaxRSS,NodeList,Reason"
        jobs = parse_sacct(self.adapted("sacct-P", columns))
        assert sorted(jobs) == [("8607", index) for index in range(10)]
        job = jobs["8607", 8]
        assert (job.state, job.exit_code, job.peak_memory) == (JobState.FAILED, 1, 3232 * 1024)
        assert job.started is not None
        assert job.ended == job.started + 8

    def test_no_answer_for_what_it_does_not_know(self) -> None:
        assert parse_sacct(out("sacct-unknown")) == {}

    @given(st.text())
    def test_no_text_breaks_it(self, text: str) -> None:
        parse_sacct(text)
        parse_sacct("12_3|" + "|".join([text] * 9) + "\n12_3.batch|" + "|".join([text] * 9))


class TestFind:
    def test_names_of_any_kind(self) -> None:
        tags = ["kaaaaaaaaa.1.0", "kaaaaaaaab.1.0", "kaaaaaaaac.1.0", "kaaaaaaaad.1.0", "kaaaaaaaae.1.0"]
        # …ab's own name had a line break before the tag; no such name is ever submitted here. …ad was refused.
        assert parse_names(out("lab3-names"), tags) == {"kaaaaaaaaa.1.0": "26", "kaaaaaaaac.1.0": "28"}

    def test_a_refused_submission_in_accounting_is_none(self) -> None:
        assert parse_names(out("lab3-sacct-names"), ["kaaaaaaaaa.1.0"]) == {}

    def test_arrays_are_found_by_their_number(self) -> None:
        assert parse_names(f"17_[3-9]|PENDING|x|a.{TAG}\n17_2|RUNNING|node1|a.{TAG}", [TAG]) == {TAG: "17"}

    def test_a_job_on_another_cluster_is_found_with_its_cluster(self) -> None:
        for cluster, native_id in (("here", "17"), ("far-2", "17;far-2")):
            assert parse_names(f"{cluster}|17_[3-9]|PENDING|None assigned|a|b.{TAG}", [TAG], "here") == {TAG: native_id}
        assert parse_names(f"far|17|FAILED|None assigned|a.{TAG}", [TAG], "here") == {}

    @given(st.text(alphabet=st.characters(exclude_characters="\n\r"), max_size=20))
    def test_only_a_whole_tag_matches(self, text: str) -> None:
        assert parse_names(f"17|RUNNING|None|x.{text}{TAG}0", [TAG]) == {}


class TestSinfo:
    def test_gpus_and_nodes_in_several_partitions(self) -> None:
        pool = parse_sinfo(out("lab3-sinfo-gpu"))
        assert (pool.nodes, pool.free_cpus, pool.total_cpus) == (2, 11, 16)
        assert (pool.free_gpus, pool.total_gpus) == (3, 4)
        assert pool.memory == 16384 * 2**20
        main, short = pool.partitions
        assert (main.name, main.default, main.time, main.nodes) == ("main", True, None, 2)
        assert (short.name, short.default, short.time, short.free_cpus) == ("short", False, 300.0, 11)

    def test_nothing_is_free_on_a_drained_node(self) -> None:
        pool = parse_sinfo(out("lab3-sinfo-drained"))
        assert (pool.nodes, pool.free_cpus, pool.total_cpus, pool.free_gpus, pool.total_gpus) == (2, 5, 16, 1, 4)

    @pytest.mark.parametrize(
        ("state", "partition", "free"),
        [
            ("idle", "up", 8),
            ("mixed+", "up", 8),
            ("idle~", "up", 8),
            ("planned", "up", 8),
            ("idle*", "up", 0),
            ("down", "up", 0),
            ("draining", "up", 0),
            ("maint", "up", 0),
            ("idle", "down", 0),
            ("idle", "drain", 0),
        ],
    )
    def test_what_is_free(self, state: str, partition: str, free: int) -> None:
        line = f"n1|p|{partition}|1-00:00:00|{state}|0/8/0/8|1000|(null)|(null)|"
        pool = parse_sinfo(line)
        assert pool.free_cpus == free
        assert pool.partitions[0].available is (partition == "up")
        assert pool.partitions[0].time == 86400

    def test_memory_of_all_nodes(self) -> None:
        lines = [
            "n1|p*|up|infinite|mixed|1/7/0/8|1000|(null)|(null)|300|",
            "n1|q|up|infinite|mixed|1/7/0/8|1000|||300|",
        ]
        lines += ["n2|p*|up|infinite|idle|0/8/0/8|3000|||0|", "n3|p*|up|infinite|down|0/0/8/8|500|||0|"]
        pool = parse_sinfo("\n".join(lines))
        assert (pool.free_memory, pool.total_memory, pool.memory) == (3700 * 2**20, 4500 * 2**20, 3000 * 2**20)

    def test_several_kinds_of_gpu(self) -> None:
        gres, used = "gpu:a100:4(S:0-1),gpu:4,nvme:1", "gpu:a100:2(IDX:0,3),gpu:1(IDX:1),nvme:0"
        pool = parse_sinfo(f"n1|p*|up|infinite|mixed|1/7/0/8|1000|{gres}|{used}|")
        assert (pool.free_gpus, pool.total_gpus) == (5, 8)


def test_config() -> None:
    config = parse_config(out("scontrol-config"))
    assert config["AccountingStorageType"] == "accounting_storage/slurmdbd"
    assert (config["MaxArraySize"], config["SLURM_VERSION"]) == ("10001", "22.05.8")
    assert config["MinJobAge"] == "60 sec"


@given(st.sets(st.integers(0, 5000), min_size=1))
def test_ranges_are_the_indices(indices: set[int]) -> None:
    assert [index for part in ranges(indices) for index in elements(part)] == sorted(indices)


def test_no_indices_are_no_range() -> None:
    assert ranges([]) == []


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("N/A", [None]),
        ("7", [7]),
        ("0-3,7,10-20:5%2", [0, 1, 2, 3, 7, 10, 15, 20]),
        ("1-9:2", [1, 3, 5, 7, 9]),
        ("0-99999999999", [None]),
    ],
)
def test_elements(text: str, indices: list[int | None]) -> None:
    assert elements(text) == indices


def test_variables_of_the_user_and_of_an_outer_job_stay_out() -> None:
    outside = {"HOME": "/", "SQUEUE_PARTITION": "p", "SBATCH_PARTITION": "p", "SLURM_CONF": "c", "SLURM_CPUS": "1"}
    assert foreign_variables(outside) == ["SQUEUE_PARTITION"]
    inside = {**outside, "SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "5", "SLURMD_NODENAME": "n"}
    assert set(foreign_variables(inside)) == {
        "SQUEUE_PARTITION",
        "SLURM_CPUS",
        "SLURM_JOB_ID",
        "SLURM_MEM_PER_NODE",
        "SLURMD_NODENAME",
    }
