"""`synthkit serve` under load: many clients, good images and garbage.

    python -m benchmarks.serving_load --bundle DIR [--requests 10000] [--clients 16]

Starts the service as a user does, on a free port of this machine. Every good request must be answered as
`synthkit predict` answers for the same file, every bad one with 4xx, and the process must not end or grow.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw

from synthkit.artifacts import write_json
from synthkit.engines.bundle.format import Bundle
from synthkit.errors import EngineError
from synthkit.one_line import OneLineErrors
from synthkit.recipes.device.bench import resident_bytes
from synthkit.recipes.serving.request import Limits

#: One request in this many is garbage.
_EVERY = 100
_TOP = 3
#: Largest growth of the memory since its first reading, as a fraction.
_MOST_GROWTH = 0.1
_PATIENCE = 60.0
_KINDS = (("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("BMP", "RGB"))
_GONE = "no answer wanted"

Garbage = Callable[[int], "int | str"]


@dataclass
class Observed:
    """Observations of the clients.

    Attributes:
        seconds: of every good request.
        wrong: every fault, in words.
        bad: (kind of garbage, status) -> count.
        resident: answered requests -> bytes of the service in RAM.
    """

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)
    resident: dict[int, int] = field(default_factory=dict)


def sample_images(folder: Path, count: int = 48, seed: int = 0) -> list[Path]:
    """Image files of several formats, modes and sizes.

    Args:
        folder: where to write them.
        count: number of files.
        seed: of their content.
    """
    rng = np.random.default_rng(seed)
    paths = []
    for index, (kind, mode) in zip(range(count), itertools.cycle(_KINDS), strict=False):
        width, height = (int(side) for side in rng.integers(24, 640, 2))
        image = Image.new("RGB", (width, height), tuple(int(value) for value in rng.integers(0, 256, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            (left, top), size = rng.uniform(0, 1, 2) * image.size, rng.uniform(4, 200, 2)
            colour = tuple(int(value) for value in rng.integers(0, 256, 3))
            draw.ellipse((left, top, left + size[0], top + size[1]), fill=colour)
        paths.append(folder / f"{index}.{kind.lower()}")
        image.convert(mode).save(paths[-1], kind)
    return paths


def garbage(good_jpeg: bytes) -> dict[str, Garbage]:
    """Name -> a function that sends one bad request to a port and returns the status of the answer.

    Args:
        good_jpeg: content of a JPEG file.
    """
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    bodies: dict[str, tuple[bytes, dict[str, str]]] = {
        "truncated jpeg": (good_jpeg[: len(good_jpeg) // 2], {}),
        "jpeg of 20 bytes": (good_jpeg[:20], {}),
        "text": (b"not an image at all", {"Content-Type": "image/jpeg"}),
        "json": (b'{"image": "/etc/passwd"}', {"Content-Type": "application/json"}),
        "nothing": (b"", {}),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}),
        "bomb of 400 megapixels": (_png("1", 20_000), {}),
        "bomb of 36 megapixels": (_png("RGB", 6_000), {}),
        "body too large": (bytes(Limits().body_bytes + 1), {}),
        "broken multipart": (b"--y\r\nnonsense", multipart),
        "multipart without a file": (
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
            multipart,
        ),
    }
    sent = {name: partial(_posted, body, headers) for name, (body, headers) in bodies.items()}
    return sent | {
        "top of nothing": lambda port: _status(port, "POST", "/predict?top=-1", good_jpeg, {}),
        "wrong method": lambda port: _status(port, "DELETE", "/predict", b"", {}),
        "wrong path": lambda port: _status(port, "GET", "/../etc/passwd", b"", {}),
        "head of 3 MB": lambda port: _raw(port, b"POST /predict HTTP/1.1\r\nX: " + b"a" * 3_000_000),
        "no HTTP": lambda port: _raw(port, bytes(range(256)) * 8 + b"\r\n\r\n"),
        "gone in the middle": _gone,
    }


def _posted(body: bytes, headers: dict[str, str], port: int) -> int:
    return _status(port, "POST", "/predict", body, headers)


def _png(mode: str, side: int) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (side, side)).save(stream, "PNG")
    return stream.getvalue()


def _status(port: int, method: str, path: str, body: bytes, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        reply.read()
        return reply.status


def _raw(port: int, data: bytes) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        answer = connection.recv(4096).decode("latin-1")
    return int(answer.split()[1])


def _gone(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n" + bytes(100))
    return _GONE


@contextlib.contextmanager
def running_service(bundle: Path, *arguments: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Port and process of `synthkit serve` on a free port.

    Args:
        bundle: the bundle to serve.
        arguments: further command line arguments.
    """
    line = [sys.executable, "-m", "synthkit", "serve", "--bundle", str(bundle), "--port", "0", *arguments]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = process.stderr.readline()
        # A full pipe would stop the service.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        try:
            started = re.match(r"http://\S+:(\d+) answers", said)
            if not started:
                raise EngineError(f"the service did not start: {said.strip()}")
            yield int(started[1]), process
        finally:
            process.send_signal(signal.SIGTERM)
            _wait_for_end(process)
            reader.join()


