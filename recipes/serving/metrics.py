"""Counters of the service, in the format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from synthkit.recipes.serving.live_bundle import LiveBundle

Asgi = Callable[[Any, Any, Any], Awaitable[None]]

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters of one service, apart from those of any other in the same process.

    Args:
        live: the bundle; its version and digest are read at each request for the metrics.

    Attributes:
        waiting: a gauge, requests for answers in work and in the queue.
    """

    def __init__(self, live: LiveBundle) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self._live = live
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "synthkit_requests", "Answered requests.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "synthkit_predict_seconds",
            "From the head of a request to its answer, of those answered with 200.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._bundle = Gauge(
            "synthkit_bundle_info",
            "Which bundle answers.",
            ["version", "digest", "precision"],
            registry=registry,
        )
        self._problem = Gauge(
            "synthkit_bundle_problem", "1 while the folder holds a bundle that is broken.", registry=registry
        )
        self.waiting = Gauge("synthkit_waiting", "Requests in work and in the queue.", registry=registry)
        ProcessCollector(registry=registry)

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        from prometheus_client import generate_latest

        current = self._live.current
        self._bundle.clear()
        self._bundle.labels(current.bundle.facts.version, current.digest, current.bundle.precision).set(1)
        self._problem.set(bool(self._live.problem))
        return generate_latest(self._registry).decode()

    def counting(self, app: Asgi, paths: Collection[str]) -> Asgi:
        """An ASGI application that counts the answers of another one.

        Args:
            app: the application.
            paths: the routes; any other path is counted as "other", or clients could grow the table.
        """

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            started = time.perf_counter()

            async def send_counted(message: Any) -> None:
                # Counted before it is sent, so that whoever got an answer is in the figures.
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in paths else "other"
                    self._count(path, message["status"], started)
                await send(message)

            await app(scope, receive, send_counted)

        return counted

    def _count(self, path: str, status: int, started: float) -> None:
        self._requests.labels(path, str(status)).inc()
        if (path, status) == ("/predict", 200):
            self._seconds.observe(time.perf_counter() - started)

    def answered(self) -> dict[str, int]:
        """Status -> number of requests that were answered with it."""
        answered: dict[str, int] = {}
        for family in self._requests.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    status = sample.labels["status"]
                    answered[status] = answered.get(status, 0) + int(sample.value)
        return answered
