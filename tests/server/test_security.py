"""Who may ask, what may be read, what is masked; and that nothing is unpickled."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import Authorizer
from tornado.httpclient import HTTPResponse

import jupyter_hybrid as hy
from jupyter_hybrid import server
from jupyter_hybrid.pool import default_store
from jupyter_hybrid.server.handlers import ROUTES
from jupyter_hybrid.server.jobs import Jobs
from jupyter_hybrid.spec import new_id

PACKAGE = Path(server.__file__).parent
GETS = ["health", "pools", "pools/local", "jobs", "checkpoints", "metrics", "openapi.json", "nothing"]
OF_JOB = ["", "/tasks", "/tasks?index=0", "/tasks?state=d", "/logs/0", "/logs/0?task=0", "/script", "/results?verify=1"]
ACTS = ["cancel", "retry", "hold", "release"]


class ReadOnly(Authorizer):
    """Lets everybody read, and nobody else."""

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return action == "read"


@pytest.fixture
def raw(http_server_client: Any, jp_base_url: str, jp_auth_header: dict[str, str]) -> Callable[..., Any]:
    """Return what sends a request as it is written, without a further look at its path."""

    async def fetch(path: str, method: str = "GET", token: str | None = "", **options: Any) -> HTTPResponse:
        headers = dict(options.pop("headers", {}))
        if token is not None:
            headers.update({"Authorization": f"token {token}"} if token else jp_auth_header)
        response: HTTPResponse = await http_server_client.fetch(
            f"{jp_base_url}hybrid/api/v1/{path}", method=method, headers=headers, raise_error=False,
            allow_nonstandard_methods=True, follow_redirects=False, request_timeout=60, **options,
        )  # fmt: skip
        return response

    return fetch


def every(job_id: str) -> list[tuple[str, str]]:
    """Return all requests there are, as method and path."""
    found = [("GET", path) for path in [*GETS, "doctor?pool=local", *(f"jobs/{job_id}{path}" for path in OF_JOB)]]
    return [*found, *(("POST", f"jobs/{job_id}/{act}") for act in ACTS), ("DELETE", f"jobs/{job_id}")]


@pytest.mark.parametrize("token", [None, "wrong"])
async def test_without_the_right_token_there_is_no_answer(raw: Any, api: Any, token: str | None) -> None:
    job = hy.Executor("local").submit(pow, 2, 3)
    await api.ended(job.id)
    for method, path in every(job.id):
        response = await raw(path, method, token)
        assert response.code == 403, (method, path)
        assert job.folder.name.encode() not in response.body
        assert json.loads(response.body)["error"] == "forbidden"
    assert default_store().job(job.id)
    assert job.folder.exists()


async def test_what_changes_something_needs_the_xsrf_token(raw: Any, api: Any, jp_serverapp: Any) -> None:
    job = hy.Executor("local").submit(pow, 2, 3)
    await api.ended(job.id)
    # Logged in by a cookie, as a browser is: then another site could make the browser ask.
    signed = await raw("health", token=jp_serverapp.identity_provider.token)
    cookie = "; ".join(value.split(";")[0] for value in signed.headers.get_list("Set-Cookie"))
    assert (await raw("jobs", token=None, headers={"Cookie": cookie})).code == 200
    for method, path in every(job.id):
        if method != "GET" or path.startswith("doctor"):
            response = await raw(path, method, token=None, headers={"Cookie": cookie})
            assert response.code == 403, (method, path)
    assert default_store().job(job.id).attempt == 1


class TestAReadOnlyUser:
    @pytest.fixture
    def jp_server_config(self) -> dict[str, Any]:
        return {"ServerApp": {"jpserver_extensions": {"jupyter_hybrid": True}, "authorizer_class": ReadOnly}}

    async def test_reads_and_changes_nothing(self, raw: Any, api: Any) -> None:
        job = hy.Executor("local").submit(pow, 2, 3)
        await api.ended(job.id)
        for method, path in every(job.id):
            response = await raw(path, method)
            changes = method != "GET" or path.startswith("doctor")
            assert response.code == (403 if changes else 404 if path == "nothing" else 200), (method, path)
        assert default_store().job(job.id).attempt == 1


def test_every_handler_is_authenticated_and_authorized() -> None:
    for _, handler in ROUTES:
        assert handler.auth_resource == "hybrid"
    for node in ast.walk(ast.parse((PACKAGE / "handlers.py").read_text())):
        if isinstance(node, ast.AsyncFunctionDef):
            decorators = [ast.unparse(each).partition("(")[0] for each in node.decorator_list]
            assert decorators == ["authenticated", "authorized"], f"line {node.lineno}"


async def test_no_id_but_that_of_an_own_job_is_taken(raw: Any, api: Any, tmp_path: Path) -> None:
    job = hy.Executor("local").submit(pow, 2, 3)
    folder = Path((await api.ended(job.id))["folder"])
    (tmp_path / "secret").write_text("not to be read")
    # Another's run folder beside, which the Store knows nothing of.
    foreign = new_id()
    (folder.parent / foreign / "logs").mkdir(parents=True)
    (folder.parent / foreign / "logs" / "0.out").write_text("not to be read")
    (folder.parent / foreign / "spec.json").write_text((folder / "spec.json").read_text().replace(job.id, foreign))
    strange = ["..", ".", "%2e%2e", "..%2f..%2f", "%2e%2e%2f%2e%2e%2fsecret", f"..%2f{foreign}", f"{job.id}%2f..",
               f"{job.id}%00", "%00", job.id[:-1], job.id.upper(), f"{job.id}%0a", "%F0%9F%98%80", "*", "a" * 5000,
               f"{job.id}'", "%27%20OR%201=1--", "%ff"]  # fmt: skip
    for word in [*strange, foreign]:
        for method, path in every(word):
            if f"jobs/{word}" in path:
                response = await raw(path, method)
                assert response.code in (400, 404, 405), (method, path, response.code)
                assert b"not to be read" not in response.body
                assert b"Traceback" not in response.body
    for batch in ["..", "..%2f..%2f..%2fsecret", "-1", "1", "0.out", "99999999999", "%2e%2e", "0%00", "0%2f..", "x"]:
        response = await raw(f"jobs/{job.id}/logs/{batch}")
        assert response.code in (400, 404), batch
    for name in ["..%2f..", "x" * 3000, "%00", "local%00"]:
        assert (await raw(f"pools/{name}")).code in (400, 404)


async def test_links_and_pipes_in_a_run_folder_are_not_followed(api: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "0.out").write_text("not to be read")
    (secret / "script.0.sh").write_text("not to be read")
    job = hy.Executor("local").submit(pow, 2, 3)
    folder = Path((await api.ended(job.id))["folder"])
    results = (await api(f"jobs/{job.id}/results"))["results"]

    log, script, result = folder / "logs" / "0.out", folder / "script.0.sh", folder / results[0]["file"]
    for path in (log, script):
        path.unlink(missing_ok=True)
        path.symlink_to(secret / path.name)
    result.rename(secret / "0.bin")
    result.symlink_to(secret / "0.bin")
    (folder / "checkpoint" / "link").symlink_to(secret / "0.out")
    (folder / "checkpoint" / "folder").symlink_to(secret)
    assert (await api(f"jobs/{job.id}/logs/0"))["text"] == ""
    await api(f"jobs/{job.id}/script", 404)
    assert (await api(f"jobs/{job.id}/results", verify=1))["results"][0]["intact"] is False
    assert (await api(f"jobs/{job.id}"))["checkpoints"] == []

    log.unlink()
    os.mkfifo(log)  # who opens it would wait for ever
    assert (await api(f"jobs/{job.id}/logs/0"))["text"] == ""
    log.unlink()
    (folder / "logs").rmdir()
    (folder / "logs").symlink_to(secret)
    assert (await api(f"jobs/{job.id}/logs/0"))["text"] == ""

    elsewhere = tmp_path / job.id
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert (await api(f"jobs/{job.id}"))["folder"] is None
    await api(f"jobs/{job.id}/tasks", 404)


async def test_a_hostile_pickle_is_never_loaded(api: Any, raw: Any, tmp_path: Path) -> None:
    mark = tmp_path / "loaded"

    class Hostile:
        def __reduce__(self) -> Any:
            return open, (str(mark), "w")

    job = hy.Executor("local").array(pow, [2, "x"], [2, 2], batch=2)
    folder = Path((await api.ended(job.id))["folder"])
    bomb = pickle.dumps(Hostile())
    pickle.loads(bomb).close()
    assert mark.exists()  # it works
    mark.unlink()
    for path in [*folder.rglob("*.bin"), folder / "logs" / "0.out", folder / "checkpoint" / "model.pkl"]:
        path.write_bytes(bomb)
    with open(folder / "status" / "0.jsonl", "ab") as status:
        status.write(bomb + b"\n")
    for method, path in every(job.id):
        if method == "GET" and not path.startswith("doctor"):
            assert (await raw(path)).code in (200, 404), path
    for method, path in every(job.id):
        if method != "GET":
            assert (await raw(path, method)).code in (200, 204, 409), path
    assert not mark.exists()


def test_the_server_imports_nothing_that_unpickles() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong = {
                "pickle",
                "cloudpickle",
                "dill",
                "marshal",
                "shelve",
                "load_task",
                "load_all",
                "read_entry",
                "decode",
            }
            assert not wrong & set(names), f"{path.name}, line {node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("load_task", "load_all", "read_entry"), f"{path.name}, line {node.lineno}"


async def test_secrets_are_masked_everywhere(
    api: Any, raw: Any, listen: Any, pools: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "inherited-token-0815")
    pools(
        "default: here\npools:\n  here:\n    kind: local\n"
        "    environment: {PGPASSWORD: hunter2, PLACE: /a/long/place}\n"
        "    prologue: ['export AWS_SECRET_ACCESS_KEY=abcdefghij', '# curl -H \"Authorization: Bearer qwertzuiop\"']\n"
    )
    words = [
        "hunter2",
        "/a/long/place",
        "inherited-token-0815",
        "abcdefghij",
        "sk-" + "a1" * 15,
        "s3cr3t",
        "qwertzuiop",
    ]

    def leak(words: list[str]) -> None:
        import os

        print("here:", *words, "postgres://me:s3cr3t@host/db", os.environ["PGPASSWORD"], flush=True)
        raise RuntimeError(f"cannot log in: password=s3cr3t, {' '.join(words)}")

    shown: list[str] = []
    async with listen() as listener:
        job = hy.Executor("here", name="token = 'qwertzuiop'").submit(leak, words[:-2])
        await listener.until(lambda said: any(row["state"] == "FAILED" for row in said.get("jobs", ())))
        shown += map(json.dumps, listener.messages)
    assert "cannot log in" in shown[-1]
    for method, path in every(job.id):
        if method == "GET" and not path.startswith("doctor"):
            shown.append((await raw(path)).body.decode())
    log = (await api(f"jobs/{job.id}/logs/0"))["text"]
    assert log.startswith("here: *******")
    for position in range(0, len(log), 3):  # also where a part begins in the middle of one
        shown.append((await api(f"jobs/{job.id}/logs/0", offset=position, limit=11))["text"])
    for text in shown:
        assert not [word for word in words if word in text], text


async def test_the_index_of_a_job_cannot_point_elsewhere(api: Any, tmp_path: Path) -> None:
    job = hy.Executor("local").submit(pow, 2, 3)
    folder = Path((await api.ended(job.id))["folder"])
    other = tmp_path / "other"
    folder.rename(other)
    default_store().update_job(job.id, 1, state=Jobs.row(job.id).state, folder=str(other))
    assert (await api(f"jobs/{job.id}"))["folder"] is None  # the folder of a job has the job's id for its name
    await api(f"jobs/{job.id}/script", 404)
    await api(f"jobs/{job.id}", 409, method="DELETE")
    assert other.exists()