def _wait_for_end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def load(bundle: Path, requests: int, clients: int) -> dict[str, Any]:
    """Send requests to a service and check every answer.

    Args:
        bundle: the bundle to serve.
        requests: number of requests, one in a hundred of them garbage.
        clients: number of threads that send them.

    Returns:
        ok, wrong (in words), bad (kind -> status -> count), latency_ms, requests_per_second, resident_bytes
        (answered requests -> bytes), exit_code.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = sample_images(Path(scratch))
        opened = Bundle.open(bundle)
        # One image at a time, as in the service.
        expected = [opened.predict(path, _TOP)[0].to_json() for path in paths]
        files = [path.read_bytes() for path in paths]
    observed = Observed()
    with running_service(bundle) as (port, process):
        numbers = iter(range(requests))
        client = _Client(
            port, files, expected, garbage(files[0]), numbers, threading.Lock(), observed, process.pid
        )
        started = time.perf_counter()
        threads = [threading.Thread(target=client.run) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        if process.poll() is not None:
            observed.wrong.append(f"the service ended with {process.returncode}")
    return _result(observed, requests, clients, seconds, process.returncode)


@dataclass
class _Client:
    """Client of all threads: each takes the next number and sends its request."""

    port: int
    files: Sequence[bytes]
    expected: Sequence[dict[str, Any]]
    garbage: dict[str, Garbage]
    numbers: Iterator[int]
    lock: threading.Lock
    observed: Observed
    process: int
    done: int = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        with contextlib.closing(connection):
            while (number := self._next()) is not None:
                try:
                    self._bad(number) if number % _EVERY == _EVERY // 2 else self._good(number, connection)
                except (OSError, http.client.HTTPException, ValueError, IndexError) as error:
                    self._note(f"request {number}: {type(error).__name__}: {error}")
                    connection.close()
                self._count()

    def _next(self) -> int | None:
        with self.lock:
            return next(self.numbers, None)

    def _good(self, number: int, connection: http.client.HTTPConnection) -> None:
        which = number % len(self.files)
        started = time.perf_counter()
        connection.request("POST", f"/predict?top={_TOP}", self.files[which])
        reply = connection.getresponse()
        answer = json.loads(reply.read())
        taken = time.perf_counter() - started
        wanted = {name: value for name, value in self.expected[which].items() if name != "path"}
        with self.lock:
            self.observed.seconds.append(taken)
        if reply.status != 200 or {name: answer.get(name) for name in wanted} != wanted:
            self._note(f"request {number}: {reply.status} {answer}, expected {wanted}")

    def _bad(self, number: int) -> None:
        name = list(self.garbage)[number // _EVERY % len(self.garbage)]
        status = self.garbage[name](self.port)
        with self.lock:
            self.observed.bad[name, str(status)] += 1
        if not (status == _GONE or 400 <= int(status) < 500):
            self._note(f"request {number}: {name} was answered with {status}")

    def _note(self, text: str) -> None:
        with self.lock:
            self.observed.wrong.append(text)

    def _count(self) -> None:
        with self.lock:
            self.done += 1
            if self.done % 1000 == 0:
                self.observed.resident[self.done] = resident_bytes(self.process)


def _result(
    observed: Observed, requests: int, clients: int, seconds: float, exit_code: int
) -> dict[str, Any]:
    bad: dict[str, dict[str, int]] = {}
    for (name, status), count in sorted(observed.bad.items()):
        bad.setdefault(name, {})[status] = count
    shares = np.percentile(1e3 * np.array(observed.seconds), (50, 90, 99))
    memory = list(observed.resident.values())
    growth = memory[-1] / memory[0] - 1 if memory else 0.0
    return {
        "ok": not observed.wrong and exit_code == 0 and growth < _MOST_GROWTH,
        "requests": requests,
        "clients": clients,
        "good": len(observed.seconds),
        "wrong": observed.wrong[:20],
        "bad": bad,
        "latency_ms": dict(zip(("p50", "p90", "p99"), map(float, shares), strict=True)),
        "requests_per_second": requests / seconds,
        "resident_bytes": observed.resident,
        "growth": growth,
        "exit_code": exit_code,
    }


@click.command(cls=OneLineErrors)
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--requests", type=click.IntRange(min=100), default=10_000, show_default=True)
@click.option("--clients", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(bundle: Path, requests: int, clients: int, out: Path | None) -> None:
    """Put `synthkit serve` under load and print JSON; exits with 1 where something went wrong."""
    result = load(bundle, requests, clients)
    click.echo(json.dumps(result, indent=1))
    if out:
        write_json(out, result)
    raise SystemExit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
