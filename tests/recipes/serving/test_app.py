"""The service answers as `predict` does, refuses with a reason, and is neither blocked nor filled up."""

import contextlib
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving_load
from synthkit import standalone
from synthkit.artifacts import digest
from synthkit.engines.bundle.format import Bundle, read_facts, seal
from synthkit.errors import ConfigError
from synthkit.recipes.serving import app as serve
from synthkit.recipes.serving.app import listen
from synthkit.recipes.serving.request import FORMATS
from tests.serving import Client, picture, predicted, serving

Start = Callable[..., Client]


@pytest.fixture
def start(good: Path) -> Iterator[Start]:
    """Runs a service, of the good bundle where no other is named; it ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda bundle=good, **given: stack.enter_context(serving(bundle, **given))


def multipart(*parts: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    lines = [
        f"--edge\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + content + b"\r\n"
        for disposition, content in parts
    ]
    return b"".join(lines) + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, "RGB") for kind in FORMATS] + [("PNG", "RGBA"), ("TIFF", "L")]
)
def test_an_image_is_answered_as_predict_answers(
    start: Start, good: Path, tmp_path: Path, kind: str, mode: str
) -> None:
    image = picture(kind, mode=mode)
    status, answer = start().predict(image, "?top=2")
    assert status == 200
    expected = predicted(good, image, tmp_path, top=2)
    assert len(expected["top"]) == 2
    assert answer == {**expected, "version": 1, "precision": "fp32"}


def test_a_multipart_form_is_answered_the_same(start: Start) -> None:
    client, image = start(), picture("JPEG")
    body, headers = multipart(('name="note"', b"hello"), ('name="image"; filename="a.jpg"', image))
    assert client.predict(body, **headers) == client.predict(image) == client.predict(image, "?top=3")


def test_a_fitted_threshold_holds_here_too(start: Start, good: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(good, tmp_path / "bundle")
    (bundle / standalone.CONFIDENCE).write_text(json.dumps({"threshold": 1.5}))
    seal(bundle, read_facts(bundle))
    status, answer = start(bundle).predict(picture())
    assert (status, answer["label"]) == (200, standalone.UNKNOWN)
    assert answer["top"][0][0] in Bundle.open(bundle).labels


JPEG = picture("JPEG", size=200)
REFUSED: dict[str, tuple[bytes, str, int, str]] = {
    "empty": (b"", "", 400, "no image"),
    "text": (b"hello", "", 415, "not an image"),
    "truncated": (JPEG[: len(JPEG) // 2], "", 422, "truncated"),
    "head alone": (JPEG[:20], "", 415, "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "", 415, "JPEG, PNG"),
    "too many pixels": (picture(size=101), "", 413, "101x101 pixels, more than 10000"),
    "a bomb": (serving_load._png("1", 20_000), "", 413, "more than 10000 pixels"),
    "half a bomb": (serving_load._png("1", 10_000), "", 413, "pixels"),
    "too many bytes": (bytes(300_001), "", 413, "larger than 300000 bytes"),
    "top of 0": (JPEG, "?top=0", 400, "top must be a whole number from 1"),
    "top of many": (JPEG, "?top=" + "9" * 5000, 400, "top must be"),
    "top in words": (JPEG, "?top=three", 400, "'three'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_with_a_reason(start: Start, case: str) -> None:
    body, query, wanted, reason = REFUSED[case]
    client = start(pixels=40_000 if case in ("truncated", "top of 0") else 10_000, body_bytes=300_000)
    status, answer = client.predict(body, query)
    assert (status, list(answer)) == (wanted, ["error"])
    assert reason in answer["error"]
    assert client.predict(picture())[0] == 200


def test_a_body_of_unknown_length_is_bounded_too(start: Start) -> None:
    client = start(body_bytes=1000)
    chunk = b"3e8\r\n" + bytes(1000) + b"\r\n"
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(head + 3 * chunk + b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "parts",
    [
        [('name="image"', b"no file")],
        [('name="a"; filename="a"', JPEG), ('name="b"; filename="b"', JPEG)],
        [(f'name="{index}"', b"x") for index in range(20)],
    ],
)
def test_a_form_without_exactly_one_file_is_refused(start: Start, parts: list[tuple[str, bytes]]) -> None:
    body, headers = multipart(*parts)
    status, answer = start().predict(body, **headers)
    assert status == 400 and answer["error"]


def test_unknown_paths_and_methods_are_refused(start: Start) -> None:
    client = start()
    assert client.ask("GET", "/other")[:2] == (
        404, {"error": "no such page; there are POST /predict, GET /healthz, GET /metrics and GET /"}
    )  # fmt: skip
    status, answer, headers = client.ask("GET", "/predict")
    assert (status, answer) == (405, {"error": "/predict does not take GET"}) and headers["allow"] == "POST"


def test_the_page_needs_nothing_from_elsewhere(start: Start) -> None:
    status, page, headers = start(token="s3cret").ask("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"(src|href)=[\"']?(?!data:)\w|@import|https?://", page)
    assert 'fetch("predict' in page and 'type="file"' in page and "prefers-color-scheme: dark" in page


def test_health_and_metrics_tell_what_happened(start: Start, good: Path) -> None:
    client = start()
    facts = read_facts(good)
    assert client.ask("GET", "/healthz")[1] == {
        "ok": True, "version": 1, "precision": "fp32", "digest": digest(facts.to_json()), "classes": 3,
        "token": False, "problem": None,
    }  # fmt: skip
    for body in (picture(), picture(), b"text"):
        client.predict(body)
    client.ask("GET", "/a-path-of-the-client's-own")
    text = client.ask("GET", "/metrics")[1]
    assert 'synthkit_requests_total{path="/predict",status="200"} 2.0' in text
    assert 'synthkit_requests_total{path="/predict",status="415"} 1.0' in text
    assert 'synthkit_requests_total{path="other",status="404"} 1.0' in text and "own" not in text
    assert "synthkit_predict_seconds_count 2.0" in text
    stated = digest(facts.to_json())
    assert f'synthkit_bundle_info{{digest="{stated}",precision="fp32",version="1"}} 1.0' in text
    assert "synthkit_waiting 0.0" in text and "synthkit_bundle_problem 0.0" in text
    assert client.service.metrics.answered() == {"200": 4, "415": 1, "404": 1}


@pytest.mark.parametrize(
    "shown", [None, "Bearer wrong", "Bearer", "s3crét", "Basic s3crét", "Bearer s3crét "]
)
def test_a_token_guards_answers_and_metrics(start: Start, shown: str | None) -> None:
    client = start(token="s3crét")
    right = shown == "Bearer s3crét "
    headers = {"Authorization": shown.encode().decode("latin-1")} if shown else {}
    for method, path in (("POST", "/predict"), ("GET", "/metrics")):
        status, answer, told = client.ask(method, path, picture(), headers)
        assert status == (200 if right else 401)
        if not right:
            assert "token" in answer["error"] and told["www-authenticate"] == "Bearer"
    assert client.ask("GET", "/healthz")[1]["token"] is True


def test_more_requests_than_the_queue_takes_are_sent_away(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, real = threading.Event(), serve.classify

    def held(*arguments: Any) -> dict[str, Any]:
        assert hold.wait(30)
        return real(*arguments)

    monkeypatch.setattr(serve, "classify", held)
    client = start(waiting=2, jobs=1)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(client.predict(picture())[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    while client.service._admitted < 2:
        time.sleep(0.01)
    status, answer, headers = client.ask("POST", "/predict", picture())
    assert (status, headers["retry-after"]) == (503, "1") and "2 requests are waiting" in answer["error"]
    assert client.ask("GET", "/healthz")[0] == 200, "work in progress must not block the event loop"
    hold.set()
    for thread in threads:
        thread.join(30)
    assert found == [200, 200] and client.predict(picture())[0] == 200


def test_a_failure_of_the_service_is_500_in_json(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise ValueError("secret of the house")

    monkeypatch.setattr(serve, "classify", broken)
    assert start().predict(picture()) == (500, {"error": "the service failed; its log says why"})


def test_a_client_that_never_finishes_its_body_is_sent_away(start: Start) -> None:
    client = start(seconds=0.4)
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nbegin")
        answer = b"".join(iter(lambda: slow.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.4 s" in answer


def test_only_a_guarded_service_lets_other_machines_in() -> None:
    for host in ("127.0.0.1", "localhost"):
        listen(host, 0, guarded=False).close()
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="give --token, or --no-token"):
            listen(host, 0, guarded=False)
    listen("0.0.0.0", 0, guarded=True).close()


def test_an_address_that_is_not_to_be_had_is_one_line() -> None:
    with listen("127.0.0.1", 0, guarded=False) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: .*another --host or --port"
        ):
            listen("127.0.0.1", port, guarded=False)
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 0, guarded=False)
