"""The panel with a real Slurm: from the queue to the results, over a restart of the kernel and of the server."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_hybrid.practice import PracticeSlurm, missing_commands, slurm_up

from .conftest import ARTEFACTS, Lab, command, expect, window
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


START = """async () => {
  (window.kernels ??= []).push(await window.jupyterapp.serviceManager.kernels.startNew({ name: 'python3' }));
}"""
EXECUTE = """async ([number, code]) => {
  const future = window.kernels[number].requestExecute({ code });
  let text = '';
  future.onIOPub = message => { text += message.content.text ?? (message.content.traceback ?? []).join(); };
  await future.done;
  return text;
}"""
WAIT = """
import json, os, time
import jupyter_hybrid as hy
from jupyter_hybrid.tracker import tracker
def wait(path):
    while not os.path.exists(path): time.sleep(0.02)
job = hy.Executor("hpc", cpus=1, time="10min", name={name!r}).submit(wait, {gate!r})
print(job.id)
"""


def test_two_browsers_and_three_kernels_see_the_same(
    on_slurm: None, lab: Lab, page: Any, chromium: Any, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    jobs = []
    for number in range(3):
        page.evaluate(START)
        jobs.append(page.evaluate(EXECUTE, [number, WAIT.format(name=f"job{number}", gate=str(gate))]).strip())
    with window(chromium, lab, "second-browser") as other:
        other.goto(f"{lab.url}/lab?token={lab.token}")
        command(other, "hybrid:open-panel")

        def see(*states: str) -> None:
            for each in (page, other):
                for job, state in zip(jobs, states, strict=True):
                    expect(each.locator(f'[data-job="{job}"]')).to_contain_text(f"{state} · hpc")
            told = [page.evaluate(EXECUTE, [n, f"print(hy.job({job!r}).state)"]) for n in range(3) for job in jobs]
            assert [word.strip().capitalize() for word in told] == [*states] * 3

        see("Running", "Pending", "Pending")
        holders = [json.loads(page.evaluate(EXECUTE, [n, "print(json.dumps(tracker.holding()))"])) for n in range(3)]
        holders.append(page.request.get(f"{lab.url}/hybrid/api/v1/health?token={lab.token}").json()["tracking"])
        assert sum("hpc" in names for names in holders) == 1, holders  # one of the four asks the scheduler
        other.locator(f'[data-job="{jobs[1]}"]').click()
        other.get_by_role("button", name="Cancel", exact=True).click()
        other.get_by_role("button", name="Cancel job").click()
        other.get_by_role("button", name="All jobs").click()
        see("Running", "Cancelled", "Pending")
        gate.touch()
        see("Completed", "Cancelled", "Completed")
