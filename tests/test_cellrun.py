from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import pytest

from jupyter_hybrid import cellrun

NODE = """
import json, os, sys
from hybrid_cellrun import run_cell
tasks = json.load(open("tasks.json"))
log = open("outputs.jsonl", "w")
for number, (payload, item) in enumerate(tasks):
    def emit(output):
        log.write(json.dumps([number, output]) + "\\n")
        log.flush()
    try:
        ending = {name: repr(value) for name, value in run_cell(payload, item, emit).items()}
    except BaseException as error:
        ending = type(error).__name__ + ": " + str(error)
    log.write(json.dumps([number, ending]) + "\\n")
log.close()
"""


class Node:
    """A Python process that knows nothing of jupyter_hybrid but the one file, as on a pool's node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(cellrun.__file__, folder / "hybrid_cellrun.py")
        (folder / "node.py").write_text(NODE)
        self.home = folder / "home"
        self.home.mkdir()
        self.log = ""

    def run(self, *tasks: tuple[str, dict[str, Any]], **more: Any) -> list[tuple[Any, list[dict[str, Any]]]]:
        """Return how each task ended and its outputs."""
        payloads = [
            ({"source": textwrap.dedent(source), "inputs": {}, "out": [], "explicit_out": False, **more}, item)
            for source, item in tasks
        ]
        (self.folder / "tasks.json").write_text(json.dumps(payloads))
        env = {**os.environ, "HOME": str(self.home), "PYTHONWARNINGS": ""}
        env.pop("IPYTHONDIR", None)
        done = subprocess.run(
            [sys.executable, "node.py"],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.log = done.stdout + done.stderr
        ended: list[tuple[Any, list[dict[str, Any]]]] = []
        outputs: list[dict[str, Any]] = []
        for line in (self.folder / "outputs.jsonl").read_text().splitlines():
            _, what = json.loads(line)
            if isinstance(what, dict) and "output_type" in what:
                outputs.append(what)
            else:
                ended.append((what, outputs))
                outputs = []
        return ended

    def one(self, source: str, **more: Any) -> tuple[Any, list[dict[str, Any]]]:
        return self.run((source, {}), **more)[0]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def text(outputs: list[dict[str, Any]], name: str) -> str:
    return "".join(output["text"] for output in outputs if output.get("name") == name)


def of_type(outputs: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [output for output in outputs if output["output_type"] in kinds]


def test_everything_a_cell_shows(node: Node) -> None:
    ending, outputs = node.one(
        """
        import sys, asyncio, warnings
        print("out")
        print("err", file=sys.stderr)
        !echo from the shell
        listing = !echo captured
        await asyncio.sleep(0)
        import pandas as pd
        display(pd.DataFrame({"a": [1]}))
        import matplotlib.pyplot as plt
        plt.plot([1, 2])
        x = 2
        %time y = x + 1
        warnings.warn("careful")
        listing, y
        """,
        out=["x", "y"],
    )
    assert ending == {"x": "2", "y": "3"}
    assert "out\n" in text(outputs, "stdout")
    assert "from the shell" in text(outputs, "stdout")
    assert "Wall time" in text(outputs, "stdout")
    assert "err\n" in text(outputs, "stderr")
    assert "careful" in text(outputs, "stderr")
    table, figure = of_type(outputs, "display_data")
    assert "<table" in table["data"]["text/html"]
    assert base64.b64decode(figure["data"]["image/png"]).startswith(b"\x89PNG")
    (result,) = of_type(outputs, "execute_result")
    assert result["data"]["text/plain"] == "(['captured'], 3)"
    for part in ("out\n", "err\n", "from the shell", "careful"):
        assert part in node.log
    assert not {".ipython", ".jupyter"} & set(os.listdir(node.home))
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.from_dict(output) for output in outputs])
    nbformat.validate(nbformat.v4.new_notebook(cells=[cell]))


def test_outputs_come_in_order_and_while_the_cell_runs(node: Node) -> None:
    # The cell itself waits until its first line is in the outputs file: it ends only if outputs are passed on early.
    ending, outputs = node.one(
        """
        import sys, time
        def wait(word):
            end = time.monotonic() + 60
            while word not in open("outputs.jsonl").read():
                assert time.monotonic() < end
                time.sleep(0.01)
        print("first line")
        print("no line end", end="")
        wait("no line end")
        print("to stderr", file=sys.stderr)
        display("shown")
        print("last")
        wait("last")
        """
    )
    assert ending == {}
    assert [output.get("text", "shown").strip() for output in outputs if output.get("text", "x").strip()] in (
        ["first line", "no line end", "to stderr", "shown", "last"],
        ["first line\nno line end", "to stderr", "shown", "last"],
    )


def test_clear_and_update(node: Node) -> None:
    _, outputs = node.one(
        """
        from IPython.display import clear_output
        print("old")
        clear_output(wait=True)
        handle = display("a", display_id=True)
        handle.update("b")
        """
    )
    assert [output["output_type"] for output in outputs] == [
        "stream",
        "clear_output",
        "display_data",
        "update_display_data",
    ]
    assert outputs[1]["wait"] is True
    assert outputs[2]["transient"] == outputs[3]["transient"]


def test_a_traceback_shows_the_cells_own_lines(node: Node) -> None:
    ending, outputs = node.one("def f():\n    return 1 / 0\n\nf()", title="study.ipynb [7]")
    assert ending == "ZeroDivisionError: division by zero"
    (error,) = of_type(outputs, "error")
    shown = "".join(error["traceback"])
    assert (error["ename"], error["evalue"]) == ("ZeroDivisionError", "division by zero")
    for part in ("study.ipynb [7]", "\x1b["):
        assert part in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "return 1 / 0" in plain
    assert "line 4" in plain


@pytest.mark.parametrize(
    ("source", "ending"),
    [
        ("x = = 1", "SyntaxError"),
        ("raise ExceptionGroup('all', [ValueError(1)])", "ExceptionGroup: all (1 sub-exception)"),
        ("%nonsense", "UsageError"),
        ("import sys; sys.exit(3)", "RuntimeError: the cell called sys.exit(3)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_every_failure_is_an_error_output(node: Node, source: str, ending: str) -> None:
    if "ExceptionGroup" in source and sys.version_info < (3, 11):
        pytest.skip("exception groups")
    ended, outputs = node.one(source)
    assert ended.startswith(ending)
    assert len(of_type(outputs, "error")) == 1


@pytest.mark.parametrize("source", ["import sys; sys.exit()", "import sys; sys.exit(0)", "exit()", "quit()"])
def test_leaving_with_zero_is_a_normal_end(node: Node, source: str) -> None:
    assert node.one(f"x = 1\n{source}", out=["x"]) == ({"x": "1"}, [])


def test_what_cannot_be_given_back_is_said(node: Node) -> None:
    source = "g = (i for i in [])\nif 0:\n    z = 1\ny = 2"
    ending, outputs = node.one(source, out=["g", "z", "y"])
    assert ending == {"y": "2"}
    assert "'g' is not given back, it is a generator" in text(outputs, "stderr")
    assert "'z' is not given back" in text(outputs, "stderr")
    ending, _ = node.one(source, out=["y", "z"], explicit_out=True)
    assert ending == "NameError: the cell ended without assigning 'z', which --out names"


def test_tasks_of_a_batch_share_a_shell_but_no_variables(node: Node) -> None:
    source = """
        import os
        before = os.path.basename(os.getcwd())
        leaked = [name for name in ("kept", "In2") if name in globals()]
        kept = In2 = 1
        from __future__ import annotations
        shell = id(get_ipython())
        %cd -q home
        (seed, leaked, before, len(In), shell);
        seed * 2
        """
    ended = node.run(*((source, {"seed": seed}) for seed in range(3)), out=["seed", "leaked", "before", "shell"])
    first = ended[0][0]
    for seed, (ending, outputs) in enumerate(ended):
        assert ending == {**first, "seed": str(seed)}
        (result,) = of_type(outputs, "execute_result")
        assert (result["data"]["text/plain"], result["execution_count"]) == (str(seed * 2), 1)
    assert first["leaked"] == "[]"


def test_forked_children_write_to_the_log_only(node: Node) -> None:
    ending, outputs = node.one(
        """
        import os
        child = os.fork()
        if child == 0:
            print("from the child", flush=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print("from the parent")
        """,
        out=["status"],
    )
    assert ending == {"status": "0"}
    assert text(outputs, "stdout") == "from the parent\n"
    assert "from the child" in node.log


def test_streams_are_usable_as_files(node: Node) -> None:
    ending, _ = node.one(
        """
        import logging, subprocess, sys
        logging.basicConfig(stream=sys.stdout)
        logging.error("logged")
        subprocess.run(["echo", "by a child process"], stdout=sys.stdout, check=True)
        sys.stdout.buffer.write(b"bytes\\n")
        sys.stdout.write("\\udcff unusual\\n")
        tty = sys.stdout.isatty()
        """,
        out=["tty"],
    )
    assert ending == {"tty": "False"}
    for part in ("logged", "by a child process", "bytes", "unusual"):
        assert part in node.log


def test_matplotlib_inline_is_fine_on_a_node(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = (
        "from jupyter_hybrid import cellrun\n"
        "said = []\n"
        "source = '%matplotlib inline\\nimport matplotlib.pyplot as plt\\nplt.plot([1, 2]);'\n"
        "payload = {'source': source, 'inputs': {}, 'out': (), 'explicit_out': False, 'title': 'In[1]'}\n"
        "cellrun.run_cell(payload, {}, said.append)\n"
        "print(sorted({kind for output in said for kind in output.get('data', {})}))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['image/png', 'text/plain']"
