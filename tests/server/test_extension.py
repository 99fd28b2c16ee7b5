"""How Jupyter Server finds the extension, and that kernels load nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jupyter_hybrid
from jupyter_hybrid.server.app import HybridApp


def test_the_hooks() -> None:
    (point,) = jupyter_hybrid._jupyter_server_extension_points()
    assert point == {"module": "jupyter_hybrid.server.app", "app": HybridApp}
    assert HybridApp.name == "hybrid"
    (path,) = jupyter_hybrid._jupyter_labextension_paths()
    assert path["src"] == "labextension"


def test_a_kernel_loads_nothing_of_the_server() -> None:
    program = (
        "import sys, json, jupyter_hybrid as hy\n"
        "hy.Executor('local').submit(pow, 2, 3).result(60)\n"
        "print(json.dumps([name for name in ('tornado', 'jupyter_server', 'jupyter_hybrid.server', 'prometheus_client')"
        " if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_real_server_finds_it_and_says_so(server: Callable[[], Any]) -> None:
    running = server()
    assert "jupyter_hybrid | extension was successfully loaded" in running.log.read_text()
    assert running.get("health")["version"] == jupyter_hybrid.__version__
    assert {pool["kind"] for pool in running.get("pools")["pools"]} >= {"local"}
    running.stop()
    assert running.process.returncode in (0, -15)
    assert "Traceback" not in running.log.read_text()
