"""The doctor and the shell command on a real Slurm, also while its controller is away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import jupyter_hybrid as hy
from jupyter_hybrid import doctor
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.practice import PracticeSlurm, missing_commands

COMMAND = str(Path(sys.executable).with_name("jupyter-hybrid"))
DEADLINE = 180.0
"""Seconds; Slurm's commands give up after 10 to 20 s each when there is no controller."""


@pytest.fixture
def pool(slurm: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    config = slurm.pool_fragment()
    config["pools"][slurm.name]["limits"] = {"poll_min": "100ms", "poll_max": "1s"}
    rejected = {**config["pools"][slurm.name], "resources": {"partition": "nosuch"}}
    config["pools"]["rejected"] = rejected
    path = tmp_path / "pools.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(path))
    return slurm.name


@pytest.fixture
def no_controller(slurm: PracticeSlurm) -> Iterator[PracticeSlurm]:
    slurm.stop_controller()
    try:
        yield slurm
    finally:
        slurm.start_controller()


def cli(*argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [COMMAND, *argv], capture_output=True, text=True, timeout=DEADLINE, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def found(report: doctor.Report, name: str, pool: str) -> doctor.Check:
    (check,) = [check for check in report.checks if (check.pool, check.name) == (pool, name)]
    return check


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_working_cluster_and_a_partition_that_is_not_there(pool: str, home: Path) -> None:
    report = doctor.run([pool, "rejected"], DEADLINE)
    working = [check for check in report.checks if check.pool == pool]
    assert [check.name for check in working if check.status == doctor.FAILURE] == [], report
    assert "sbatch" in found(report, "commands", pool).text
    assert re.search(r"version \d+\.\d+\S*, 2 nodes, 16 of 16 cpus free", found(report, "scheduler", pool).text)
    limits = found(report, "limits", pool).text
    assert "arrays of up to " in limits
    assert "no accounting database" in limits
    assert "by node " in found(report, "round trip", pool).text
    trip = found(report, "round trip", "rejected")
    assert trip.status == doctor.FAILURE
    assert "invalid partition" in trip.text.lower()
    assert "'resources:' of pool 'rejected'" in trip.advice
    # Nothing is left of the good one.
    assert [row["pool"] for row in hy.jobs()] == ["rejected"]
    assert len([path for path in (home / "runs").iterdir() if not path.name.startswith(".")]) == 1


@pytest.mark.accounting
def test_an_accounting_database_is_seen(
    slurm_accounting: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pools.yaml"
    path.write_text(yaml.safe_dump(slurm_accounting.pool_fragment()))
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(path))
    report = doctor.run([slurm_accounting.name], DEADLINE)
    assert report.ok, report
    assert "accounting database" in found(report, "limits", slurm_accounting.name).text
    assert "no accounting" not in found(report, "limits", slurm_accounting.name).text


def test_a_request_that_cannot_start_is_cancelled(pool: str, slurm: PracticeSlurm) -> None:
    subprocess.run(
        ["scontrol", "update", "PartitionName=main", "State=DOWN"], env={**os.environ, **slurm.env}, check=True
    )
    try:
        trip = found(doctor.run([pool], timeout=5.0), "round trip", pool)
    finally:
        subprocess.run(
            ["scontrol", "update", "PartitionName=main", "State=UP"], env={**os.environ, **slurm.env}, check=True
        )
    assert trip.status == doctor.FAILURE
    assert "no result within 5 s" in trip.text
    queue = ["squeue", "-h", "-o", "%i"]
    until(lambda: not subprocess.run(queue, env={**os.environ, **slurm.env}, capture_output=True, check=True).stdout)
    assert hy.jobs() == []


def test_without_a_controller(pool: str, no_controller: PracticeSlurm) -> None:
    said: Any = json.loads(cli("doctor", pool, "--json", code=1).stdout)
    checks = {check["name"]: check for check in said["checks"] if check["pool"] == pool}
    assert checks["commands"]["status"] == "ok"
    assert checks["scheduler"]["status"] == "failure"
    assert checks["scheduler"]["text"].startswith("unreachable since 2")
    assert checks["storage"]["text"].endswith("it was not there and has been made")
    assert checks["round trip"]["status"] == "skipped"


SUBMIT = """
import sys, time
import jupyter_hybrid as hy
job = hy.Executor(sys.argv[1]).submit(time.sleep, 600)
while job.state is not hy.JobState.RUNNING:
    time.sleep(0.02)
print(job.id)
"""


def test_the_shell_while_the_controller_is_away(pool: str, slurm: PracticeSlurm) -> None:
    # The process that has submitted is gone: nobody else tracks the pool.
    argv = [sys.executable, "-c", SUBMIT, pool]
    job_id = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=True).stdout.strip()
    slurm.stop_controller()
    try:
        # The list comes though Slurm does not, with the last known state.
        listed = cli("jobs")
        assert re.search(rf"{job_id} .*RUNNING", listed.stdout)
        assert f"pool '{pool}' is unreachable since 2" in listed.stderr
        assert json.loads(cli("jobs", "--json").stdout)[0]["pool_unreachable_since"] is not None
        said = cli("cancel", job_id, code=1)
        assert f"{job_id}: pool '{pool}' cannot be reached" in said.stdout
        assert default_store().job(job_id).state is hy.JobState.RUNNING
    finally:
        slurm.start_controller()
    # Whoever tracks next delivers it.
    cli("track", "--until-idle")
    assert default_store().job(job_id).state is hy.JobState.CANCELLED
    assert cli("jobs").stderr == ""


def test_jobs_are_followed_and_cancelled_from_another_process(pool: str, tmp_path: Path) -> None:
    job = hy.Executor(pool).submit(time.sleep, 600)
    until(lambda: job.state is hy.JobState.RUNNING)
    assert json.loads(cli("cancel", job.id, "--json").stdout)[0]["state"] == "CANCELLED"
    assert cli("wait", job.id, code=1).stdout.startswith(job.id)


@pytest.mark.slurm
def test_a_practice_cluster_from_the_shell(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing_commands() and os.environ.get("CI") != "true":
        pytest.skip(f"no {', '.join(missing_commands())}")
    monkeypatch.setenv("XDG_STATE_HOME", str(home.parent / "state"))
    name = f"shell{os.getpid()}"
    assert "no practice cluster" in cli("practice", "slurm", "status", "--name", name, code=1).stderr
    try:
        said = cli("practice", "slurm", "up", "--name", name, "--nodes", "1", "--cpus", "2").stdout
        assert f"%%slurm --pool {name} " in said
        assert f"jupyter hybrid practice slurm down --name {name}" in said
        status = json.loads(cli("practice", "slurm", "status", "--name", name, "--json").stdout)
        assert (status["up"], status["nodes"]) == (True, {"node1": "idle"})
        assert "node1  idle" in cli("practice", "slurm", "status", "--name", name).stdout
        assert f"{name}  slurm  2/2" in cli("pools").stdout
        assert "1 pool working" in cli("doctor", name).stdout
    finally:
        cli("practice", "slurm", "down", "--name", name)
    assert name not in cli("pools").stdout
