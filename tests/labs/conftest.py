"""Real schedulers for tests: ask for the fixture, and the test carries its marker.

`slurm` and `slurm_accounting` are practice clusters, one of each for a test process (with pytest-xdist one for each
worker). Where the packages are missing the tests are skipped with what to install; with CI=true they fail.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_hybrid.practice import PracticeSlurm, missing_commands, slurm_up

_MARKERS = {"slurm": ("slurm",), "slurm_accounting": ("slurm", "accounting")}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            for marker in _MARKERS.get(fixture, ()):
                item.add_marker(marker)


def _practice(accounting: bool) -> Iterator[PracticeSlurm]:
    missing = missing_commands(accounting)
    if missing and os.environ.get("CI") != "true":
        packages = "slurm-wlm slurm-client munge" + (" slurmdbd mariadb-server" if accounting else "")
        pytest.skip(f"no {', '.join(missing)}; apt-get install --no-install-recommends {packages}")
    # Not pytest's own folder: its path can be too long for sockets.
    folder = tempfile.mkdtemp(prefix="hy-")
    name = f"lab{os.getpid()}" + ("a" if accounting else "")
    cluster = PracticeSlurm(name, Path(folder), 2, 8, accounting)
    try:
        yield slurm_up(name, nodes=2, cpus=8, folder=folder, accounting=accounting, preemption=True, register=False)
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def slurm() -> Iterator[PracticeSlurm]:
    yield from _practice(accounting=False)


@pytest.fixture(scope="session")
def slurm_accounting() -> Iterator[PracticeSlurm]:
    yield from _practice(accounting=True)
