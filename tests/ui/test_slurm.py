"""The panel with a real Slurm: from the queue to the results, over a restart of the kernel and of the server."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.practice import PracticeSlurm, missing_commands, slurm_up

from .conftest import ARTEFACTS, Lab, command, expect, until, window
from .test_notebook import activate, open_notebook, write

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[PracticeSlurm]:
    """A Slurm with room for one job."""
    missing = missing_commands()
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"no {', '.join(missing)}; apt-get install --no-install-recommends slurm-wlm slurm-client munge")
    folder = tempfile.mkdtemp(prefix="hy-")
    name = f"ui{os.getpid()}"
    try:
        yield slurm_up(name, nodes=1, cpus=1, folder=folder, register=False)
    finally:
        PracticeSlurm(name, Path(folder), 1, 1, False).down()


@pytest.fixture
def on_slurm(cluster: PracticeSlurm, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pool `hpc` for notebooks, and for this process: its file comes before that of the others."""
    text = f"pools:\n  hpc:\n    kind: slurm\n    env: {{SLURM_CONF: {cluster.conf}}}\n    limits: {{poll_min: 1s}}\n"
    (home.parent / "slurm.yaml").write_text(text)
    monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(home.parent / "slurm.yaml"))


def gate_cell(gate: Path, name: str) -> str:
    wait = f"while not os.path.exists({str(gate)!r}): time.sleep(0.02)"
    said = f"print('began {name}', flush=True)"
    return f"%%slurm --cpus 1 --time 10min --name {name} --out {name}\nimport os, time\n{said}\n{wait}\n{name} = 21 * 2"


def test_a_job_survives_kernel_and_server(on_slurm: None, lab: Lab, page: Any, tmp_path: Path) -> None:
    gates = [tmp_path / name for name in ("first", "second")]
    write(lab, "%load_ext jupyter_hybrid", *(gate_cell(gate, gate.name) for gate in gates), "first")
    open_notebook(page)
    for index in range(3):
        activate(page, index)
        page.keyboard.press("Shift+Enter")
    first, second = (page.locator(".jp-Hybrid-job", has_text=gate.name) for gate in gates)
    expect(first).to_contain_text("Running · hpc")
    expect(second).to_contain_text("Pending · hpc")
    second.click()
    page.get_by_role("button", name="Hold", exact=True).click()
    expect(page.locator(".jp-Hybrid-headState")).to_contain_text("Held")
    page.get_by_role("button", name="Release", exact=True).click()
    expect(page.locator(".jp-Hybrid-headState")).to_contain_text("Pending")
    page.get_by_role("button", name="All jobs").click()

    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    lab.stop()
    expect(page.locator(".jp-Hybrid-banner")).to_be_visible()
    gates[0].touch()
    lab.start()
    expect(first).to_contain_text("Completed · hpc")
    expect(page.locator(".jp-Hybrid-banner")).to_have_count(0)
    expect(second).to_contain_text("Running · hpc")
    second.click()
    expect(page.locator(".jp-Hybrid-log")).to_contain_text("began second")
    page.screenshot(path=ARTEFACTS / "slurm.png")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel job").click()
    expect(page.locator(".jp-Hybrid-headState")).to_contain_text("Cancelled")
    gates[1].touch()
    page.get_by_role("button", name="Retry", exact=True).click()
    expect(page.locator(".jp-Hybrid-headState")).to_contain_text("Completed")

    # The results of the first are loaded into a kernel that has not seen the job.
    page.get_by_role("button", name="All jobs").click()
    first.click()
    page.get_by_role("button", name="Load results").click()
    expect(page.locator(".Toastify__toast", has_text="bound: first")).to_be_visible()
    activate(page, 3)
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-OutputArea-output", has_text=re.compile(r"^42\s*$"))).to_be_visible()


def test_two_browsers_show_the_same(on_slurm: None, lab: Lab, page: Any, chromium: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = hy.Executor("hpc", cpus=1, time="10min").submit(*gate_function(gate))
    with window(chromium, lab, "second-browser") as other:
        other.goto(f"{lab.url}/lab?token={lab.token}")
        command(other, "hybrid:open-panel")
        for each in (page, other):
            expect(each.locator(f'[data-job="{job.id}"]')).to_contain_text("Running · hpc")
        other.locator(f'[data-job="{job.id}"]').click()
        other.get_by_role("button", name="Cancel", exact=True).click()
        other.get_by_role("button", name="Cancel job").click()
        for each in (page, other):
            expect(each.locator(".jp-Hybrid-panel")).to_contain_text("Cancelled")
    until(job.cancelled, "the job is cancelled for this process, too")


def gate_function(gate: Path) -> tuple[Any, str]:
    def wait(path: str) -> None:
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.02)

    return wait, str(gate)
