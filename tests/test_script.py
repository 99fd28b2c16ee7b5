"""The job script: read as the shell reads it, and run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jupyter_hybrid as hy
from jupyter_hybrid.script import render
from jupyter_hybrid.spec import Cause, JobSpec, Resources

DEADLINE = 60.0
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r"), min_size=1, max_size=20)


def script(folder: str = "/runs/a", *, pull: bool = False, **settings: Any) -> str:
    spec = JobSpec(
        id="abcdefghij", name="fit", pool="hpc", kind="function", tasks=1, array=False, batch=1,
        resources=Resources(), created=0.0, settings={"python": "/opt/bin/python", **settings},
    )  # fmt: skip
    text = render(spec, Path(folder), Path("/runs/.worker/1"), 2, 3, "SLURM_ARRAY_TASK_ID", pull, pull)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return text


def run_line(text: str) -> list[str]:
    (line,) = [line for line in text.split("\n") if line.startswith("exec ")]
    return shlex.split(line)[1:]


WORKER = ["/opt/bin/python", "/runs/.worker/1/batch.py", "/runs/a", "2", "$HYBRID_BATCH"]


@pytest.mark.parametrize("kind", ["apptainer", "singularity"])
def test_a_container_sees_the_runs_the_working_directory_and_its_binds(kind: str) -> None:
    image = "/images/it's $(mine).sif"
    container = {"kind": kind, "image": image, "bind": ["/scratch:/data:ro", "/my data"]}
    text = script(container=container, directory="/home/me")
    binds = ["--bind", "/runs", "--bind", "/home/me", "--bind", "/scratch:/data:ro", "--bind", "/my data"]
    assert run_line(text) == [kind, "exec", *binds, image, *WORKER]
    assert f"command -v {kind} " in text
    assert f"{kind} is not there on the node: load it in 'prologue:' of the pool" in text.replace("'\"'\"'", "'")


def test_a_folder_is_bound_once() -> None:
    text = script(container={"kind": "apptainer", "image": "i.sif", "bind": ["/runs", "/work"]}, directory="/work")
    assert run_line(text)[:7] == ["apptainer", "exec", "--bind", "/runs", "--bind", "/work", "i.sif"]


@given(words, st.lists(words, max_size=3))
def test_image_and_binds_are_quoted(image: str, binds: list[str]) -> None:
    container = {"kind": "apptainer", "image": image, "bind": binds}
    found = run_line(script(container=container, directory="/runs"))
    expected = list(dict.fromkeys(["/runs", *binds]))
    assert found == ["apptainer", "exec", *(w for bind in expected for w in ("--bind", bind)), image, *WORKER]


def test_without_a_container_python_is_run() -> None:
    assert run_line(script()) == WORKER


@pytest.mark.parametrize("started", [False, True])
def test_a_batch_that_comes_when_all_tasks_are_claimed_starts_no_python(tmp_path: Path, started: bool) -> None:
    # One that has begun before may have claims of its own, and goes on with them.
    for name in ("claims", "status"):
        (tmp_path / name).mkdir()
    (tmp_path / "claims" / "2-all").touch()
    if started:
        (tmp_path / "status" / "8.owner").symlink_to("1")
    text = script(str(tmp_path), pull=True, python="/bin/echo", prologue=["echo prologue"])
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "5"}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=True)
    events = [json.loads(line) for path in tmp_path.glob("status/*.jsonl") for line in path.read_text().splitlines()]
    if started:
        assert (events, done.stdout) == ([], f"prologue\n/runs/.worker/1/batch.py {tmp_path} 2 8\n")
    else:
        assert ([(event["e"], event["why"]) for event in events], done.stdout) == ([("end", "done")], "")
        assert (tmp_path / "status" / "8.jsonl").exists()


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def write(**pool: Any) -> None:
        path = tmp_path / "pools.yaml"
        path.write_text(json.dumps({"pools": {"desk": {"kind": "local", **pool}}}))
        monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(path))

    return write


def test_the_prologue_runs_before_the_job_and_knows_the_environment(configure: Callable[..., None]) -> None:
    configure(
        environment={"WORDS": "two words"},
        prologue=['export LINE="$WORDS!"', 'greet() { echo "prologue: $1"; }', "greet 'it is'\ngreet me", "cd /"],
    )

    def look() -> tuple[str, str]:
        import os

        print("the job")
        return os.environ["LINE"], os.getcwd()

    job = hy.Executor("desk").submit(look)
    assert job.result(DEADLINE) == ("two words!", "/")
    assert job.logs() == "prologue: it is\nprologue: me\nthe job\n"


CONTAINER = """\
#!/bin/bash
# Does to its arguments what a container's runtime does, without the container.
[ "$1" = exec ] && shift
while [ "$1" = --bind ]; do binds="$binds[$2]"; shift 2; done
export IMAGE="$1" BINDS="$binds"
shift
exec "$@"
"""


def test_a_job_runs_through_the_runtime_of_its_container(
    configure: Callable[..., None], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(CONTAINER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    configure(container={"image": "/my image.sif", "bind": ["/usr:/data dir"]}, python=sys.executable)
    found = hy.Executor("desk").submit(lambda: dict(os.environ)).result(DEADLINE)
    assert found["IMAGE"] == "/my image.sif"
    assert found["BINDS"] == f"[{home / 'runs'}][{tmp_path}][/usr:/data dir]"


def test_a_runtime_that_is_missing_is_told(
    configure: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("bash", "date"):  # all that the script needs until then, and no container
        (tmp_path / command).symlink_to(f"/bin/{command}")
    configure(container={"image": "i.sif"}, environment={"PATH": str(tmp_path)})
    job = hy.Executor("desk").submit(abs, 1)
    with pytest.raises(hy.HybridError, match="apptainer is not there on the node: load it in 'prologue:' of the pool"):
        job.result(DEADLINE)
    assert job.cause is Cause.INFRASTRUCTURE
