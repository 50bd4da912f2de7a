"""What uvicorn leaves open about a request's head: how long it may take, and how large it may be.

uvicorn bounds the time between two requests, but not the time that a head takes to arrive, so that a client
sending a byte a minute would hold its connection for ever. Its bound on the size counts what has arrived of
an incomplete head; one that arrives in a single piece passes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

Asgi = Callable[[Any, Any, Any], Awaitable[None]]

HEAD_BYTES = 16 * 2**10


def refusing_large_heads(app: Asgi) -> Asgi:
    """An ASGI application that answers 431 where another one would get more than `HEAD_BYTES` of head."""
    reason = json.dumps({"error": f"the request's head is larger than {HEAD_BYTES} bytes"}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]

    async def checked(scope: Any, receive: Any, send: Any) -> None:
        size = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
        size += sum(len(name) + len(value) for name, value in scope.get("headers", ()))
        if size <= HEAD_BYTES:
            return await app(scope, receive, send)
        await send({"type": "http.response.start", "status": 431, "headers": headers})
        await send({"type": "http.response.body", "body": reason})

    return checked


def impatient_protocol(seconds: float) -> type[asyncio.Protocol]:
    """A protocol class for `uvicorn.Config(http=...)`.

    Args:
        seconds: how long a connection may be without a request in work while it sends something.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ImpatientProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self._give_up)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return ImpatientProtocol
