"""A real JupyterLab and a real Chromium: `lab` is a server with data of its own, `page` a window on it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "test-artefacts" / "ui"
DEADLINE = 60.0
POOLS = "default: desk\npools:\n  desk: {kind: local, cpus: 2, memory: 4G, prices: {cpu_hour: 0.5}}\n"
POOLS += "  night: {kind: local, cpus: 1, memory: 1G}\n"
OWN = re.compile(r"reading 'schema'\).*/static/notebook/|Canceled future for", re.DOTALL)
"""Errors that come without any extension, too: of Notebook 7.6 loading its settings, of Lab losing its kernel."""
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


def until(reached: Callable[[], Any], what: str) -> Any:
    """Wait for something, and return it."""
    end = time.monotonic() + DEADLINE
    while not (found := reached()):
        assert time.monotonic() < end, f"not within {DEADLINE:g} s: {what}"
        time.sleep(0.05)
    return found


def expect(locator: Any) -> Any:
    """Wait for what is said next of a part of the page."""
    from playwright.sync_api import expect

    expect.set_options(timeout=DEADLINE * 1000)
    return expect(locator)


class Lab:
    """A Jupyter server of a test's own: notebooks in `root`, its address in `url`."""

    def __init__(self, root: Path, application: str = "lab") -> None:
        self.root, self.application = root, application
        self.token = secrets.token_hex(16)
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.port = 0

    def start(self) -> None:
        """Start the server, at the same address as the last time, and wait until it answers."""
        runtime = Path(os.environ["JUPYTER_RUNTIME_DIR"])
        for old in runtime.glob("jpserver-*.json"):
            old.unlink()
        with open(self.root.parent / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "jupyter", self.application, "--no-browser", "--allow-root"),
                    *("--ip=127.0.0.1", f"--port={self.port}", "--ServerApp.port_retries=0", "--ServerApp.password="),
                    *(f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.root}"),
                    *("--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True"),
                ],
                cwd=self.root,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

        def told() -> dict[str, Any] | None:
            assert self.process is not None
            assert self.process.poll() is None, (self.root.parent / "server.log").read_text()
            with contextlib.suppress(OSError, ValueError, StopIteration):
                found: dict[str, Any] = json.loads(next(runtime.glob("jpserver-*.json")).read_text())
                return found
            return None

        info = until(told, "the server's own file")
        self.port, self.url = info["port"], info["url"].rstrip("/")

    def stop(self) -> None:
        """End the server and its kernels."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser; it ends with the module: while it is there, no other test can run an event loop."""
    binary = shutil.which("chromium")
    built = (Path(sys.prefix) / "share/jupyter/labextensions/jupyter-hybrid/package.json").exists()
    if os.environ.get("CI") != "true" and not (binary and built):
        pytest.skip("no chromium, or the front end is not built: make packages front-end")
    assert binary, "no chromium: make packages"
    assert built, "the front end is not built: make front-end"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=list(ARGUMENTS))
        yield browser
        browser.close()


def configure(home: Path, monkeypatch: pytest.MonkeyPatch, theme: str = "JupyterLab Light") -> Path:
    """Give Jupyter folders of its own, without news from outside; return the root of its file browser."""
    top = home.parent
    config = Path(os.environ["JUPYTER_CONFIG_DIR"])
    for name in ("DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(top / name.lower() / "jupyter"))
    monkeypatch.setenv("JUPYTERLAB_WORKSPACES_DIR", str(top / "workspaces"))
    monkeypatch.setenv("JUPYTERLAB_SETTINGS_DIR", str(top / "settings"))
    settings = {
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/apputils-extension:themes": {"theme": theme},
        "jupyter-hybrid:panel": {"refresh": 2},
    }
    (config / "labconfig").mkdir(parents=True)
    (config / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(settings))
    (config / "hybrid.yaml").write_text(POOLS)
    root = top / "root"
    root.mkdir()
    return root


@pytest.fixture
def lab(home: Path, monkeypatch: pytest.MonkeyPatch, chromium: Any) -> Iterator[Lab]:
    """A JupyterLab with two pools on this machine."""
    server = Lab(configure(home, monkeypatch))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def page(lab: Lab, chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """JupyterLab in a window, with the panel open; errors of the page fail the test, its last view is kept."""
    with window(chromium, lab, request.node.name) as opened:
        opened.goto(f"{lab.url}/lab?token={lab.token}")
        command(opened, "hybrid:open-panel")
        yield opened


@contextlib.contextmanager
def window(chromium: Any, lab: Lab, name: str, width: int = 1280, height: int = 900, **options: Any) -> Iterator[Any]:
    """Open a window; errors of the page's scripts fail the test, its last view is kept."""
    errors: list[str] = []
    context = chromium.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(DEADLINE * 1000)
    opened = context.new_page()
    # Lab's own word about a lost server may come at any moment; the user sends it away.
    lost = opened.locator(".jp-Dialog", has_text="Server Connection Error")
    opened.add_locator_handler(lost, lambda dialog: dialog.get_by_role("button").last.click())
    opened.on("pageerror", lambda error: errors.append(f"{error}\n{error.stack}"))
    try:
        yield opened
    finally:
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        opened.screenshot(path=ARTEFACTS / f"{name}.png")
        context.close()
    assert not [error for error in errors if not OWN.search(error)]


def command(page: Any, name: str, **arguments: Any) -> None:
    """Run a command of Lab, when Lab is ready for it."""
    page.wait_for_function("name => window.jupyterapp?.commands?.hasCommand(name)", arg=name)
    page.evaluate("() => window.jupyterapp.restored.then(() => true)")  # else the restored layout undoes it
    page.wait_for_selector("#jupyter-hybrid-panel", state="attached")
    page.evaluate("([name, args]) => { void window.jupyterapp.commands.execute(name, args); }", [name, arguments])
