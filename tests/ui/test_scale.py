"""The panel stays quick and small where there are very many jobs."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import jupyter_hybrid as hy

from .conftest import Lab, command, expect, window

JOBS = 100_000


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


def test_a_hundred_thousand_jobs(lab: Lab, chromium: Any, home: Path) -> None:
    hy.Executor("desk", cpus=1, memory="100M").submit(len, "abc").result(timeout=60)
    fill(home)
    with window(chromium, lab, "many-jobs") as page:
        page.goto(f"{lab.url}/lab?token={lab.token}")
        command(page, "hybrid:open-panel")
        expect(page.locator(".jp-Hybrid-chip", has_text="Completed")).to_have_text("Completed 90,001")
        scrolled = page.evaluate(
            """async () => {
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
        )
        assert scrolled["top"] > 48 * 1000  # more than a thousand jobs further down
        assert scrolled["rows"] < 60  # only what is in sight is in the page
        assert scrolled["longest"] < 1000  # ms
        devtools = page.context.new_cdp_session(page)
        devtools.send("HeapProfiler.collectGarbage")
        assert devtools.send("Runtime.getHeapUsage")["usedSize"] < 50e6  # all of Lab, not the panel alone
        page.get_by_role("searchbox").fill("number 4242")
        expect(page.locator(".jp-Hybrid-job")).to_have_count(11)
