"""The teaching notebook, executed as it stands: its numbers, and what ran for them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import jupyter_hybrid as hy
from jupyter_hybrid import launch
from jupyter_hybrid.pool import default_store

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00-first-array.ipynb"


def texts(cell: Any) -> str:
    """Return all that a cell shows, as text."""
    shown = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(shown)


def execute(path: Path, kind: str) -> dict[str, Any]:
    """Execute the notebook with its cells on another kind of pool; return its cells by their ids."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, "the notebook is committed without outputs"
            cell.source = re.sub(r"\A%%local\b", f"%%{kind}", cell.source)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    return {cell.id: cell for cell in notebook.cells}


def check(cells: dict[str, Any], pool: str) -> None:
    first, second = sorted(default_store().jobs(), key=lambda row: row.created)
    for row, tasks in ((first, 100), (second, 120)):
        assert (row.state, row.tasks, row.done, row.failed) == (hy.JobState.COMPLETED, tasks, tasks, 0)
        assert row.pool == pool
    # The second job ran what the first had not, and nothing ran for the changed aggregation.
    assert launch.load_run(first.id).folder.attempts()[0].tasks == ((0, 100),)
    assert launch.load_run(second.id).folder.attempts()[0].tasks == ((100, 120),)
    assert launch.reused_tasks(launch.load_run(second.id)) == 100
    scores = hy.job(second.id).to_dataframe().compute()
    assert list(scores.columns) == ["seed", "score"]
    assert scores.seed.tolist() == list(range(120))
    assert scores.score.between(0.9, 1).all()
    assert scores.score.nunique() > 5  # the score depends on the seed
    few = scores.score[:100]
    assert f"accuracy {few.mean():.4f} ± {few.std():.4f}, from {few.min():.4f} to {few.max():.4f}" in texts(
        cells["summary"]
    )
    assert f"120 seeds: accuracy {scores.score.mean():.4f} ± {scores.score.std():.4f}" in texts(cells["more-summary"])
    low, high = scores.score.quantile([0.05, 0.95])
    assert f"between {low:.4f} and {high:.4f}" in texts(cells["change"])
    assert "100 of 120 results were reused" in texts(cells["why"])
    assert "image/png" in cells["histogram"].outputs[0].data
    assert "120 of 120 done, 100 of them reused" in texts(cells["more"])
    assert "COMPLETED" in texts(cells["array"])


@pytest.mark.timeout(600)
def test_the_first_notebook_on_this_machine(home: Path) -> None:
    check(execute(NOTEBOOK, "local"), "local")


@pytest.mark.timeout(600)
def test_the_demo_leaves_a_page_and_a_picture(tmp_path: Path) -> None:
    demo, folder = Path(__file__).parents[1] / ".ci" / "demo.py", tmp_path / "demo"
    done = subprocess.run([sys.executable, demo, NOTEBOOK, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 arrays on pool 'local': 120 tasks ran, 100 reused" in done.stdout
    assert (folder / "histogram.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "00-first-array.html").read_text()
    assert "image/png;base64" in page
    assert "120 of 120 done, 100 of them reused" in page
