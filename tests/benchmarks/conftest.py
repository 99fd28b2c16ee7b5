"""Benchmarks: each figure is a ratio to a floor measured in the same run; a table is printed at the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ui.conftest import chromium, lab  # noqa: F401

from jupyter_hybrid.practice import PracticeSlurm, missing_commands, slurm_up

_ROWS: list[tuple[str, str, str, str]] = []


class Table:
    """Collects figures and holds them against their bounds."""

    def show(self, what: str, measured: float, note: str = "") -> None:
        """Add a row that has no bound."""
        _ROWS.append((what, f"{measured:.3g}", "", note))

    def hold(self, what: str, measured: float, bound: float, unit: str = "", note: str = "") -> None:
        """Add a row, and fail if a figure is above its bound."""
        _ROWS.append((what, f"{measured:.3g}{unit}", f"≤ {bound:.3g}{unit}", note))
        assert measured <= bound, f"{what}: {measured:.3g}{unit} is above {bound:.3g}{unit} ({note})"


@pytest.fixture(scope="session")
def table() -> Table:
    return Table()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    terminalreporter.section("benchmarks")
    rows = [("what", "measured", "bound", "how"), *_ROWS]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        terminalreporter.write_line("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[PracticeSlurm]:
    missing = missing_commands()
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"no {', '.join(missing)}")
    folder = tempfile.mkdtemp(prefix="hy-bench-")
    practice = slurm_up(f"bench{os.getpid()}", nodes=4, cpus=8, memory="64G", folder=folder, register=False)
    try:
        yield practice
    finally:
        practice.down()


@pytest.fixture
def pool(cluster: PracticeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a pool on the practice cluster, for this process and those it starts."""
    config = tmp_path / "hybrid.yaml"
    config.write_text(f"default: hpc\npools:\n  hpc:\n    kind: slurm\n    env: {{SLURM_CONF: {cluster.conf}}}\n")
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(config))
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    return "hpc"
