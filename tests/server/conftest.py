"""A Jupyter server with the extension in this process, by pytest-jupyter; and real ones in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_jupyter.jupyter_server import *  # noqa: F403  fixtures and hooks, for the tests of this folder only
from tornado.httpclient import HTTPResponse

DEADLINE = 60.0


@pytest.fixture
def jp_server_config() -> dict[str, Any]:
    return {"ServerApp": {"jpserver_extensions": {"jupyter_hybrid": True}}}


class Api:
    """Makes requests of the server in this process, and waits for what they answer."""

    def __init__(self, fetch: Any) -> None:
        self.fetch = fetch

    async def __call__(
        self, path: str, status: int = 200, *, method: str = "GET", body: Any = None, **params: Any
    ) -> Any:
        """Make a request, check its status and return its JSON."""
        data = json.dumps(body) if body is not None else None
        response: HTTPResponse = await self.fetch(
            "hybrid/api/v1", path, method=method, body=data, params=params, raise_error=False,
            allow_nonstandard_methods=True, request_timeout=DEADLINE,
        )  # fmt: skip
        assert response.code == status, response.body
        if not response.body:
            return None
        answer = json.loads(response.body)
        if status >= 400:
            assert set(answer) == {"error", "message", "hint"}
            assert all(isinstance(value, str) for value in answer.values())
            assert answer["message"]
        return answer

    async def until(self, look: Callable[[], Awaitable[Any]], what: str) -> Any:
        """Return the first answer that is true."""
        end = time.monotonic() + DEADLINE
        while not (answer := await look()):
            assert time.monotonic() < end, f"{what}: not within {DEADLINE:g} s"
            await asyncio.sleep(0.02)
        return answer

    async def job(self, job_id: str, holds: Callable[[Any], bool]) -> Any:
        """Return a job in detail once something holds of it."""

        async def look() -> Any:
            job = await self(f"jobs/{job_id}")
            return job if holds(job) else None

        return await self.until(look, f"job {job_id}")

    async def ended(self, job_id: str) -> Any:
        """Return a job in detail once it has ended."""
        return await self.job(job_id, lambda job: job["ended"] is not None)


@pytest.fixture
def api(jp_fetch: Any) -> Api:
    return Api(jp_fetch)


class Listener:
    """What a browser hears of the event stream."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.messages: list[dict[str, Any]] = []

    async def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first message of which something holds."""
        while True:
            text = await asyncio.wait_for(self.socket.read_message(), DEADLINE)
            assert text is not None, "the server has closed the event stream"
            message = json.loads(text)
            self.messages.append(message)
            if wanted(message):
                return message


@pytest.fixture
def listen(jp_ws_fetch: Any, api: Api) -> Callable[[], Any]:
    """Return what opens the event stream: ``async with listen() as listener``."""

    @contextlib.asynccontextmanager
    async def listen() -> AsyncIterator[Listener]:
        await api("jobs")  # from now on all changes are told
        socket = await jp_ws_fetch("api", "events", "subscribe")
        try:
            yield Listener(socket)
        finally:
            socket.close()

    return listen


@pytest.fixture
def elsewhere() -> Callable[..., str]:
    """Return what runs a program in a process of its own, as a kernel or a shell would; it returns what that prints."""

    def run(program: str, *arguments: str) -> str:
        argv = [sys.executable, "-W", "ignore", "-c", program, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


class Server:
    """A real ``jupyter server`` in a process of its own."""

    token = "a-token-of-tests"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        runtime = folder / "runtime"
        root = folder / "root"
        root.mkdir(exist_ok=True)
        environment = {**os.environ, "JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_DATA_DIR": str(folder / "share")}
        config = folder / "jupyter_server_config.json"
        config.write_text(
            json.dumps(
                {
                    "ServerApp": {
                        "jpserver_extensions": {"jupyter_hybrid": True},
                        "ip": "127.0.0.1",
                        "port": 0,
                        "open_browser": False,
                        "allow_root": True,
                        "root_dir": str(root),
                    },
                    "IdentityProvider": {"token": self.token},
                }
            )
        )
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyter_server", f"--config={config}"],
                env=environment, stdout=log, stderr=log, cwd=root,
            )  # fmt: skip
        try:
            self.url = self._wait(runtime)
        except BaseException:
            self.kill()
            raise

    def _wait(self, runtime: Path) -> str:
        end = time.monotonic() + DEADLINE
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            for path in runtime.glob(f"jpserver-{self.process.pid}.json"):
                with contextlib.suppress(ValueError, urllib.error.URLError, ConnectionError):
                    url = f"http://127.0.0.1:{json.loads(path.read_text())['port']}"
                    self.url = url
                    self.get("health")
                    return url
            time.sleep(0.02)

    def request(self, path: str, method: str = "GET", body: Any = None, **params: Any) -> tuple[int, Any]:
        """Return status and JSON of a request."""
        query = f"?{urllib.parse.urlencode(params)}" if params else ""
        request = urllib.request.Request(
            f"{self.url}/hybrid/api/v1/{path}{query}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                data = answer.read()
                return answer.status, json.loads(data) if data else None
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def get(self, path: str, **params: Any) -> Any:
        """Return the JSON of a GET that goes well."""
        status, answer = self.request(path, **params)
        assert status == 200, answer
        return answer

    def stop(self) -> None:
        """Have it end as Ctrl-C does."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(DEADLINE)

    def kill(self) -> None:
        """End it without a word."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[], Server]]:
    """Return what starts a server; all are ended after the test."""
    started: list[Server] = []

    def start() -> Server:
        started.append(Server(tmp_path / f"server{len(started)}"))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return what writes the pools of this test."""

    def write(text: str) -> Path:
        path = tmp_path / "hybrid.yaml"
        path.write_text(text)
        monkeypatch.setenv("JUPYTER_HYBRID_CONFIG", str(path))
        return path

    return write
