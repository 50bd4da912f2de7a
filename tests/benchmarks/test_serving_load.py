"""The load benchmark runs on the real command, and reports what is wrong."""

import threading
from pathlib import Path

import pytest

from benchmarks import serving_load
from tests.serving import picture, serving
from tests.tiny_students import tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("load") / "bundle")


@pytest.mark.slow
def test_load_on_the_real_command(bundle: Path) -> None:
    result = serving_load.load(bundle, requests=200, clients=4)
    assert result["ok"], result
    assert result["good"] == 198 and sum(sum(count.values()) for count in result["bad"].values()) == 2


@pytest.mark.slow
def test_garbage_gets_4xx_and_a_wrong_answer_is_noticed(bundle: Path) -> None:
    with serving(bundle) as client:
        kinds = serving_load.garbage(picture("JPEG", size=200))
        statuses = {name: send(client.port) for name, send in kinds.items()}
        assert statuses.pop("gone in the middle") == serving_load._GONE
        assert len(statuses) > 15 and all(400 <= int(status) < 500 for status in statuses.values()), statuses
        expected = [{"label": "another", "path": "x"}]
        observed, numbers = serving_load.Observed(), iter([0])
        lock = threading.Lock()
        serving_load._Client(client.port, [picture()], expected, {}, numbers, lock, observed, 0).run()
        assert len(observed.wrong) == 1 and "expected {'label': 'another'}" in observed.wrong[0]


@pytest.mark.parametrize(
    ("wrong", "resident", "exit_code", "ok"),
    [
        ([], {1000: 100, 2000: 101}, 0, True),
        (["request 3"], {1000: 100}, 0, False),
        ([], {1000: 100, 2000: 120}, 0, False),
        ([], {1000: 100}, -11, False),
    ],
)
def test_faults_growth_and_a_crash_fail(
    wrong: list[str], resident: dict[int, int], exit_code: int, ok: bool
) -> None:
    observed = serving_load.Observed([0.1], wrong, resident=resident)
    assert serving_load._result(observed, 2000, 4, 1.0, exit_code)["ok"] is ok
