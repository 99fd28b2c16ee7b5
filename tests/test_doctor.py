"""The doctor on pools of this machine, working and broken."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid import doctor
from jupyter_hybrid.doctor import FAILURE, OK, SKIPPED, WARNING, Check, Report
from jupyter_hybrid.errors import ConfigError
from jupyter_hybrid.pool import get_pool

DEADLINE = 120.0
OTHER_PYTHON = Path("~/.pyenv/versions/3.12.1/bin/python").expanduser()


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "pools.yaml"
        path.write_text(text)
        monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(path))
        return path

    return write


@pytest.fixture(autouse=True)
def local(configure: Callable[[str], Path]) -> None:
    configure("pools: {local: {kind: local}}")


def found(report: Report, name: str, pool: str = "local") -> Check:
    (check,) = [check for check in report.checks if (check.pool, check.name) == (pool, name)]
    return check


def left(home: Path) -> list[str]:
    return [path.name for path in (home / "runs").iterdir() if not path.name.startswith(".")]


def test_a_working_pool(home: Path) -> None:
    told: list[str] = []
    report = doctor.run(["local"], DEADLINE, told.append)
    assert report.ok, report
    names = ["configuration", "scheduler", "storage", "round trip", "python", "packages", "folder", "clock"]
    assert [check.name for check in report.checks if check.pool == "local"] == names
    assert os.uname().nodename in found(report, "round trip").text
    assert sys.executable in found(report, "python").text
    assert "cloudpickle" in found(report, "packages").text
    assert str(home / "runs") in found(report, "storage").text
    assert "agrees to within" in found(report, "clock").text
    assert told[-1] == "local: a job there and back"
    assert left(home) == []
    assert hy.jobs() == []


def test_one_broken_pool_does_not_stop_the_others(home: Path, tmp_path: Path, configure: Callable[[str], Path]) -> None:
    (tmp_path / "file").touch()
    path = configure(f"""\
pools:
  nopython:
    kind: local
    python: /nonexistent/python
  nostorage:
    kind: local
    storage: {tmp_path / "file" / "runs"}
  greedy:
    kind: local
    resources: {{nodes: 9}}
  nocommands:
    kind: slurm
    env: {{PATH: /nonexistent}}
  breaks:
    kind: local
    prologue: exit 3
  good:
    kind: local
