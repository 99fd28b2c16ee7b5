"""Completion on the lines of the magics, as IPython asks for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import jupyter_hybrid as hy
from jupyter_hybrid.backends.base import PartitionSnapshot, PoolSnapshot
from jupyter_hybrid.pool import default_store

Complete = Callable[[str], list[str]]

POOLS = """
pools:
  here: {kind: local}
  hpc: {kind: slurm}
  course: {kind: slurm}
"""


@pytest.fixture
def complete(tmp_path: Path) -> Iterator[Complete]:
    (tmp_path / "hybrid.yaml").write_text(POOLS)
    for name, partitions in (("hpc", ("short", "long")), ("course", ("teach",))):
        snapshot = PoolSnapshot(1, 1, 1, partitions=tuple(PartitionSnapshot(each, 1, 1, 1) for each in partitions))
        default_store().set_pool(name, snapshot=json.dumps(asdict(snapshot)), snapshot_time=time.time())
    config = Config()
    config.HistoryManager.enabled = False
    config.HistoryManager.hist_file = ":memory:"
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=config)
    shell.run_line_magic("load_ext", "jupyter_hybrid")

    def complete(line: str) -> list[str]:
        with provisionalcompleter():  # what a kernel asks
            return [each.text for each in shell.Completer.completions(line, len(line))]

    try:
        yield complete
    finally:
        shell.restore_sys_module_state()
        InteractiveShell.clear_instance()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%%slurm --par", ["--partition"]),
        ("%%slurm --cpus 2 --dr", ["--dry-run"]),
        ("%%slurm --pool ", ["hpc", "course"]),
        ("%%slurm --pool=c", ["course"]),
        ("%%local --pool ", ["here"]),
        ("%%slurm --partition ", ["short", "long"]),
        ("%%slurm --partition l", ["long"]),
        ("%%slurm --pool course --partition ", ["teach"]),
        ("%%slurm --pool=course --partition=", ["teach"]),
        ("%hybrid l", ["logs"]),
        ("%hybrid logs x --t", ["--tail"]),
        ("%hybrid retry x --mem", ["--memory"]),
        ("%hybrid jobs --pool h", ["here", "hpc"]),
        ("%hybrid jobs --state co", ["completed"]),
        ("%hybrid doctor he", ["here"]),
    ],
)
def test_options_pools_partitions_and_verbs(line: str, expected: list[str], complete: Complete) -> None:
    assert complete(line) == expected


def test_an_option_without_value_is_followed_by_options(complete: Complete) -> None:
    assert {"--memory", "--cache", "--out"} <= set(complete("%%slurm --wait "))


def test_jobs_complete_by_id_and_by_variable(complete: Complete) -> None:
    job = hy.Executor("here", name="sum").submit(sum, [1, 2])
    InteractiveShell.instance().user_ns["my_job"] = job
    for line in ("%%local --after ", "%%local --after other,", "%hybrid logs ", "%hybrid result "):
        assert complete(line) == ["my_job", job.id]
    assert complete(f"%hybrid cancel {job.id[:4]}") == [job.id]
    assert complete("%hybrid wait my") == ["my_job"]
    assert job.result(60) == 3


def test_a_broken_configuration_completes_to_nothing(complete: Complete, tmp_path: Path) -> None:
    (tmp_path / "hybrid.yaml").write_text("pools: [")
    assert "hpc" not in complete("%%slurm --pool h")
    assert "short" not in complete("%%slurm --partition ")


def test_other_lines_are_left_alone(complete: Complete) -> None:
    assert "%%slurm" in complete("%%sl")
    assert "--pool" not in complete("x = 1 --po")
