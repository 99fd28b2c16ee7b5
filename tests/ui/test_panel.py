"""The side panel in a real JupyterLab: jobs of any process come and change without a reload, and can be acted on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import jupyter_hybrid as hy
from jupyter_hybrid.pool import default_store

from .conftest import ARTEFACTS, Lab, command, configure, expect, until, window


def functions() -> tuple[Any, Any, Any]:
    """Return functions that travel by value, as those of a notebook do."""

    def ends_at(path: str) -> str:
        import os
        import time

        print("waiting", flush=True)
        while not os.path.exists(path):
            time.sleep(0.02)
        print("released", flush=True)
        return path

    def picky(value: int, path: str) -> int:
        import os

        print("value", value, flush=True)
        if value % 2 and not os.path.exists(path):
            raise ValueError(f"odd value {value % 10}")
        return value

    def square(value: int) -> int:
        return value * value

    return ends_at, picky, square


ends_at, picky, square = functions()


def row(page: Any, job: Any) -> Any:
    return page.locator(f'.jp-Hybrid-job[data-job="{job.id}"]')


def widen(page: Any, width: int) -> None:
    """Drag the edge of the side panel until the panel is so wide."""
    panel = page.locator("#jupyter-hybrid-panel")
    edge = page.locator("#jp-main-split-panel > .lm-SplitPanel-handle:not(.lm-mod-hidden)").first.bounding_box()
    box = panel.bounding_box()
    y = edge["y"] + edge["height"] / 2
    page.mouse.move(edge["x"] + edge["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(edge["x"] + edge["width"] / 2 + width - box["width"], y, steps=5)
    page.mouse.up()
    until(lambda: abs(panel.bounding_box()["width"] - width) < 3, f"the panel is {width} pixels wide")


def accessible(page: Any) -> None:
    """Have axe-core look at the panel; nothing serious may be found."""
    from axe_playwright_python.sync_playwright import Axe

    response = Axe().run(page, context="#jupyter-hybrid-panel").response
    assert {"aria-roles", "button-name"} <= {each["id"] for each in response["passes"]}  # it has looked
    found = response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, "\n".join(f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in serious)


def test_a_job_is_followed_from_the_queue_to_its_end(page: Any, tmp_path: Path) -> None:
    expect(page.locator(".jp-Hybrid-pool").first).to_contain_text("desk")
    expect(page.locator(".jp-Hybrid-empty")).to_contain_text("No jobs yet")
    gates = [tmp_path / "first", tmp_path / "second"]
    executor = hy.Executor("night", cpus=1, memory="100M")
    first, second = (executor.submit(ends_at, str(gate)) for gate in gates)
    expect(row(page, first)).to_contain_text("Running · night")
    expect(row(page, second)).to_contain_text("Pending · night")
    row(page, first).click()
    expect(page.locator(".jp-Hybrid-log")).to_contain_text("waiting")
    gates[0].touch()
    expect(page.locator(".jp-Hybrid-headState")).to_contain_text("Completed")
    expect(page.locator(".jp-Hybrid-log")).to_contain_text("released")
    page.get_by_role("button", name="All jobs").click()
    expect(row(page, first)).to_contain_text("Completed")
    expect(row(page, second)).to_contain_text("Running")
    gates[1].touch()
    expect(row(page, second)).to_contain_text("Completed")
    expect(page.locator(".jp-Hybrid-chip", has_text="Completed")).to_have_text("Completed 2")


def test_cancel_asks_first_and_cleaning_up_removes(page: Any, tmp_path: Path) -> None:
    job = hy.Executor("desk", cpus=1, memory="100M").submit(ends_at, str(tmp_path / "never"))
    expect(row(page, job)).to_contain_text("Running")
    row(page, job).click()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Keep").click()
    assert not job.run.cancelled
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel job").click()
    expect(page.locator(".jp-Hybrid-headState")).to_contain_text("Cancelled")
    folder = Path(job.run.folder.path)
    page.get_by_role("button", name="Clean up").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".jp-Hybrid-empty")).to_contain_text("No jobs yet")
    until(lambda: not folder.exists(), "the run folder is gone")


def test_tasks_of_an_array_their_failures_and_a_retry(page: Any, tmp_path: Path) -> None:
    gate = tmp_path / "good"
    array = hy.Executor("desk", cpus=1, memory="100M").array(picky, range(40), [str(gate)] * 40)
    expect(row(page, array)).to_contain_text("20 failed")
    row(page, array).click()
    expect(page.locator(".jp-Hybrid-headState")).to_contain_text("Failed")
    failures = page.locator(".jp-Hybrid-failures > li")
    expect(failures).to_have_count(5)
    expect(failures.first).to_contain_text("4\u00d7")
    expect(page.locator(".jp-Hybrid-chip", has_text="20 failed")).to_be_visible()
    # By keyboard, to the second failed task; then by the mouse to the one before it.
    field = page.get_by_role("slider")
    field.focus()
    field.press("f")
    field.press("f")
    task = page.locator(".jp-Hybrid-task")
    expect(task).to_contain_text("Task 3")
    expect(task).to_contain_text("odd value 3")
    expect(task.locator(".jp-Hybrid-log")).to_contain_text("value 3")
    expect(field).to_have_attribute("aria-valuetext", "task 3: failed")
    page.screenshot(path=ARTEFACTS / "array.png")
    place = field.bounding_box()
    field.click(position={"x": 2 * 16 + 5, "y": 5} if place["width"] > 60 else {"x": 2, "y": 2})
    expect(task).to_contain_text("Task 2")
    expect(task.locator(".jp-Hybrid-log")).to_have_text(re.compile(r"value 2\s*"))
    gate.touch()
    page.get_by_role("button", name="Retry failed").click()
    expect(page.locator(".jp-Hybrid-headState")).to_contain_text("Completed")
    expect(page.locator(".jp-Hybrid-chip", has_text="40 done")).to_be_visible()
    assert array.run.progress.attempts[-1].batches > 0
    assert sorted(hy.job(array.id).results()) == list(range(40))


def test_filters_by_name_state_and_pool(page: Any) -> None:
    desk, night = (hy.Executor(name, cpus=1, memory="100M") for name in ("desk", "night"))
    jobs = [desk.submit(square, 2), night.submit(square, 3), desk.submit(picky, 1, "/nowhere")]
    expect(page.locator(".jp-Hybrid-chip", has_text="Failed 1")).to_be_visible()
    expect(page.locator(".jp-Hybrid-chip", has_text="Completed 2")).to_be_visible()
    page.locator(".jp-Hybrid-chip", has_text="Failed").click()
    expect(page.locator(".jp-Hybrid-job")).to_have_count(1)
    expect(row(page, jobs[2])).to_be_visible()
    page.locator(".jp-Hybrid-chip", has_text="Failed").click()
    page.get_by_role("searchbox").fill("squ")
    expect(page.locator(".jp-Hybrid-job")).to_have_count(2)
    page.get_by_role("button", name="night").click()
    expect(page.locator(".jp-Hybrid-job")).to_have_count(1)
    expect(row(page, jobs[1])).to_be_visible()
    page.get_by_role("searchbox").fill("nothing is called this")
    page.get_by_role("button", name="Show all jobs").click()
    expect(page.locator(".jp-Hybrid-job")).to_have_count(3)


def test_the_keyboard_reaches_a_job_and_comes_back(page: Any) -> None:
    executor = hy.Executor("desk", cpus=1, memory="100M")
    jobs = [executor.submit(square, value) for value in range(3)]
    expect(page.locator(".jp-Hybrid-chip", has_text="Completed 3")).to_be_visible()
    jobs_list = page.get_by_role("listbox")
    jobs_list.focus()
    jobs_list.press("End")
    jobs_list.press("ArrowUp")
    expect(jobs_list).to_have_attribute("aria-activedescendant", f"jp-hybrid-{jobs[1].id}")
    jobs_list.press("Enter")
    expect(page.locator(".jp-Hybrid-detail")).to_contain_text(jobs[1].id)
    page.locator(".jp-Hybrid-back").press("Escape")
    expect(jobs_list).to_be_focused()


def test_a_server_that_is_gone_is_told_and_what_was_missed_is_caught_up(page: Any, lab: Lab, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = hy.Executor("desk", cpus=1, memory="100M").submit(ends_at, str(gate))
    expect(row(page, job)).to_contain_text("Running")
    lab.stop()
    expect(page.locator(".jp-Hybrid-banner")).to_contain_text("does not answer")
    expect(row(page, job)).to_contain_text("Running")
    page.screenshot(path=ARTEFACTS / "gone.png")
    gate.touch()
    job.result(timeout=60)
    lab.start()
    expect(row(page, job)).to_contain_text("Completed")
    expect(page.locator(".jp-Hybrid-banner")).to_have_count(0)


def test_a_wrong_configuration_is_told_in_the_panel(chromium: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = configure(home, monkeypatch)
    (root / "hybrid.yaml").write_text("pools:\n  broken: {kind: slurmm}\n")
    server = Lab(root)
    server.start()
    try:
        with window(chromium, server, "wrong-configuration") as page:
            page.goto(f"{server.url}/lab?token={server.token}")
            command(page, "hybrid:open-panel")
            expect(page.locator(".jp-Hybrid-banner")).to_contain_text("slurmm")
    finally:
        server.stop()


def test_a_pool_that_does_not_answer_says_since_when(
    chromium: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = configure(home, monkeypatch)
    (root / "hybrid.yaml").write_text("pools: {far: {kind: slurm, env: {SLURM_CONF: /nowhere/slurm.conf}}}\n")
    server = Lab(root)
    server.start()
    try:
        with window(chromium, server, "unreachable-pool") as page:
            page.goto(f"{server.url}/lab?token={server.token}")
            command(page, "hybrid:open-panel")
            expect(page.locator(".jp-Hybrid-pool", has_text="far")).to_contain_text("does not answer since")
            expect(page.locator(".jp-Hybrid-pool", has_text="desk")).to_contain_text("cpus free")
            accessible(page)
    finally:
        server.stop()


def test_the_context_menu_acts_on_the_job_that_was_pointed_at(page: Any, lab: Lab) -> None:
    jobs = [hy.Executor("desk", cpus=1, memory="100M").submit(square, value) for value in range(2)]
    for job in jobs:
        expect(row(page, job)).to_contain_text("Completed")
    row(page, jobs[0]).click(button="right")
    page.get_by_role("menuitem", name="Run All Tasks Again").click()
    until(lambda: default_store().job(jobs[0].id).attempt == 2, "the job has run again")
    row(page, jobs[1]).click(button="right")
    page.get_by_role("menuitem", name="Clean Up Job").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".jp-Hybrid-job")).to_have_count(1)
    expect(row(page, jobs[0])).to_be_visible()


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark", "JupyterLab Dark High Contrast"])
def test_the_look_and_accessibility_in_all_themes(
    chromium: Any, home: Path, monkeypatch: pytest.MonkeyPatch, theme: str, tmp_path: Path
) -> None:
    server = Lab(configure(home, monkeypatch, theme))
    server.start()
    executor = hy.Executor("desk", cpus=1, memory="200M", time="10min")
    array = executor.array(picky, range(1000), ["/nowhere"] * 1000)
    executor.submit(square, 2).result(timeout=60)
    running = executor.submit(ends_at, str(tmp_path / "gate"))
    try:
        name = theme.removeprefix("JupyterLab ").lower().replace(" ", "-")
        with window(chromium, server, f"{name}-wide", 1400, 1000) as page:
            page.goto(f"{server.url}/lab?token={server.token}")
            command(page, "hybrid:open-panel")
            expect(row(page, array)).to_contain_text("500 failed")
            expect(row(page, running)).to_contain_text("Running")
            page.screenshot(path=ARTEFACTS / f"{name}-list.png")
            accessible(page)
            for width in (300, 800):
                widen(page, width)
                expect(row(page, array)).to_contain_text("500 failed")
                page.screenshot(path=ARTEFACTS / f"{name}-{width}.png")
                panel = page.locator("#jupyter-hybrid-panel .jp-Hybrid-panel")
                assert panel.evaluate("node => node.scrollWidth <= node.clientWidth")  # nothing is cut off
                accessible(page)
            widen(page, 400)
            row(page, array).click()
            page.get_by_role("slider").focus()
            page.get_by_role("slider").press("f")
            expect(page.locator(".jp-Hybrid-task .jp-Hybrid-log")).to_contain_text("value 1")
            page.screenshot(path=ARTEFACTS / f"{name}-array.png")
            accessible(page)
            command(page, "hybrid:open-dashboard")
            expect(page.locator(".jp-MainAreaWidget .jp-Hybrid-side")).to_contain_text("500 failed")
    finally:
        (tmp_path / "gate").touch()
        running.result(timeout=60)
        server.stop()
