"""Notebooks: cells are sent to pools from the toolbar and the menu, and what they give back is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat

import jupyter_hybrid as hy

from .conftest import Lab, command, expect, until, window


def write(lab: Lab, *cells: str) -> None:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (lab.root / "work").mkdir(exist_ok=True)
    nbformat.write(made, lab.root / "work" / "study.ipynb")


def open_notebook(page: Any) -> None:
    command(page, "docmanager:open", path="work/study.ipynb")
    expect(page.locator(".jp-Notebook .jp-CodeCell").first).to_be_visible()
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    )


def source(page: Any, index: int) -> str:
    found: str = page.evaluate(
        "index => window.jupyterapp.shell.currentWidget.content.widgets[index].model.sharedModel.getSource()", index
    )
    return found


def activate(page: Any, index: int) -> None:
    page.locator(".jp-Notebook .jp-Cell").nth(index).locator(".cm-content").click()


def test_run_on_writes_the_magic_line_and_keeps_its_options(page: Any, lab: Lab) -> None:
    write(lab, "n = 5", "%%local --cpus 1 --name 'a b' --out total\ntotal = sum(range(n))", "%%bash\nls", "m = 1")
    open_notebook(page)
    activate(page, 1)
    chooser = page.get_by_role("combobox", name="Run on")
    expect(chooser).to_have_value("desk")
    chooser.select_option("night")
    assert source(page, 1) == "%%local --pool night --cpus 1 --name 'a b' --out total\ntotal = sum(range(n))"
    chooser.select_option("")
    assert source(page, 1) == "total = sum(range(n))"
    chooser.select_option("desk")
    assert source(page, 1) == "%%local --cpus 1 --name 'a b' --out total\ntotal = sum(range(n))"
    activate(page, 2)
    expect(chooser).to_be_disabled()
    expect(chooser).to_have_value("%%bash")
    activate(page, 3)
    expect(chooser).to_have_value("")
    page.keyboard.press("Control+Home")
    page.keyboard.type("%%local --pool night\n")
    expect(chooser).to_have_value("night")


def test_a_cell_is_run_on_a_pool_and_its_results_are_loaded_from_elsewhere(page: Any, lab: Lab) -> None:
    write(lab, "n = 5", "total = sum(range(n))\nprint('sum', total)")
    open_notebook(page)
    activate(page, 0)
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-InputPrompt").first).to_have_text("[1]:")
    activate(page, 1)
    page.locator('.jp-cell-toolbar [data-command="hybrid:run-cell-on"]').click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    # Elsewhere before it ends, or soon after: the notification is for who does not see the card.
    command(page, "hybrid:open-dashboard")
    job = until(lambda: hy.jobs(name="total"), "the job of the cell")[0]["id"]
    entry = page.locator(f'.jp-MainAreaWidget .jp-Hybrid-job[data-job="{job}"]')
    expect(entry).to_contain_text("Completed · night")
    entry.click()
    side = page.locator(".jp-MainAreaWidget .jp-Hybrid-side")
    expect(side).to_contain_text("total")
    expect(side.locator(".jp-Hybrid-log")).to_contain_text("sum 10")
    side.get_by_role("button", name="Load results").click()
    expect(page.locator(".Toastify__toast", has_text="bound: total")).to_be_visible()
    side.get_by_role("button", name="Show cell").click()
    expect(page.locator(".jp-Notebook .jp-Cell").nth(1)).to_have_class(re.compile("jp-mod-active"))
    page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.insertCell(2, "
        "{cell_type: 'code', source: 'total * 100'})"
    )
    activate(page, 2)
    page.keyboard.press("Shift+Enter")
    expect(page.locator(".jp-OutputArea-output", has_text="1000")).to_be_visible()


def test_the_end_of_a_job_is_told_where_its_notebook_is_not_in_view(page: Any, lab: Lab, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.02)\nanswer = 42"
    write(lab, "%load_ext jupyter_hybrid", "%%local --cpus 1 --name patience --out answer\n" + wait)
    open_notebook(page)
    for index in (0, 1):
        activate(page, index)
        page.keyboard.press("Shift+Enter")
    command(page, "hybrid:open-dashboard")
    expect(page.locator(".jp-MainAreaWidget .jp-Hybrid-job")).to_contain_text("Running")
    gate.touch()
    toast = page.locator(".Toastify__toast", has_text="patience: Completed")
    expect(toast).to_be_visible()
    toast.get_by_role("button", name="Load results").click()
    expect(page.locator(".Toastify__toast", has_text="bound: answer")).to_be_visible()


def test_notebook_7_has_the_panel_too(chromium: Any, lab: Lab) -> None:
    write(lab, "n = 5")
    hy.Executor("desk", cpus=1, memory="100M").submit(len, "abc").result(timeout=60)
    with window(chromium, lab, "notebook-7") as page:
        page.goto(f"{lab.url}/notebooks/work/study.ipynb?token={lab.token}")
        expect(page.get_by_role("combobox", name="Run on")).to_be_visible()
        command(page, "hybrid:open-panel")
        expect(page.locator(".jp-Hybrid-job")).to_contain_text("Completed · desk")
