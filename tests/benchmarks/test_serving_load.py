"""The load benchmark runs on the real command, knows garbage from images, and finds what is wrong."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import serving_load
from synthkit import standalone
from tests.serving import Client, picture, serving

JPEG = picture("JPEG", size=200)


@pytest.fixture
def client(good: Path) -> Iterator[Client]:
    with serving(good) as one:
        yield one


def test_every_kind_of_garbage_gets_4xx_and_does_no_harm(client: Client) -> None:
    kinds = serving_load.garbage(JPEG)
    statuses = {name: send(client.port) for name, send in kinds.items()}
    assert statuses.pop("gone in the middle") == serving_load._GONE
    assert len(statuses) > 15 and all(400 <= int(status) < 500 for status in statuses.values()), statuses
    assert client.predict(picture())[0] == 200


def test_load_on_the_real_command(good: Path) -> None:
    found = serving_load.load(good, requests=200, clients=4)
    assert found["ok"], found
    assert found["good"] == 198 and sum(sum(one.values()) for one in found["bad"].values()) == 2


@pytest.mark.parametrize(
    ("wrong", "resident", "exit_code"),
    [(["request 3"], {1000: 100}, 0), ([], {1000: 100, 2000: 120}, 0), ([], {1000: 100}, -11)],
)
def test_load_finds_fault(wrong: list[str], resident: dict[int, int], exit_code: int) -> None:
    seen = serving_load.Seen([0.1], wrong, resident=resident)
    assert not serving_load._verdict(seen, 2000, 4, 1.0, exit_code)["ok"]
    fine = serving_load.Seen([0.1], [], resident={1000: 100, 2000: 101})
    assert serving_load._verdict(fine, 2000, 4, 1.0, 0)["ok"]


def test_load_notices_a_wrong_answer(client: Client) -> None:
    expected = [{"label": "another", "path": "x"}]
    seen = serving_load.Seen()
    numbers = iter([0])
    one = serving_load._Client(client.port, [picture()], expected, {}, numbers, threading.Lock(), seen, 0)
    one.run()
    assert len(seen.wrong) == 1 and "expected {'label': 'another'}" in seen.wrong[0]


def test_sample_images_differ_and_decode(tmp_path: Path) -> None:
    paths = serving_load.sample_images(tmp_path, count=12)
    shapes = {np.asarray(standalone.open_image(path)).shape for path in paths}
    assert len(shapes) == 12 and {path.suffix for path in paths} == {".jpeg", ".png", ".webp", ".bmp"}
