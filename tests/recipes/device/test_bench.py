"""The benchmark times what it says, in turn, and its figures follow from the times."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from synthkit.engines.bundle.format import Bundle, read_facts
from synthkit.errors import BundleError, EngineError, MissingExtra
from synthkit.recipes.device import bench as bench_bundle
from synthkit.recipes.device.bench import Plan, as_text, time_in_turn
from tests.small_bundles import three_precisions
from tests.tiny_students import lively_student

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_precisions(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Callable[[], None]]:
    """Makes functions that take a stated time on a clock that only they move; they write down their calls."""
    now = 0.0
    calls: list[str] = []
    monkeypatch.setattr(bench_bundle.time, "perf_counter", lambda: now)

    def taking(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += seconds
            calls.append(name)

        return run

    taking.calls = calls  # type: ignore[attr-defined]
    return taking


def test_times_belong_to_their_function_and_take_turns(clock: Any) -> None:
    first = {"ours": clock("ours", 3.0), "bare": clock("bare", 2.0)}
    second = {"ours": clock("torch", 7.0)}
    found = time_in_turn([first, second], runs=25, warmup=4)
    assert [{name: set(taken) for name, taken in one.items()} for one in found] == [
        {"ours": {3.0}, "bare": {2.0}},
        {"ours": {7.0}},
    ]
    assert [len(taken) for one in found for taken in one.values()] == [25, 25, 25]
    warmup, timed = clock.calls[:12], clock.calls[12:]
    assert sorted(warmup) == ["bare"] * 4 + ["ours"] * 4 + ["torch"] * 4
    blocks = "".join(name[0] for name in timed).replace("ob", "bo").split("t")
    lengths = [len(block) for block in blocks if block]
    assert lengths == [2 * (10 + 2), 2 * (10 + 2), 2 * (5 + 2)], (
        "one model never runs long without the others"
    )
    pairs = [tuple(timed[place : place + 2]) for place in range(0, 24, 2)]
    assert set(pairs) == {("ours", "bare"), ("bare", "ours")}, "neither always follows the other"


def test_figures_follow_from_the_times() -> None:
    bare = np.linspace(0.001, 0.002, 101)
    ours = bare + 0.0002
    ours[60:] += 0.01  # another program had the processor
    row = bench_bundle._row({"ours": ours, "bare": bare}, Plan("x", batch=4, percentiles=(99.9,)))
    assert row["latency_ms"] == pytest.approx(
        {"p50": 1.7, "p90": 12.1, "p99": 12.19, "p99.9": 12.199, "mean": 1e3 * ours.mean()}
    )
    assert row["bare_latency_ms"]["p50"] == pytest.approx(1.5)
    assert row["images_per_second"] == pytest.approx(4 / ours.mean())
    assert row["overhead_ms"] == pytest.approx(0.2)
    assert row["overhead_percent"] == pytest.approx(100 * 0.2 / 1.1)


@pytest.fixture(scope="module")
def measured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    student = tmp_path_factory.mktemp("student")
    lively_student().save(student)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_bundle, "_COLD_STARTS", 1)
        return bench_bundle.bench_bundle(Plan(str(bundle), str(student), batch=2, runs=12, warmup=2))


def test_every_precision_and_the_torch_student_are_measured(bundle: Path, measured: dict[str, Any]) -> None:
    *ours, torch = measured["rows"]
    precisions = read_facts(bundle).precisions
    assert [row["precision"] for row in ours] == list(precisions) == ["fp32", "fp16", "int8"]
    assert (torch["runtime"], torch["precision"]) == ("torch", "fp32")
    for row in (*ours, torch):
        latency = row["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert row["images_per_second"] == pytest.approx(2 / (latency["mean"] / 1000))
    assert len({row["file_bytes"] for row in ours}) == 3
    for row in ours:
        assert row["runtime"] == "onnxruntime" and row["threads"] == 1
        assert row["bare_latency_ms"]["p50"] > 0 and np.isfinite(row["overhead_percent"])
        assert row["file_bytes"] == (bundle / precisions[row["precision"]]["file"]).stat().st_size
        assert 20 * 2**20 < row["resident_bytes"] < 4 * 2**30 and 0.05 < row["cold_start_seconds"] < 600


def test_the_default_stands_at_the_top(measured: dict[str, Any]) -> None:
    default = measured["rows"][0]
    assert {key: measured[key] for key in default} == default
    assert (measured["batch"], measured["provider"], measured["runs"]) == (2, "cpu", 12)


def test_the_table_shows_every_row(measured: dict[str, Any]) -> None:
    lines = as_text(measured).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["fp32", "fp16", "int8", "torch"]
    assert f"{measured['rows'][0]['latency_ms']['p50']:.3f}" in lines[1]
    assert lines[-1] == "12 calls of 2 image(s) each, cpu"


def test_what_is_timed_is_the_bundle_and_the_session_below_it(bundle: Path) -> None:
    images = np.random.default_rng(3).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    contenders = bench_bundle._bundle_and_bare(bundle, "fp32", images)
    expected = Bundle.open(bundle).logits(images)
    assert np.allclose(contenders["ours"](), expected, atol=1e-5)
    assert np.array_equal(contenders["ours"](), contenders["bare"]()[0])


def test_cold_start_is_counted_from_the_start_of_the_process(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(0.5, 30), (0.9, 50), (0.7, 40)])

    def answer(function: str, *arguments: str) -> dict[str, Any]:
        assert function == "first_answer" and arguments[:3] == (str(bundle), "fp32", "1")
        assert Path(arguments[3]).is_file()
        seconds, resident = next(answers)
        return {"answered_at": time.monotonic() + seconds, "resident_bytes": resident}

    monkeypatch.setattr(bench_bundle, "_answer", answer)
    found = bench_bundle._cold_start(bundle, "fp32", 1)
    assert found["cold_start_seconds"] == pytest.approx(0.7, abs=0.05) and found["resident_bytes"] == 40


def test_a_bundle_that_cannot_be_used_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench_bundle, "ask", lambda *arguments, **options: pytest.fail("a process was started")
    )
    with pytest.raises(BundleError, match="no bundle"):
        bench_bundle.bench_bundle(Plan(str(tmp_path / "absent")))


def test_a_measuring_process_that_fails_is_one_line(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"measuring failed: .*absent") as caught:
        bench_bundle._answer("time_models", json.dumps({"bundle": str(tmp_path / "absent")}), "1")
    assert "\n" not in str(caught.value)


def test_openvino_computes_the_same_file(bundle: Path) -> None:
    pytest.importorskip("openvino")
    images = np.random.default_rng(3).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = bench_bundle._openvino(bundle, "fp32", images, 1)["ours"]()
    assert np.allclose(found, Bundle.open(bundle).logits(images), atol=1e-3)


def test_openvino_gets_the_file_and_the_threads(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Core:
        def compile_model(self, *arguments: Any) -> Any:
            asked.extend(arguments)
            infer = lambda feeds: {"logits": feeds["image"].shape}  # noqa: E731
            return SimpleNamespace(create_infer_request=lambda: SimpleNamespace(infer=infer))

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    images = np.zeros((2, 32, 32, 3), np.uint8)
    assert bench_bundle._openvino(bundle, "fp32", images, 3)["ours"]() == images.shape
    path, device, hints = asked
    assert (path, device) == (bundle / "model.onnx", "CPU")
    assert hints["INFERENCE_NUM_THREADS"] == 3 and hints["INFERENCE_PRECISION_HINT"] == "f32"


def test_openvino_is_named_where_it_is_missing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_bundle.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_bundle, "_answer", lambda *arguments: pytest.fail("nothing may run"))
    with pytest.raises(MissingExtra, match=r"synthkit-edge\[bench\]"):
        bench_bundle.bench_bundle(Plan(str(bundle), openvino=True))