""")
    report = doctor.run(timeout=DEADLINE)
    assert not report.ok
    assert {check.pool for check in report.checks if check.status == FAILURE} == {
        "nopython",
        "nostorage",
        "greedy",
        "nocommands",
        "breaks",
    }
    python = found(report, "round trip", "nopython")
    assert "/nonexistent/python is not there on the node" in python.text
    assert f"'python:' of pool 'nopython' ({path}:2) → a Python 3." in python.advice
    storage = found(report, "storage", "nostorage")
    assert "cannot be written" in storage.text
    assert f"'storage:' of pool 'nostorage' ({path}:5)" in storage.advice
    assert found(report, "round trip", "nostorage").status == SKIPPED
    greedy = found(report, "round trip", "greedy")
    assert "9 nodes, it is one machine" in greedy.text
    assert f"change 'resources:' of pool 'greedy' ({path}:8)" in greedy.advice
    commands = found(report, "commands", "nocommands")
    assert commands.text.startswith("not on PATH: sbatch, squeue")
    assert f"PATH under 'env:' of pool 'nocommands' ({path}:11)" in commands.advice
    assert "unreachable since 2" in found(report, "scheduler", "nocommands").text
    assert found(report, "round trip", "nocommands").status == SKIPPED
    breaks = found(report, "round trip", "breaks")
    assert "before its worker began (exit status 3)" in breaks.text
    assert "jupyter hybrid logs" in breaks.advice
    assert found(report, "round trip", "good").status == OK
    assert len(left(home)) == 2  # those whose logs tell why


def test_a_storage_folder_that_was_made_is_told(tmp_path: Path, configure: Callable[[str], Path]) -> None:
    root = tmp_path / "made"
    path = configure(f"pools: {{hpc: {{kind: slurm, storage: {root}}}, desk: {{kind: local, storage: {root}}}}}")
    first, second = doctor._storage(get_pool("hpc")), doctor._storage(get_pool("hpc"))
    assert root.is_dir()
    assert first.text.endswith("it was not there and has been made")
    assert first.status == WARNING  # a folder of this machine, for a cluster
    assert f"if the nodes do not see it, remove it and set 'storage:' of pool 'hpc' ({path}:1)" in first.advice
    assert (second.status, "made" in second.text.removeprefix(str(root))) == (OK, False)
    root.rmdir()
    assert doctor._storage(get_pool("desk")).status == OK


@pytest.mark.skipif(not OTHER_PYTHON.exists(), reason=f"no {OTHER_PYTHON}")
@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="the other Python is of the same series")
def test_another_minor_version_of_python(configure: Callable[[str], Path]) -> None:
    path = configure(f"pools:\n  other:\n    kind: local\n    python: {OTHER_PYTHON}\n")
    trip = found(doctor.run(["other"], DEADLINE), "round trip", "other")
    version = "{}.{}".format(*sys.version_info)
    assert trip.status == FAILURE
    assert f"the worker's Python is 3.12 ({OTHER_PYTHON}" in trip.text
    assert f"'python:' of pool 'other' ({path}:2) → a Python {version} on the nodes" in trip.advice


def test_a_missing_package_is_named(tmp_path: Path, configure: Callable[[str], Path]) -> None:
    # A Python of the same version without any packages.
    import venv

    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    configure(f"pools:\n  bare:\n    kind: local\n    python: {python}\n")
    trip = found(doctor.run(["bare"], DEADLINE), "round trip", "bare")
    assert trip.status == FAILURE
    assert trip.advice.endswith(f"is missing on the node: {python} -m pip install {trip.advice.split()[0]}")
    assert trip.advice.split()[0] in ("xxhash", "cloudpickle")


def test_a_full_queue_is_told_and_nothing_stays_in_it(home: Path, configure: Callable[[str], Path]) -> None:
    configure("pools: {one: {kind: local, cpus: 1, limits: {poll_min: 50ms}}}")
    blocker = hy.Executor("one").submit(time.sleep, 600)
    end = time.monotonic() + DEADLINE
    while blocker.state is not hy.JobState.RUNNING:
        assert time.monotonic() < end
        time.sleep(0.01)
    trip = found(doctor.run(["one"], timeout=3.0), "round trip", "one")
    assert trip.status == FAILURE
    assert trip.text.startswith("no result within 3 s: job ")
    assert re.search(r" was (NEW|PENDING|PENDING, waits for free slots); it was cancelled$", trip.text)
    assert "--timeout" in trip.advice
    assert left(home) == [blocker.id]


def test_unknown_pools_and_wrong_configuration(configure: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="no pool 'hpc'"):
        doctor.run(["local", "hpc"])
    path = configure("pools: {local: {kind: lokal}}")
    report = doctor.run()
    assert not report.ok
    assert f"{path}:1: " in report.checks[0].text
    assert "the configuration is wrong" in repr(report)


def test_a_data_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JUPYTER_HYBRID_HOME", str(tmp_path / "file" / "data"))
    report = doctor.run(["local"])
    assert not report.ok
    assert "JUPYTER_HYBRID_HOME" in report.checks[0].advice


def test_reports_as_text_html_and_json() -> None:
    checks = [
        Check(None, "configuration", OK, "none"),
        Check("a<b", "scheduler", FAILURE, "first\nsecond <line>", "do this"),
        Check("c", "clock", WARNING, "late"),
        Check("c", "round trip", SKIPPED, ""),
    ]
    report = Report(checks)
    assert repr(report).splitlines() == [
        "  ✓ configuration none",
        "",
        "pool a<b",
        "  ✗ scheduler     first",
        "      second <line>",
        "      → do this",
        "",
        "pool c",
        "  ! clock         late",
        "  - round trip",
        "",
        "not working: a<b, 1 warning",
    ]
    shown = report._repr_html_()
    assert "second &lt;line&gt;" in shown
    assert "<line>" not in shown
    assert json.loads(json.dumps(report.to_json()))["checks"][1] == {
        "pool": "a<b",
        "name": "scheduler",
        "status": "failure",
        "text": "first\nsecond <line>",
        "advice": "do this",
    }
    assert Report(checks[2:]).ok
    assert repr(Report(checks[2:])).endswith("1 pool working, 1 warning")


def node(**changes: object) -> dict[str, object]:
    return {**doctor.probe(doctor._PACKAGES, "/", "/"), **changes}


@pytest.mark.parametrize(
    ("low", "high", "status", "words"),
    [
        (-0.3, 0.1, OK, "agrees to within 0.30 s"),
        (-30.0, 4.0, OK, "agrees to within 30.00 s"),  # a long wait says nothing of the clock
        (6.0, 7.0, WARNING, "at least 6 s ahead"),
        (-70.0, -60.0, WARNING, "at least 60 s behind"),
    ],
)
def test_clocks(low: float, high: float, status: str, words: str) -> None:
    check = list(doctor._from_node(get_pool("local"), node(), 0.3, low, high))[-1]
    assert (check.name, check.status) == ("clock", status)
    assert words in check.text


def test_packages_of_other_series() -> None:
    versions = dict(node()["versions"])  # type: ignore[call-overload]
    check = doctor._packages(get_pool("local"), node(versions={**versions, "numpy": "1.20.3", "pandas": None}))
    assert check.status == WARNING
    assert "1.20.3 there" in check.text
    assert f"numpy=={versions['numpy']} pandas=={versions['pandas']}" in check.advice
    check = doctor._packages(get_pool("local"), node(versions={**versions, "IPython": None, "jupyter_hybrid": None}))
    assert check.status == FAILURE
    assert check.advice == f"IPython is missing on the node: {sys.executable} -m pip install ipython"


def test_a_folder_that_is_not_on_the_node() -> None:
    checks = doctor._from_node(get_pool("local"), node(directory=False), 0.3, -0.1, 0.1)
    (check,) = [check for check in checks if check.name == "folder"]
    assert check.status == WARNING
    assert os.getcwd() in check.text
