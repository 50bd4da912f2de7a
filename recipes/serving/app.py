"""A small HTTP service for one bundle: POST an image, get its class.

    POST /predict?top=N   an image as the body, or as the one file of a multipart form -> JSON
    GET  /healthz         the bundle in use; "problem" tells why a newer one is not
    GET  /metrics         Prometheus text
    GET  /                a page to drop a photo on or to use the camera with

A request is admitted or refused before its body is read, so memory is bounded by `Limits`. Decoding and
inference run in worker threads; the event loop only moves bytes. uvicorn sets no deadline for a request's
head: where strangers can reach the service, put a proxy with such a deadline before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.errors import ConfigError
from synthkit.recipes.serving.live_bundle import Current, LiveBundle
from synthkit.recipes.serving.metrics import Asgi, Metrics
from synthkit.recipes.serving.request import Limits, Refusal, classify, image_bytes, number_of_labels

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("classify.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src blob: data:; media-src blob:; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
_CONNECTIONS = 512
_HEAD_BYTES = 16 * 2**10  # of a request's head while it is incomplete
_SHUTDOWN_SECONDS = 30  # for requests in work when the service ends
_REFRESH_SECONDS = 1.0


class Service:
    """The service's routes.

    Args:
        live: the bundle.
        limits: bounds on the work that clients can cause.
        token: clients must send it as `Authorization: Bearer TOKEN`; None asks for nothing. The page and
            /healthz are open to all: they show no answers and no images.
    """

    def __init__(self, live: LiveBundle, limits: Limits, token: str | None = None) -> None:
        self.live, self.limits, self.token = live, limits, token
        self.metrics = Metrics(live)
        self._pool = ThreadPoolExecutor(limits.jobs, "classify")
        self._admitted = 0

    def app(self) -> Asgi:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.routing import Route

        routes = [
            Route("/", self.page),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/healthz", self.health),
            Route("/metrics", self.show_metrics),
        ]
        handlers: dict[Any, Any] = {
            Refusal: _refused,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _failed,
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        return self.metrics.counting(app, [route.path for route in routes])

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        following = asyncio.create_task(self._follow_folder())
        yield
        following.cancel()
        self._pool.shutdown()

    async def _follow_folder(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            await asyncio.to_thread(self.live.refresh)

    async def predict(self, request: Request) -> Response:
        """Classify the image of a request."""
        self._check_token(request)
        top = number_of_labels(request)
        with self._admission():
            data = await image_bytes(request, self.limits)
            current = self.live.current
            answer = await asyncio.get_running_loop().run_in_executor(
                self._pool, classify, current, data, top, self.limits.pixels
            )
        return _json(answer.to_json())

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        if self._admitted >= self.limits.waiting:
            reason = f"{self._admitted} requests are waiting already; try again in a second"
            raise Refusal(503, reason, {"Retry-After": "1"})
        self._admitted += 1
        self.metrics.waiting.set(self._admitted)
        try:
            yield
        finally:
            self._admitted -= 1
            self.metrics.waiting.set(self._admitted)

    async def health(self, request: Request) -> Response:
        """The bundle in use, and why a newer one is not."""
        current, problem = self.live.current, self.live.problem
        facts = {"digest": current.digest, "classes": len(current.bundle.labels)}
        asks = {"token": self.token is not None, "problem": problem or None}
        return _json({"ok": True, **_identity(current), **facts, **asks})

    async def show_metrics(self, request: Request) -> Response:
        """Counters and histograms as Prometheus reads them."""
        from starlette.responses import Response

        self._check_token(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        """The page for the browser."""
        from starlette.responses import HTMLResponse

        text = await asyncio.to_thread(PAGE.read_text, encoding="utf-8")
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        kind, _, shown = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(shown.strip().encode("latin-1"), self.token.encode())
        if kind.lower() != "bearer" or not same:
            reason = "this service asks for its token: send the header `Authorization: Bearer TOKEN`"
            raise Refusal(401, reason, {"WWW-Authenticate": "Bearer"})


def _identity(current: Current) -> dict[str, Any]:
    return {"version": current.bundle.facts.version, "precision": current.bundle.precision}


def _json(data: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(data, status, headers)


async def _refused(request: Request, error: Refusal) -> Response:
    return _json({"error": error.reason}, error.status, error.headers)


async def _http_error(request: Request, error: Any) -> Response:
    reason = {
        404: "no such page; there are POST /predict, GET /healthz, GET /metrics and GET /",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, error.detail)
    return _json({"error": reason}, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return _json({"error": "the client went away before its body was complete"}, 400)


async def _failed(request: Request, error: Exception) -> Response:
    return _json({"error": "the service failed; its log says why"}, 500)


def listen(host: str, port: int, guarded: bool) -> socket.socket:
    """A listening socket.

    Args:
        host: name or address; others than this machine's own loopback are refused unless guarded.
        port: 0 takes a free one.
        guarded: the service asks for a token, or its user wants it open to all.

    Raises:
        ConfigError: the address is not to be had, or nothing guards it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        if not guarded and not all(ipaddress.ip_address(one[4][0]).is_loopback for one in found):
            raise ConfigError(
                f"--host {host} lets other machines in, and no token guards the service; give --token, "
                "or --no-token if everybody who reaches it may use it"
            )
        return socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --host or --port"
        ) from None


def make_server(service: Service) -> uvicorn.Server:
    """The HTTP server of a service, not yet running."""
    # Starlette would miss python_multipart at the first form only.
    import python_multipart  # noqa: F401
    import uvicorn

    config = uvicorn.Config(
        service.app(),
        http="h11",
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def run(server: uvicorn.Server, listening: socket.socket) -> None:
    """Answer until the process is told to end (Ctrl+C or SIGTERM), then finish what is in work.

    Args:
        server: what answers.
        listening: where requests arrive.
    """
    # uvicorn raises the signal again at its end.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    signal.signal(signal.SIGTERM, previous)
