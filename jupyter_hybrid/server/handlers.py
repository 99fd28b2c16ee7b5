"""HTTP: handlers parse, call the service, answer. All of them are authenticated and authorized for ``hybrid``."""

from __future__ import annotations

import functools
import json
from http.client import responses
from pathlib import Path
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.extension.handler import ExtensionHandlerMixin
from tornado.web import HTTPError, authenticated

from ..errors import ConfigError, HybridError, JobNotFound, PoolUnreachable, StoreError
from .acts import wanted
from .rows import BadRequest
from .service import Service
from .threads import Busy

BASE = "/hybrid/api/v1"

_ANSWERS: tuple[tuple[type[HybridError], int, str, str], ...] = (
    (BadRequest, 400, "bad_request", "see openapi.json"),
    (JobNotFound, 404, "not_found", "load the list of jobs anew"),
    (Busy, 503, "busy", "what was begun goes on; look again in a minute"),
    (PoolUnreachable, 503, "pool_unreachable", "jobs wait and lose nothing; jupyter hybrid doctor checks the pool"),
    (ConfigError, 500, "configuration", "correct the file that the message names"),
    (StoreError, 500, "store", "jupyter hybrid reindex builds the index of jobs anew from the run folders"),
    (HybridError, 409, "conflict", "load the job anew: its state has changed"),
)
_KINDS = {400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}
_HINTS = {
    401: "log in, or send the server's token",
    403: "log in, or send the server's token; or this user may not do it",
    404: "openapi.json lists what there is",
    405: "openapi.json lists what there is",
    500: "the server's log says more",
}


class _Handler(ExtensionHandlerMixin, APIHandler):
    auth_resource = "hybrid"
    _track_activity = False  # a panel that looks now and then does not keep an idle server alive

    @property
    def service(self) -> Service:
        service: Service = self.settings["hybrid_service"]
        return service

    @property
    def given(self) -> dict[str, str]:
        """The arguments of the request; of one that is given several times, the last."""
        return {name: self.get_query_argument(name) for name in self.request.query_arguments}

    def answer(self, data: Any) -> None:
        self.finish(json.dumps(data, separators=(",", ":"), allow_nan=False))

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        error = (kwargs.get("exc_info") or (None, None))[1]
        if isinstance(error, HybridError):
            status_code = next(status for kind, status, _, _ in _ANSWERS if isinstance(error, kind))
        super().send_error(status_code, **kwargs)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = (kwargs.get("exc_info") or (None, None))[1]
        kind = _KINDS.get(status_code, "error" if status_code < 500 else "internal")
        message, hint = responses.get(status_code, "Error"), _HINTS.get(status_code, "")
        if isinstance(error, HybridError):
            _, _, kind, hint = next(row for row in _ANSWERS if isinstance(error, row[0]))
            message = self.service.pools_known.mask.text(str(error))
        elif isinstance(error, HTTPError) and error.log_message:
            message = error.log_message
        self.finish(json.dumps({"error": kind, "message": message, "hint": hint}))

    def log_exception(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, HybridError):
            text = self.service.pools_known.mask.text(str(error))
            self.log.info("hybrid: %s %s: %s", self.request.method, self.request.path, text)
        else:
            super().log_exception(kind, error, trace)


class _Health(_Handler):
    @authenticated
    @authorized
    async def get(self) -> None:
        self.answer(await self.service.health())


class _Pools(_Handler):
    @authenticated
    @authorized
    async def get(self) -> None:
        self.answer({"pools": await self.service.pools()})


class _Pool(_Handler):
    @authenticated
    @authorized
    async def get(self, name: str) -> None:
        self.answer(await self.service.pool(name))


class _Jobs(_Handler):
    @authenticated
    @authorized
    async def get(self) -> None:
        self.answer(await self.service.jobs(self.given))


class _Job(_Handler):
    @authenticated
    @authorized
    async def get(self, job_id: str) -> None:
        self.answer(await self.service.job(job_id))

    @authenticated
    @authorized
    async def delete(self, job_id: str) -> None:
        await self.service.remove(job_id)
        self.set_status(204)
        self.finish()


class _Tasks(_Handler):
    @authenticated
    @authorized
    async def get(self, job_id: str) -> None:
        self.answer(await self.service.tasks(job_id, self.given))


class _Log(_Handler):
    @authenticated
    @authorized
    async def get(self, job_id: str, batch: str) -> None:
        self.answer(await self.service.log_part(job_id, batch, self.given))


class _Script(_Handler):
    @authenticated
    @authorized
    async def get(self, job_id: str) -> None:
        self.answer(await self.service.script(job_id))


class _Results(_Handler):
    @authenticated
    @authorized
    async def get(self, job_id: str) -> None:
        self.answer(await self.service.results(job_id, self.given))


class _Cancel(_Handler):
    @authenticated
    @authorized
    async def post(self, job_id: str) -> None:
        self.answer(await self.service.cancel(job_id))


class _Retry(_Handler):
    @authenticated
    @authorized
    async def post(self, job_id: str) -> None:
        everything, resources = wanted(self.get_json_body())
        self.answer(await self.service.retry(job_id, everything, resources))


class _Hold(_Handler):
    @authenticated
    @authorized
    async def post(self, job_id: str, what: str) -> None:
        self.answer(await self.service.hold(job_id, what == "hold"))


class _Checkpoints(_Handler):
    @authenticated
    @authorized
    async def get(self) -> None:
        self.answer(await self.service.checkpoints())


class _Doctor(_Handler):
    @authenticated
    @authorized(action="execute")  # type: ignore[untyped-decorator]
    async def get(self) -> None:
        self.check_xsrf_cookie()  # it runs a job, though it is a GET
        self.answer(await self.service.doctor(self.given.get("pool")))


class _Metrics(_Handler):
    @authenticated
    @authorized
    async def get(self) -> None:
        self.finish(await self.service.metrics(), set_content_type="text/plain; version=0.0.4; charset=utf-8")


@functools.cache
def openapi() -> str:
    """Return the OpenAPI document of the interface, as JSON."""
    import yaml

    return json.dumps(yaml.safe_load((Path(__file__).parent / "openapi.yaml").read_text()))


class _OpenApi(_Handler):
    @authenticated
    @authorized
    async def get(self) -> None:
        self.finish(openapi())


class _Nothing(_Handler):
    @authenticated
    @authorized
    async def get(self) -> None:
        raise HTTPError(404, "there is nothing here")

    post = put = patch = delete = get


ROUTES = [
    (BASE + route, handler)
    for route, handler in (
        ("/health", _Health),
        ("/pools", _Pools),
        ("/pools/([^/]+)", _Pool),
        ("/jobs", _Jobs),
        ("/jobs/([^/]+)", _Job),
        ("/jobs/([^/]+)/tasks", _Tasks),
        ("/jobs/([^/]+)/logs/([^/]+)", _Log),
        ("/jobs/([^/]+)/script", _Script),
        ("/jobs/([^/]+)/results", _Results),
        ("/jobs/([^/]+)/cancel", _Cancel),
        ("/jobs/([^/]+)/retry", _Retry),
        ("/jobs/([^/]+)/(hold|release)", _Hold),
        ("/checkpoints", _Checkpoints),
        ("/doctor", _Doctor),
        ("/metrics", _Metrics),
        (r"/openapi\.json", _OpenApi),
        ("(?:/.*)?", _Nothing),
    )
]
