"""REST and events with real jobs of the local pool, submitted by this process and by others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.server.events import SCHEMAS
from jupyter_hybrid.spec import JobState

ROW = {
    "id", "name", "pool", "kind", "state", "cause", "reason", "advice", "array", "tasks", "done", "failed", "running",
    "created", "started", "ended", "native_id", "notebook", "notebook_browser", "cell", "function", "held", "cpus",
    "memory", "time", "cpu_seconds", "peak_memory", "cost", "seq",
}  # fmt: skip
SUBMIT = "import jupyter_hybrid as hy; job = hy.Executor('local').submit(pow, 2, 10); print(job.id)"
PRICED = """\
default: here
pools:
  here:
    kind: local
    prices: {cpu_hour: 3600, gpu_hour: 0}
    environment: {STUDY: the-name-of-the-study, SHORT: "1"}
    cpus: 2
"""


async def test_a_job_of_another_process_from_pending_to_its_result(
    api: Any, listen: Any, elsewhere: Callable[..., str], jp_root_dir: Path
) -> None:
    pools = (await api("pools"))["pools"]
    assert [pool["name"] for pool in pools if pool["kind"] == "local"] == ["local"]
    async with listen() as listener:
        job_id = await asyncio.to_thread(elsewhere, SUBMIT)
        message = await listener.until(
            lambda said: any(row["id"] == job_id and row["state"] == "COMPLETED" for row in said.get("jobs", ()))
        )
        assert message["schema_id"] == SCHEMAS["jobs"]
        assert message["seq"] == (await api("health"))["seq"]
        assert not message["more"]
        assert not message["reset"]
    job = await api.ended(job_id)
    assert set(job) >= ROW
    assert (job["state"], job["tasks"], job["done"], job["attempts"]) == ("COMPLETED", 1, 1, 1)
    assert job["folder"].endswith(job_id)
    assert job["folder_browser"] is None  # not below what the file browser shows
    assert job["batches"] == [
        {"batch": 0, "state": "COMPLETED", "host": job["batches"][0]["host"], "native_id": job["native_id"]}
    ]
    assert set((await api("jobs"))["jobs"][0]) == ROW
    assert (await api(f"jobs/{job_id}/tasks")) == {"total": 1, "states": "d"}
    script = (await api(f"jobs/{job_id}/script"))["script"]
    assert script.startswith("#!/bin/bash")
    assert job_id in script
    (result,) = (await api(f"jobs/{job_id}/results", verify=1))["results"]
    assert (result["task"], result["intact"]) == (0, True)
    (await asyncio.to_thread((Path(job["folder"]) / result["file"]).unlink))
    (result,) = (await api(f"jobs/{job_id}/results"))["results"]
    assert result["intact"] is False


def work(x: int) -> int:
    if x % 3 == 2:
        raise ValueError(f"no {x % 2}")
    print(f"task {x} says über", flush=True)
    return x


async def test_an_array_with_failures(api: Any) -> None:
    array = hy.Executor("local").array(work, range(9), batch=5)
    job = await api.ended(array.id)
    assert (job["state"], job["cause"], job["done"], job["failed"]) == ("FAILED", "USER_ERROR", 6, 3)
    assert job["failures"] == [
        {"message": "ValueError: no 0", "count": 2, "tasks": [2, 8]},
        {"message": "ValueError: no 1", "count": 1, "tasks": [5]},
    ]
    assert await api(f"jobs/{array.id}/tasks") == {"total": 9, "states": "ddfddfddf"}
    (task,) = (await api(f"jobs/{array.id}/tasks", index=5))["tasks"]
    assert (task["state"], task["cause"], task["reason"]) == ("FAILED", "USER_ERROR", "ValueError: no 1")
    assert task["batch"] == 1
    failed = await api(f"jobs/{array.id}/tasks", state="f", offset=1, limit=1)
    assert [task["index"] for task in failed["tasks"]] == [5]
    part = await api(f"jobs/{array.id}/logs/0", task=1)
    assert (part["text"], part["offset"], part["next"], part["end"]) == ("task 1 says über\n", 0, 18, True)
    whole = (await api(f"jobs/{array.id}/logs/0"))["text"]
    assert whole.index("task 0") < whole.index("task 1") < whole.index("task 4")
    text, offset = "", 0
    while True:  # in small parts that cut characters in two
        part = await api(f"jobs/{array.id}/logs/0", offset=offset, limit=7)
        text, offset = text + part["text"], part["next"]
        if part["end"]:
            break
    assert text == whole
    assert (await api(f"jobs/{array.id}/logs/0", offset=-5))["text"] == "ber\n"  # not half an ü
    results = await api(f"jobs/{array.id}/results", limit=4)
    assert [result["task"] for result in results["results"]] == [0, 1, 3, 4]
    results = await api(f"jobs/{array.id}/results", limit=4, cursor=results["next"])
    assert ([result["task"] for result in results["results"]], results["next"]) == ([6, 7], None)
    await api(f"jobs/{array.id}/logs/2", 404)
    await api(f"jobs/{array.id}/tasks", 404, index=9)
    await api(f"jobs/{array.id}/tasks", 400, state="x")
    await api(f"jobs/{array.id}/logs/1", 400, task=1)  # it is in the other batch

    answer = await api(f"jobs/{array.id}/retry", method="POST", body={"tasks": "failed"})
    assert answer["job"]["ended"] is None
    job = await api.ended(array.id)
    assert (job["attempts"], job["done"], job["failed"]) == (2, 6, 3)
    assert [each["batch"] for each in job["batches"]] == [2]
    await api(f"jobs/{array.id}/retry", method="POST", body={"tasks": "all", "resources": {"cpus": 1}})
    job = await api.ended(array.id)
    assert (job["attempts"], [each["batch"] for each in job["batches"]]) == (3, [3, 4])


async def test_retry_says_what_is_wrong(api: Any) -> None:
    job = hy.Executor("local").submit(pow, 2, 3)
    await api.ended(job.id)
    answer = await api(f"jobs/{job.id}/retry", 409, method="POST")
    assert "nothing to run again" in answer["message"]
    for body in ({"tasks": "some"}, {"resources": {"memmory": "1G"}}, {"resources": {"cpus": [1]}}, [], {"other": 1}):
        await api(f"jobs/{job.id}/retry", 400, method="POST", body=body)


async def test_hold_release_and_cancel(api: Any, pools: Callable[[str], Path], tmp_path: Path) -> None:
    pools("default: here\npools:\n  here:\n    kind: local\n    cpus: 1\n")
    gate = tmp_path / "gate"

    def wait(gate: Path) -> None:
        import time

        while not gate.exists():
            time.sleep(0.02)

    first = hy.Executor("here").submit(wait, gate)
    await api.job(first.id, lambda job: job["state"] == "RUNNING")
    second = hy.Executor("here").submit(pow, 2, 3)
    await api.job(second.id, lambda job: job["state"] == "PENDING" and not job["held"])
    answer = await api(f"jobs/{second.id}/hold", method="POST")
    assert answer["job"]["held"]
    await api(f"jobs/{first.id}/hold", 409, method="POST")
    await api(f"jobs/{first.id}", 409, method="DELETE")
    gate.touch()
    await api.ended(first.id)
    row = await api.job(second.id, lambda job: job["reason"] == "held by its user")
    assert (row["state"], row["held"]) == ("PENDING", True)
    answer = await api(f"jobs/{second.id}/release", method="POST")
    assert not answer["job"]["held"]
    assert (await api.ended(second.id))["state"] == "COMPLETED"
    await api(f"jobs/{second.id}/cancel", 409, method="POST")
    gate.unlink()
    third = hy.Executor("here").submit(wait, gate)
    await api(f"jobs/{third.id}/cancel", method="POST")
    job = await api.ended(third.id)
    assert (job["state"], job["cause"]) == ("CANCELLED", "CANCELLED")
    assert job["advice"]


async def test_a_log_is_followed_while_it_is_written(api: Any, tmp_path: Path) -> None:
    def write(gate: str) -> None:
        import os
        import time

        print("first", flush=True)
        while not os.path.exists(gate):
            time.sleep(0.02)
        print("second", flush=True)

    job = hy.Executor("local").submit(write, str(tmp_path / "gate"))

    async def first() -> Any:
        job_is = await api(f"jobs/{job.id}")
        return job_is["state"] == "RUNNING" and (await api(f"jobs/{job.id}/logs/0"))["text"] and job_is

    await api.until(first, "the first line")
    part = await api(f"jobs/{job.id}/logs/0")
    assert (part["text"], part["end"]) == ("first\n", False)
    assert (await api(f"jobs/{job.id}/logs/0", offset=part["next"]))["text"] == ""
    (tmp_path / "gate").touch()
    await api.ended(job.id)
    part = await api(f"jobs/{job.id}/logs/0", offset=part["next"])
    assert (part["text"], part["end"]) == ("second\n", True)


async def test_removed_jobs_are_told(api: Any, listen: Any) -> None:
    job = hy.Executor("local").submit(pow, 2, 3)
    folder = Path((await api.ended(job.id))["folder"])
    seq = (await api("health"))["seq"]
    async with listen() as listener:
        assert await api(f"jobs/{job.id}", 204, method="DELETE") is None
        await listener.until(lambda said: job.id in said.get("removed", ()))
    assert not folder.exists()
    await api(f"jobs/{job.id}", 404)
    answer = await api("jobs", since=seq)
    assert (answer["removed"], answer["jobs"], answer["reset"]) == ([job.id], [], False)
    assert (await api("jobs", since=10**9))["reset"]


async def test_a_job_without_its_run_folder_is_still_shown_and_can_be_removed(api: Any) -> None:
    import shutil

    job = hy.Executor("local").submit(pow, 2, 3)
    shutil.rmtree((await api.ended(job.id))["folder"])
    shown = await api(f"jobs/{job.id}")
    assert (shown["folder"], shown["batches"], shown["state"]) == (None, [], "COMPLETED")
    await api(f"jobs/{job.id}/script", 404)
    await api(f"jobs/{job.id}/logs/0", 404)
    await api(f"jobs/{job.id}", 204, method="DELETE")


async def test_lists_are_filtered_sorted_and_paged(api: Any) -> None:
    executor = hy.Executor("local")
    jobs = [hy.Executor("local", name=f"job {n % 3}").submit(pow, 2, n) for n in range(6)]
    jobs.append(executor.submit(work, 2))
    for job in jobs:
        await api.ended(job.id)
    listed = await api("jobs")
    assert [row["id"] for row in listed["jobs"]] == [job.id for job in reversed(jobs)]
    assert (listed["total"], listed["counts"], listed["next"]) == (7, {"COMPLETED": 6, "FAILED": 1}, None)
    for order, key in (
        ("-created", lambda row: -row["created"]),
        ("created", lambda row: row["created"]),
        ("name", lambda row: (row["name"], row["id"])),
        ("state", lambda row: (row["state"], row["id"])),
    ):
        found: list[Any] = []
        cursor: dict[str, str] = {}
        while True:
            page = await api("jobs", sort=order, limit=2, **cursor)
            assert len(page["jobs"]) <= 2
            found += page["jobs"]
            if page["next"] is None:
                break
            cursor = {"cursor": page["next"]}
        assert len(found) == 7
        assert found == sorted(found, key=key)
    assert (await api("jobs", state="FAILED"))["total"] == 1
    assert (await api("jobs", state="failed,completed"))["total"] == 7
    assert (await api("jobs", name="job 1"))["total"] == 2
    assert (await api("jobs", pool="other"))["total"] == 0
    moment = listed["jobs"][3]["created"]
    assert (await api("jobs", after=moment))["total"] == 4
    assert (await api("jobs", before=moment))["total"] == 4
    seen, since = set(), {"since": 0, "limit": 2}
    while True:
        page = await api("jobs", **since)
        seen |= {row["id"] for row in page["jobs"]}
        if page["next"] is None:
            break
        since["cursor"] = page["next"]
    assert seen == {job.id for job in jobs}
    for wrong in (
        {"state": "DONE"}, {"limit": 0}, {"limit": "x"}, {"after": "nan"}, {"sort": "pool"}, {"since": -1},
        {"cursor": "x"}, {"cursor": page["next"] or "W10="}, {"limit": 10**30},
    ):  # fmt: skip
        await api("jobs", 400, **wrong)


async def test_cost_checkpoints_environment_and_folder(
    api: Any, pools: Callable[[str], Path], jp_root_dir: Path
) -> None:
    config = pools(PRICED)
    config.write_text(PRICED.replace("    cpus", f"    storage: {jp_root_dir / 'runs'}\n    cpus"))

    def save() -> None:
        import os

        with open(os.path.join(os.environ["HYBRID_FOLDER"], "checkpoint", "state.bin"), "w") as file:
            file.write("12345")
        print("in the study", os.environ["STUDY"], flush=True)

    job = hy.Executor("here").submit(save)
    shown = await api.ended(job.id)
    assert shown["state"] == "COMPLETED", shown["reason"]
    assert shown["folder_browser"] == f"runs/{job.id}"
    assert shown["cost"] > 0  # a cpu-second costs one
    (row,) = (await api("jobs"))["jobs"]
    assert row["cost"] == pytest.approx(row["ended"] - row["started"])
    (checkpoint,) = shown["checkpoints"]
    assert (checkpoint["name"], checkpoint["size"]) == ("state.bin", 5)
    assert [each["job"] for each in (await api("checkpoints"))["checkpoints"]] == [job.id]
    log = await api(f"jobs/{job.id}/logs/0")
    assert log["text"] == "in the study " + "*" * len("the-name-of-the-study") + "\n"
    script = (await api(f"jobs/{job.id}/script"))["script"]
    assert "the-name-of-the-study" not in script
    assert "export STUDY='***'" in script
    assert "export SHORT='***'" in script


async def test_pools_metrics_and_the_rest(api: Any, jp_fetch: Any, listen: Any) -> None:
    job = hy.Executor("local").submit(pow, 2, 3)
    await api.ended(job.id)
    pool = await api("pools/local")
    assert (pool["reachable"], pool["default"], pool["active"]) == (True, True, 0)
    assert 0 < pool["cpus_free"] <= pool["cpus_total"]
    assert 0 < pool["memory_free"] <= pool["memory_total"]
    await api("pools/other", 404)
    response = await jp_fetch("hybrid/api/v1/metrics")
    assert response.headers["Content-Type"].startswith("text/plain")
    text = response.body.decode()
    assert 'hybrid_jobs{pool="local",state="COMPLETED"} 1.0' in text
    assert 'hybrid_pool_reachable{pool="local"} 1.0' in text
    document = await api("openapi.json")
    assert document["openapi"].startswith("3.")
    await api("nothing", 404)
    await api("jobs", 405, method="POST", body={})


async def test_a_pool_that_does_not_answer_says_since_when(api: Any, pools: Callable[[str], Path]) -> None:
    begun = time.time()
    pools("pools: {far: {kind: slurm, env: {SLURM_CONF: /nowhere/slurm.conf}}}")

    async def look() -> Any:
        pool = await api("pools/far")
        return pool if pool["reachable"] is False else None

    pool = await api.until(look, "the pool is known to be unreachable")
    assert begun <= pool["unreachable_since"] <= time.time()
    assert pool["error"]
    assert (pool["cpus_free"], pool["memory_free"]) == (None, None)
    assert (await api("pools/local"))["reachable"] is True  # the others answer


async def test_jobs_of_a_notebook(api: Any, elsewhere: Callable[..., str], jp_root_dir: Path) -> None:
    hy.Executor("local").submit(pow, 2, 3)
    notebook = str(jp_root_dir / "study" / "fit.ipynb")
    program = "import os, sys; from IPython import InteractiveShell; InteractiveShell.instance()\n"
    job = elsewhere(f"{program}os.environ['JPY_SESSION_NAME'] = sys.argv[1]\n{SUBMIT}", notebook)
    found = await api("jobs", notebook=notebook)
    assert [row["id"] for row in found["jobs"]] == [job]
    assert found["jobs"][0]["notebook_browser"] == "study/fit.ipynb"


async def test_the_doctor(api: Any) -> None:
    await api("doctor", 404, pool="other")
    checks = (await api("doctor", pool="local"))["checks"]
    assert {check["check"] for check in checks if check["pool"] == "local"} >= {"scheduler", "storage", "round trip"}
    assert all(check["ok"] for check in checks), checks


async def test_a_wrong_configuration_is_told(api: Any, pools: Callable[[str], Path]) -> None:
    path = pools("pools:\n  here:\n    kind: lokal\n")
    answer = await api("pools", 500)
    assert answer["error"] == "configuration"
    assert f"{path}:3" in answer["message"]
    assert (await api("jobs"))["jobs"] == []
    assert (await api("health"))["status"] == "ok"


async def test_a_replaced_store_is_told(api: Any, listen: Any, home: Path) -> None:
    job = hy.Executor("local").submit(pow, 2, 3)
    await api.ended(job.id)
    async with listen() as listener:
        for _ in range(20):
            default_store().update_job(job.id, 1, state=JobState.COMPLETED, ended=time.time())
        await listener.until(lambda said: said.get("seq", 0) >= 20)
        (home / "store.sqlite").unlink()
        await listener.until(lambda said: said.get("reset", False))
    assert (await api("jobs"))["total"] == 0
