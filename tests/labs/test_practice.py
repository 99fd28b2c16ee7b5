"""The practice cluster against the real Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from jupyter_hybrid.errors import HybridError
from jupyter_hybrid.practice import PracticeSlurm, _must_be, slurm_down, slurm_load, slurm_up
from jupyter_hybrid.process import run

DEADLINE = 120.0


def wait(reached: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.05)


def command(cluster: PracticeSlurm, *argv: str) -> str:
    done = run(argv, env=cluster.env)
    assert done.code == 0, done.words
    return done.out.strip()


def sbatch(cluster: PracticeSlurm, folder: Path, *options: str) -> str:
    return command(cluster, "sbatch", "--parsable", f"--output={folder}/%A_%a.out", f"--chdir={folder}", *options)


def state(cluster: PracticeSlurm, job: str) -> str:
    return command(cluster, "squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def processes_of(cluster: PracticeSlurm) -> list[str]:
    """Find the cluster's processes without the module under test."""
    mark = f"SLURM_CONF={cluster.conf}\0".encode()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # psutil's own environ() stops where a daemon's title was written over it.
            if process.pid != os.getpid() and mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.append(process.name())
    return sorted(found)


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder of a short path for a cluster of the test's own; the cluster is ended in any case."""
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path_factory.mktemp("jupyter")))
    folder = tmp_path_factory.mktemp("p")
    yield folder
    if (folder / "practice.json").exists():
        slurm_down(folder)


def test_array_runs_on_all_nodes(slurm: PracticeSlurm, tmp_path: Path) -> None:
    script = 'echo "$SLURMD_NODENAME" > $SLURM_ARRAY_TASK_ID.tmp; mv $SLURM_ARRAY_TASK_ID.tmp $SLURM_ARRAY_TASK_ID.done'
    job = sbatch(slurm, tmp_path, "--array=0-19", f"--wrap=sleep 0.5; {script}")
    wait(lambda: len(list(tmp_path.glob("*.done"))) == 20, "20 results")
    assert {path.read_text().strip() for path in tmp_path.glob("*.done")} == {"node1", "node2"}
    wait(lambda: set(state(slurm, job).split()) == {"COMPLETED"}, "all tasks completed")


def test_status(slurm: PracticeSlurm) -> None:
    status = slurm.status()
    assert status["up"]
    assert list(status["daemons"]) == ["munged", "slurmctld", "node1", "node2"]
    for name, daemon in status["daemons"].items():
        assert daemon["alive"]
        assert psutil.Process(daemon["pid"]).name() == (name if not name.startswith("node") else "slurmd")
    assert set(status["nodes"]) == {"node1", "node2"}
    json.dumps(status)


def test_listens_on_loopback_only(slurm: PracticeSlurm) -> None:
    for daemon in slurm.status()["daemons"].values():
        for connection in psutil.Process(daemon["pid"]).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip == "127.0.0.1"


def test_job_over_its_memory_is_killed(slurm: PracticeSlurm, tmp_path: Path) -> None:
    hungry = "import time; block = b'x' * (400 << 20); time.sleep(600)"
    job = sbatch(slurm, tmp_path, "--mem=100M", f'--wrap={sys.executable} -c "{hungry}"')
    wait(lambda: state(slurm, job) not in ("PENDING", "RUNNING", "COMPLETING"), "the job is killed")
    assert state(slurm, job) == "FAILED"
    assert "exceeded memory limit" in "".join(path.read_text() for path in tmp_path.glob("*.out"))


@pytest.mark.slurm
@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="needs root and the memory controller"
)
def test_cgroups_report_out_of_memory(short: Path, tmp_path: Path) -> None:
    cluster = slurm_up("cgroups", nodes=1, folder=short, cgroups=True, register=False)
    hungry = "import time; block = b'x' * (400 << 20); time.sleep(600)"
    job = sbatch(cluster, tmp_path, "--mem=100M", f'--wrap={sys.executable} -c "{hungry}"')
    wait(lambda: state(cluster, job) not in ("PENDING", "RUNNING", "COMPLETING"), "the job is killed")
    assert state(cluster, job) == "OUT_OF_MEMORY"


def test_high_partition_preempts_low(slurm: PracticeSlurm, tmp_path: Path) -> None:
    low = [sbatch(slurm, tmp_path, "-p", "low", "-c", "8", "--requeue", "--wrap=sleep 600") for _ in range(2)]
    wait(lambda: all(state(slurm, job) == "RUNNING" for job in low), "both low jobs run")
    high = sbatch(slurm, tmp_path, "-p", "high", "-c", "8", "--wrap=true")
    wait(lambda: state(slurm, high) == "COMPLETED", "the high job is done")
    wait(lambda: "PENDING" in [state(slurm, job) for job in low], "a low job is back in the queue")
    command(slurm, "scancel", *low)


def test_node_failure(slurm: PracticeSlurm, tmp_path: Path) -> None:
    lost = sbatch(slurm, tmp_path, "-w", "node2", "--no-requeue", "--wrap=exec sleep 600")
    again = sbatch(slurm, tmp_path, "-w", "node2", "--requeue", "--wrap=exec sleep 600")
    wait(lambda: state(slurm, lost) == state(slurm, again) == "RUNNING", "both jobs run")
    slurm.kill_node("node2")
    assert not slurm.status()["daemons"]["node2"]["alive"]
    wait(lambda: state(slurm, lost) == "NODE_FAIL", "the failure of the node is seen")
    wait(lambda: state(slurm, again) == "PENDING", "the other job is requeued")
    slurm.start_node("node2")
    assert slurm.status()["up"]
    wait(lambda: state(slurm, again) == "RUNNING", "the other job runs again")
    command(slurm, "scancel", again)


