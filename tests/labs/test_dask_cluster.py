"""A live Dask cluster on a real Slurm."""

from __future__ import annotations

import importlib.util
import operator
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.errors import SubmitRejected
from jupyter_hybrid.practice import PracticeSlurm

if importlib.util.find_spec("dask_jobqueue") is None:
    pytest.skip("no dask-jobqueue", allow_module_level=True)
cloudpickle.register_pickle_by_value(sys.modules[__name__])

DEADLINE = 120.0


@pytest.fixture
def pool(slurm: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    config = tmp_path / "hybrid.yaml"
    config.write_text(
        f"pools:\n  hpc:\n    kind: slurm\n    env: {{SLURM_CONF: {slurm.conf}}}\n"
        "    environment: {LAB_WORDS: 'two words'}\n    prologue: ['export LAB_LINE=\"$LAB_WORDS!\"']\n"
    )
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(config))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    return "hpc"


def wait(reached: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < deadline, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.05)


def queue(cluster: PracticeSlurm) -> list[str]:
    argv = ["squeue", "-h", "-t", "PENDING,RUNNING,COMPLETING", "-o", "%i %j"]
    done = subprocess.run(argv, env={**os.environ, **cluster.env}, capture_output=True, text=True, check=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line.split()[1].startswith("dask-worker.")]


def facts() -> tuple[str | None, ...]:
    names = ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURM_JOB_PARTITION", "LAB_LINE")
    return (*(os.environ.get(name) for name in names), os.getcwd())


def test_aggregation_on_the_pool(slurm: PracticeSlurm, pool: str, tmp_path: Path) -> None:
    array = hy.Executor("local").array(lambda seed: {"score": seed / 2}, range(40), batch=10)
    resources = {"cpus": 2, "memory": "600M", "time": "10min", "partition": "high"}
    with hy.dask_cluster(pool, jobs=1, interface="lo", **resources) as cluster, cluster.get_client() as client:
        job_id, cpus, partition, line, directory = client.submit(facts, pure=False).result(DEADLINE)
        assert (cpus, partition, line, directory) == ("2", "high", "two words!", str(tmp_path))
        assert [job_id] == queue(slurm)
        assert list(client.nthreads().values()) == [2]
        limits = [worker["memory_limit"] for worker in client.scheduler_info()["workers"].values()]
        assert limits == [pytest.approx(600 * 2**20, rel=0.01)]

        frame = array.to_dataframe()
        assert frame["score"].mean().compute() == 9.75
        assert array.reduce(lambda a, b: {"score": a["score"] + b["score"]}) == {"score": 390.0}
        where = array.to_bag().map(lambda value: facts()[0]).distinct().compute()
        assert where == [job_id]

        # A job that ends early is replaced.
        subprocess.run(["scancel", str(job_id)], env={**os.environ, **slurm.env}, check=True)
        wait(lambda: queue(slurm) not in ([], [job_id]), "another job is there")
        assert array.to_bag().map(operator.itemgetter("score")).sum().compute() == 390.0
    wait(lambda: not queue(slurm), "no job is left")


def test_job_that_waits_is_cancelled_on_close(slurm: PracticeSlurm, pool: str) -> None:
    cluster = hy.dask_cluster(pool, jobs=2, interface="lo", extra={"begin": "now+1hour"})
    wait(lambda: len(queue(slurm)) == 2, "two jobs wait")
    cluster.close()
    wait(lambda: not queue(slurm), "no job is left")


def test_refusal_has_slurms_words(slurm: PracticeSlurm, pool: str) -> None:
    with pytest.raises(SubmitRejected, match=r"[Ii]nvalid partition"):
        hy.dask_cluster(pool, interface="lo", partition="nowhere")
    assert queue(slurm) == []


def test_one_node_a_job(pool: str) -> None:
    with pytest.raises(hy.HybridError, match="nodes=2: a job of a Dask cluster has one node"):
        hy.dask_cluster(pool, nodes=2)
