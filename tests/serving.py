"""A service in a thread, a client for it, and pictures to send."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from synthkit.engines.bundle.format import Bundle
from synthkit.recipes.serving.app import Service, listen, make_server
from synthkit.recipes.serving.live_bundle import LiveBundle
from synthkit.recipes.serving.request import Limits
from tests.tiny_students import noise


class Client:
    """One connection per request to a service that runs in a thread."""

    def __init__(self, port: int, service: Service) -> None:
        self.port, self.service = port, service

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            text = reply.read().decode()
        answer = json.loads(text) if reply.headers["content-type"] == "application/json" else text
        return reply.status, answer, reply.headers

    def predict(self, body: bytes, query: str = "", **headers: str) -> tuple[int, Any]:
        return self.ask("POST", f"/predict{query}", body, headers)[:2]


@contextlib.contextmanager
def serving(bundle: Path, token: str | None = None, **limits: Any) -> Iterator[Client]:
    """Run a service in a thread."""
    service = Service(LiveBundle(bundle), Limits(**limits), token)
    server, listening = make_server(service), listen("127.0.0.1", 0, guarded=False)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Client(listening.getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


def picture(kind: str = "PNG", seed: int = 0, size: int = 40, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(1, size, seed)[0]).convert(mode).save(stream, kind)
    return stream.getvalue()


def predicted(bundle: Path, image: bytes, tmp_path: Path, top: int) -> dict[str, Any]:
    """What `synthkit predict` says of the same file."""
    (tmp_path / "photo").write_bytes(image)
    opened = Bundle.open(bundle)
    (found,) = opened.predict(tmp_path / "photo", top)
    return {name: value for name, value in found.to_json().items() if name != "path"}