def test_jobs_outlive_a_controller_outage(slurm: PracticeSlurm, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    job = sbatch(slurm, tmp_path, f"--wrap=cat {go} > done")
    wait(lambda: state(slurm, job) == "RUNNING", "the job runs")
    slurm.stop_controller()
    status = slurm.status()
    assert not status["up"]
    assert status["nodes"] == {"node1": "unknown", "node2": "unknown"}
    slurm.start_controller()
    assert state(slurm, job) == "RUNNING"
    go.write_text("went on")
    wait(lambda: state(slurm, job) == "COMPLETED", "the job is done")
    assert (tmp_path / "done").read_text() == "went on"


def test_unknown_node(slurm: PracticeSlurm) -> None:
    with pytest.raises(HybridError, match="has no node 'node9'; it has node1, node2"):
        slurm.kill_node("node9")


@pytest.mark.slurm
def test_up_registers_and_down_leaves_nothing(short: Path, tmp_path: Path) -> None:
    cluster = slurm_up("course", nodes=2, cpus=2, memory="1G", folder=short, settings={"MaxArraySize": 11})
    fragment = Path(os.environ["JUPYTER_CONFIG_DIR"]) / "hybrid.d" / "practice-course.yaml"
    assert yaml.safe_load(fragment.read_text()) == cluster.pool_fragment()
    assert slurm_load(short) == cluster
    before = cluster.status()["daemons"]
    assert slurm_up("course", folder=short) == slurm_up("course", nodes=2, cpus=2, folder=short) == cluster
    for other in ({"nodes": 3}, {"cpus": 4}):
        with pytest.raises(HybridError, match=r"up already, with 2 nodes of 2 cpus, without.*slurm down --name course"):
            slurm_up("course", folder=short, **other)
    with pytest.raises(HybridError, match="without accounting"):
        _must_be(cluster, None, None, accounting=True)
    assert cluster.status()["daemons"] == before
    assert "MaxArraySize            = 11" in command(cluster, "scontrol", "show", "config")
    with pytest.raises(AssertionError, match="Invalid job array"):
        sbatch(cluster, tmp_path, "--array=0-11", "--wrap=true")
    job = sbatch(cluster, tmp_path, "--wrap=trap '' TERM; sleep 600 & wait; sleep 600")
    wait(lambda: state(cluster, job) == "RUNNING", "a job runs")
    slurm_down(short)
    assert processes_of(cluster) == []
    assert not short.exists()
    assert not fragment.exists()
    with pytest.raises(HybridError, match="no practice cluster"):
        slurm_load(short)


@pytest.mark.slurm
def test_up_cleans_up_after_a_killed_up(short: Path) -> None:
    code = f"from jupyter_hybrid.practice import slurm_up; slurm_up('half', nodes=2, folder={str(short)!r})"
    starting = subprocess.Popen([sys.executable, "-c", code])
    wait(lambda: processes_of(PracticeSlurm("half", short, 2, 8)), "a daemon runs")
    starting.kill()
    starting.wait()
    cluster = slurm_up("half", nodes=2, folder=short)
    assert processes_of(cluster) == ["munged", "slurmctld", "slurmd", "slurmd", "slurmscriptd"]
    cluster.down()
    assert processes_of(cluster) == []


@pytest.mark.slurm
def test_a_daemon_that_does_not_start_is_shown_with_its_log(short: Path) -> None:
    with pytest.raises(HybridError, match=r"(?s)slurmctld has ended.*slurmctld\.log:.*fatal: mkdir"):
        slurm_up(
            "broken",
            nodes=1,
            folder=short,
            settings={"StateSaveLocation": str(short / "no" / "folder")},
            register=False,
        )
    assert processes_of(PracticeSlurm("broken", short, 1, 8)) == []


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("jupyter_hybrid.practice._DAEMON_FOLDERS", ())
    with pytest.raises(HybridError) as caught:
        slurm_up(folder=tmp_path / "p")
    assert "munged, slurmctld, slurmd, sinfo" in str(caught.value)
    assert "sudo apt-get install --no-install-recommends slurm-wlm slurm-client munge" in str(caught.value)
    assert not (tmp_path / "p").exists()


@pytest.mark.slurm
def test_refused_folders(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(HybridError, match="not empty"):
        slurm_up(folder=tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(HybridError, match="characters too long"):
        slurm_up(folder=tmp_path / ("x" * 100))


@pytest.mark.parametrize("name", ["", "a/b", "a b", "ä", "../x"])
def test_refused_names(name: str) -> None:
    with pytest.raises(HybridError, match="must be letters"):
        slurm_up(name)


def test_accounting_knows_a_finished_job(slurm_accounting: PracticeSlurm, tmp_path: Path) -> None:
    job = sbatch(
        slurm_accounting, tmp_path, f"--wrap={sys.executable} -c \"b = b'x' * (64 << 20); import time; time.sleep(3)\""
    )

    def finished() -> bool:
        return (
            command(slurm_accounting, "sacct", "-n", "-P", "-X", "-j", job, "-o", "State,ExitCode") == "COMPLETED|0:0"
        )

    wait(finished, "sacct shows the job as completed")
    peak = command(slurm_accounting, "sacct", "-n", "-P", "-j", f"{job}.batch", "-o", "MaxRSS")
    assert int(peak.removesuffix("K")) > 64 << 10
