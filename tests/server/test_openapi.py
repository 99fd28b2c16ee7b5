"""The OpenAPI document describes what the server does: schemathesis drives a real server from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

import jupyter_hybrid as hy
from jupyter_hybrid.server.handlers import BASE, ROUTES, openapi

VERBS = ("get", "post", "put", "patch", "delete")


def test_every_route_is_documented() -> None:
    routes = {}
    for pattern, handler in ROUTES[:-1]:  # the last is for all that is not there
        path = pattern.removeprefix(BASE).replace(r"\.", ".").replace("([^/]+)", "{}")
        for one in ("hold", "release") if "(hold|release)" in path else ("",):
            routes[path.replace("(hold|release)", one)] = {verb for verb in VERBS if verb in vars(handler)}
    paths = json.loads(openapi())["paths"]
    assert {re.sub(r"\{\w+\}", "{}", path): {v for v in item if v in VERBS} for path, item in paths.items()} == routes


@pytest.mark.timeout(600)
def test_schemathesis_finds_no_answer_that_is_not_documented(server: Callable[[], Any]) -> None:
    job = hy.Executor("local").submit(pow, 2, 10)
    array = hy.Executor("local").array(pow, [1, 2, "x"], [1, 2, 3], batch=2)
    assert job.result(60) == 1024
    array.wait_for(lambda: array.run.row.state.final, 60)
    running = server()
    document = json.loads(openapi())
    del document["paths"]["/doctor"]  # runs a job each time; it has a test of its own
    document["components"]["parameters"]["id"]["schema"]["enum"] = [job.id, array.id, "aaaaaaaaaa"]
    operations = [each.ok() for each in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(operations) == sum(len(VERBS) - len(set(VERBS) - set(item)) for item in document["paths"].values())
    headers = {"Authorization": f"token {running.token}"}
    # Those that remove the jobs come last.
    for operation in sorted(operations, key=lambda operation: operation.method.upper() == "DELETE"):

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def drive(case: Any) -> None:
            # What a cursor or the name of a resource may be, the document does not say.
            case.call_and_validate(
                base_url=f"{running.url}{BASE}", headers=headers, timeout=60, excluded_checks=[positive_data_acceptance]
            )

        drive()
    assert running.get("health")["status"] == "ok"
    assert "Traceback" not in running.log.read_text()
