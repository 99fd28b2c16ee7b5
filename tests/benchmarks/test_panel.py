"""The side panel with very many jobs and tasks, in a real JupyterLab and a real browser."""

from __future__ import annotations

import sqlite3
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from ui.conftest import Lab, command, expect, window

import jupyter_hybrid as hy

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

JOBS = 100_000
TASKS = 10_000
ROUNDS = 5
WATCH = """
  const look = () => {
    window.jupyterapp?.restored.then(() => { window.ready ??= performance.now(); });
    if (document.querySelector('.jp-Hybrid-job')) window.painted = performance.now();
    else requestAnimationFrame(look);
  };
  look();
"""
"""Notes when Lab is ready and when the first job stands in the panel, in ms since the page began."""
SCROLL = """async () => {
  const list = document.querySelector('.jp-Hybrid-list');
  let longest = 0;
  let before = performance.now();
  for (let frame = 0; frame < 200; frame++) {
    list.scrollTop += 2000;
    await new Promise(resolve => requestAnimationFrame(resolve));
    const now = performance.now();
    longest = Math.max(longest, now - before);
    before = now;
  }
  return { longest, rows: document.querySelectorAll('.jp-Hybrid-job').length, top: list.scrollTop };
}"""
OPEN = """async () => {
  const begun = performance.now();
  document.querySelector('.jp-Hybrid-job').click();
  while (!document.querySelector('.jp-Hybrid-detail [role=slider]')) {
    await new Promise(resolve => requestAnimationFrame(resolve));
  }
  await new Promise(resolve => requestAnimationFrame(resolve));
  return performance.now() - begun;
}"""


def fill(home: Path) -> None:
    """Put ended jobs into the Store, as they would have come over years."""
    store = sqlite3.connect(home / "store.sqlite")
    (first,) = store.execute("SELECT value FROM sequence").fetchone()
    now = time.time()
    rows = (
        (f"a{n:09d}", first + 1 + n, f"job number {n}", ("COMPLETED", "FAILED")[n % 10 == 0], now - 2e6 + n, now - 1e6)
        for n in range(JOBS)
    )
    store.executemany(
        "INSERT INTO jobs (id, seq, name, pool, kind, state, array, tasks, done, attempt, created, ended, cpus, folder)"
        " VALUES (?, ?, ?, 'desk', 'function', ?, 0, 1, 1, 1, ?, ?, 1, '/nowhere')",
        rows,
    )
    store.execute("UPDATE sequence SET value = ?", (first + JOBS,))
    store.commit()
    store.close()


def test_the_panel_with_very_many_jobs(table: Any, lab: Lab, chromium: Any, home: Path) -> None:
    array = hy.Executor("desk", cpus=1, memory="200M").array(abs, range(TASKS), batch=TASKS // 2)
    array.wait_for(lambda: array.run.row.state.final, 120)
    fill(home)
    note = f"{JOBS:,} jobs"
    with window(chromium, lab, "many-jobs") as page:
        page.add_init_script(WATCH)
        paints = []
        for _ in range(ROUNDS):
            page.goto(f"{lab.url}/lab?token={lab.token}")
            command(page, "hybrid:open-panel")
            expect(page.locator(".jp-Hybrid-chip", has_text="Completed")).to_have_text("Completed 90,001")
            paints.append(page.evaluate("() => (window.painted - window.ready) / 1000"))
        table.hold("first jobs in the panel", statistics.median(paints), 1.5, " s", f"{note}, after Lab is ready")
        scrolled = page.evaluate(SCROLL)
        assert scrolled["top"] > 48 * 1000  # more than a thousand jobs further down
        assert scrolled["rows"] < 60  # only what is in sight is in the page
        table.hold("longest frame of scrolling", scrolled["longest"], 1000, " ms", note)
        devtools = page.context.new_cdp_session(page)
        devtools.send("HeapProfiler.collectGarbage")
        used = devtools.send("Runtime.getHeapUsage")["usedSize"] / 1e6
        table.hold("heap of the page", used, 50, " MB", f"{note}; all of Lab, not the panel alone")
        page.get_by_role("searchbox").fill("number 4242")
        expect(page.locator(".jp-Hybrid-job")).to_have_count(11)
        page.get_by_role("searchbox").fill("abs")
        expect(page.locator(".jp-Hybrid-job")).to_have_count(1)
        opened = page.evaluate(OPEN)
        expect(page.locator(".jp-Hybrid-chip", has_text="10,000 done")).to_be_visible()
        table.hold("an array opened", opened, 1000, " ms", f"{TASKS:,} tasks drawn")
