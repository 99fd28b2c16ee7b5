"""What a notebook shows of a job: messages of a real kernel, and the HTML they carry."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

import jupyter_hybrid as hy
from jupyter_hybrid.widgets.card import bundle, text

DEADLINE = 60.0
VIEW = "application/vnd.jupyter.widget-view+json"


class Notebook:
    """A kernel with a client that keeps all messages, and knows which cell each belongs to."""

    def __init__(self, client: BlockingKernelClient) -> None:
        self.client = client
        self.messages: list[dict[str, Any]] = []

    def start(self, code: str, *, user: bool = False) -> str:
        return self.client.execute(code, allow_stdin=user)

    def run(self, code: str, *, user: bool = False) -> str:
        cell = self.start(code, user=user)
        self.until(lambda: any(m["content"].get("execution_state") == "idle" for m in self.of(cell, "status")))
        return cell

    def of(self, cell: str, *kinds: str) -> list[dict[str, Any]]:
        return [m for m in self.messages if m["parent_header"].get("msg_id") == cell and m["msg_type"] in kinds]

    def until(self, reached: Callable[[], Any]) -> Any:
        end = time.monotonic() + DEADLINE
        while not (found := reached()):
            assert time.monotonic() < end, [(m["msg_type"], m["content"]) for m in self.messages[-8:]]
            try:
                self.messages.append(self.client.get_iopub_msg(timeout=0.1))
            except queue.Empty:
                continue
        return found

    def card(self, cell: str) -> dict[str, Any]:
        """Return the MIME bundle of the card of a cell as it is now."""
        shown = self.cards(cell)[0]["content"]
        for message in self.messages:
            content = message["content"]
            if message["msg_type"] == "update_display_data" and content["transient"] == shown["transient"]:
                shown = content
        return dict(shown["data"])

    def cards(self, cell: str) -> list[dict[str, Any]]:
        return [
            m for m in self.of(cell, "display_data") if "jupyter-hybrid" in m["content"]["data"].get("text/html", "")
        ]

    def reaches(self, cell: str, state: str) -> str:
        """Wait until the card of a cell shows a state, and return its HTML."""
        self.until(lambda: state in self.card(cell)["text/html"])
        return str(self.card(cell)["text/html"])

    def press(self, label: str) -> None:
        """Press a button of the last buttons that were shown."""
        comm = next(
            m["content"]["comm_id"]
            for m in reversed(self.messages)
            if m["msg_type"] == "comm_open" and m["content"]["data"]["state"].get("description") == label
        )
        content = {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))


@pytest.fixture
def notebook(home: Path, tmp_path: Path) -> Iterator[Notebook]:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=DEADLINE)
        found = Notebook(client)
        found.run("%load_ext jupyter_hybrid")
        yield found
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


WAITS = "import os, time\nprint('begun')\nwhile not os.path.exists('go'):\n    time.sleep(0.01)\n"


def test_a_card_follows_its_job_and_outputs_come_under_its_cell(notebook: Notebook, tmp_path: Path) -> None:
    cell = notebook.run(f"%%local --out y --as job\n{WAITS}display({{'text/plain': 'shown'}}, raw=True)\ny = 5\ny")
    assert len(notebook.cards(cell)) == 1
    notebook.reaches(cell, "RUNNING")
    notebook.until(lambda: notebook.of(cell, "stream"))
    other = notebook.start("job.result(60)")  # another cell runs while the rest of the outputs come
    notebook.until(lambda: notebook.of(other, "execute_input"))
    (tmp_path / "go").touch()
    html = notebook.reaches(cell, "COMPLETED")
    notebook.until(lambda: len(notebook.of(cell, "display_data")) == 3)
    assert [m["content"]["text"] for m in notebook.of(cell, "stream")] == ["begun\n"]
    assert [m["content"]["data"]["text/plain"] for m in notebook.of(cell, "display_data")][1:] == ["shown", "5"]
    assert not notebook.of(other, "stream", "display_data")
    assert "seen at" not in html
    assert "<script" not in html


def test_the_value_of_the_cell_is_the_job_and_its_card_is_shown_once(notebook: Notebook) -> None:
    cell = notebook.run("%%local\nx = 1")
    notebook.reaches(cell, "COMPLETED")
    assert len(notebook.cards(cell)) == 1
    assert not notebook.of(cell, "execute_result")
    again = notebook.run("job = _\njob")
    assert len(notebook.cards(again)) == 1
    assert "COMPLETED" in notebook.card(again)["text/html"]
    said = notebook.run("print(type(Out[2]).__name__, job is Out[2])")
    assert notebook.of(said, "stream")[0]["content"]["text"] == "Job True\n"


def test_wait_shows_everything_before_the_cell_ends(notebook: Notebook) -> None:
    cell = notebook.run("%%local --out y --wait\nprint('a')\nprint('b')\ny = 1\n1 / 0")
    kinds = [m["msg_type"] for m in notebook.messages if m["parent_header"].get("msg_id") == cell]
    errors = notebook.of(cell, "error")
    assert [m["content"]["ename"] for m in errors] == ["ZeroDivisionError"]  # raised with the traceback of the node
    assert "line 4" in "\n".join(errors[0]["content"]["traceback"])
    assert kinds[-1] == "status"
    assert "".join(m["content"]["text"] for m in notebook.of(cell, "stream")) == "a\nb\n"
    assert "FAILED" in notebook.card(cell)["text/html"]


def test_outputs_that_a_cell_clears_or_updates_do_so_here(notebook: Notebook) -> None:
    cell = notebook.run(
        "%%local --wait\nfrom IPython.display import clear_output, display\nimport time\n"
        "handle = display({'text/plain': 'first'}, raw=True, display_id='mine')\n"
        "handle.update({'text/plain': 'second'}, raw=True)\n"
        "for i in range(3):\n"
        "    clear_output(wait=True)\n    display({'text/plain': f'frame {i}'}, raw=True)\n    time.sleep(0.7)"
    )
    shown: dict[str, str] = {}
    for message in notebook.of(cell, "display_data", "update_display_data"):
        content = message["content"]
        if "jupyter-hybrid" not in content["data"].get("text/html", ""):
            shown[content["transient"]["display_id"]] = content["data"].get("text/plain", "")
    assert [value for value in shown.values() if value.startswith("frame")] == ["frame 2"]
    assert not notebook.of(cell, "clear_output")  # it would take the card away


def test_the_card_of_an_array_shows_the_first_failure_and_not_all_outputs(notebook: Notebook) -> None:
    cell = notebook.run("%%local --array seed=range(9) --out y --as runs\nprint('task', seed)\ny = 1 / (seed - 4)")
    html = notebook.reaches(cell, "FAILED")
    assert 'aria-valuemax="9" aria-valuenow="8"' in html
    assert "8 of 9 done, 1 failed" in html
    assert "task 4 (seed=4): ZeroDivisionError: division by zero" in html
    assert "runs[4].outputs()" in html
    assert "runs.retry()" in html
    assert not notebook.of(cell, "stream", "error")


def test_buttons_are_there_for_a_user_only(notebook: Notebook) -> None:
    alone = notebook.run("%%local --wait\nx = 1")
    assert all(VIEW not in m["content"]["data"] for m in notebook.of(alone, "display_data"))
    cell = notebook.run("%%local --wait\nx = 1", user=True)
    views = [m["content"]["data"] for m in notebook.of(cell, "display_data") if VIEW in m["content"]["data"]]
    assert len(views) == 1
    assert views[0]["text/plain"] == views[0]["text/html"] == ""
    assert VIEW not in notebook.card(cell)


def test_buttons_cancel_retry_and_load(notebook: Notebook, tmp_path: Path) -> None:
    cell = notebook.run(f"%%local --out y\n{WAITS}y = 5", user=True)
    notebook.reaches(cell, "RUNNING")
    notebook.until(lambda: any(VIEW in m["content"]["data"] for m in notebook.of(cell, "display_data")))
    notebook.press("Cancel")
    notebook.reaches(cell, "CANCELLED")
    (tmp_path / "go").touch()
    notebook.press("Retry")
    notebook.reaches(cell, "COMPLETED")
    assert "NameError" in str(notebook.of(notebook.run("y"), "error")[0]["content"]["ename"])
    notebook.press("Load results")
    said = notebook.run("print(y)")
    assert notebook.of(said, "stream")[0]["content"]["text"] == "5\n"


def test_an_interrupt_ends_the_waiting_of_a_kernel(notebook: Notebook, tmp_path: Path) -> None:
    cell = notebook.start(f"%%local --as job --wait\n{WAITS}1 / 0")
    notebook.until(lambda: notebook.cards(cell))
    notebook.reaches(cell, "RUNNING")
    message = notebook.client.session.msg("interrupt_request", {})
    notebook.client.control_channel.send(message)
    error = notebook.until(lambda: notebook.of(cell, "error"))[0]["content"]
    assert error["ename"] == "KeyboardInterrupt"
    assert "goes on" in error["traceback"][0]
    (tmp_path / "go").touch()
    notebook.reaches(cell, "FAILED")
    errors = notebook.until(lambda: notebook.of(cell, "error")[1:])
    assert [m["content"]["ename"] for m in errors] == ["ZeroDivisionError"]  # nobody raises it now


# --- the card itself ------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Reads HTML strictly: every element that is opened is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "span", "b", "code", "pre", "style"), tag
        assert {name for name, _ in attrs} <= {"class", "style", "role", "aria-hidden"} | {
            f"aria-value{each}" for each in ("min", "max", "now")
        }
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(html: str) -> str:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader.text


NASTY = "<script>alert('x')</script>\n$(rm -rf) \u00fc \"quoted\""


def fails(word: str) -> None:
    print(word)
    raise ValueError(word)


@pytest.mark.parametrize("array", [False, True])
def test_whatever_a_job_says_stays_text(array: bool) -> None:
    executor = hy.Executor("local", name=NASTY)
    job: Any = executor.array(fails, [NASTY, "b"]).wait(60) if array else executor.submit(fails, NASTY)
    if not array:
        assert isinstance(job.exception(60), ValueError)
    end = time.monotonic() + DEADLINE
    while not job.state.final:
        assert time.monotonic() < end
        time.sleep(0.01)
    found = bundle(job)
    said = read(found["text/html"])
    assert "<script" not in found["text/html"].lower()
    assert NASTY.splitlines()[0] in said
    assert "FAILED" in said
    assert "USER_ERROR" in said
    assert found["text/plain"] == text(job)
    assert job.id in said
