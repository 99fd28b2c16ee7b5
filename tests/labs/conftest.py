"""Real schedulers for tests: ask for the fixture, and the test carries its marker.

`slurm` and `slurm_accounting` are practice clusters, one of each for a test process (with pytest-xdist one for each
worker); `slurm_limited` and `slurm_enforcing` are small ones with limits, which forget ended jobs after seconds. Where
the packages are missing the tests are skipped with what to install; with CI=true they fail.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from jupyter_hybrid.practice import PracticeSlurm, missing_commands, slurm_up

_MARKERS = {
    "slurm": ("slurm",),
    "slurm_accounting": ("slurm", "accounting"),
    "slurm_limited": ("slurm",),
    "slurm_enforcing": ("slurm", "accounting"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            for marker in _MARKERS.get(fixture, ()):
                item.add_marker(marker)


def _practice(
    kind: str, accounting: bool, nodes: int = 2, cpus: int = 8, settings: Mapping[str, str | int] | None = None
) -> Iterator[PracticeSlurm]:
    missing = missing_commands(accounting)
    if missing and os.environ.get("CI") != "true":
        packages = "slurm-wlm slurm-client munge" + (" slurmdbd mariadb-server" if accounting else "")
        pytest.skip(f"no {', '.join(missing)}; apt-get install --no-install-recommends {packages}")
    # Not pytest's own folder: its path can be too long for sockets.
    folder = tempfile.mkdtemp(prefix="hy-")
    name = f"{kind}{os.getpid()}" + ("a" if accounting else "")
    cluster = PracticeSlurm(name, Path(folder), nodes, cpus, accounting)
    try:
        yield slurm_up(
            name,
            nodes=nodes,
            cpus=cpus,
            folder=folder,
            accounting=accounting,
            preemption=True,
            settings=settings,
            register=False,
        )
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def slurm() -> Iterator[PracticeSlurm]:
    yield from _practice("lab", accounting=False)


@pytest.fixture(scope="session")
def slurm_accounting() -> Iterator[PracticeSlurm]:
    yield from _practice("lab", accounting=True)


@pytest.fixture(scope="session")
def slurm_limited() -> Iterator[PracticeSlurm]:
    yield from _practice("lim", False, 1, 2, {"MinJobAge": 2, "MaxArraySize": 5})


@pytest.fixture(scope="session")
def slurm_enforcing() -> Iterator[PracticeSlurm]:
    yield from _practice("lim", True, 1, 2, {"MinJobAge": 2, "AccountingStorageEnforce": "limits,qos"})
