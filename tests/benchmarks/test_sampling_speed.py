from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from benchmarks.sampling_speed import _Clock, _Contender, as_text, bench_engines
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.errors import ConfigError, EngineError, ParityError

pytest.importorskip("optimum.onnxruntime")


def test_every_contender_draws_the_same_and_is_timed(tiny_engines: Path) -> None:
    result = bench_engines(tiny_engines, batch=3, steps=2, guidance=2.0, runs=2)
    assert json.loads(json.dumps(result)) == result
    assert [row["name"] for row in result["rows"]] == ["diffusers, eager", "Optimum", "synthkit"]
    *_, synthkit = result["rows"]
    for row in result["rows"]:
        whole = median(row["seconds"])
        assert len(row["seconds"]) == 2 and row["images_per_second"] == pytest.approx(3 / whole, rel=0.05)
        assert row["speedup"] == pytest.approx(whole / median(synthkit["seconds"]), rel=0.05)
        assert 0 < row["unet_step_ms"] * 2 / 1000 < max(row["seconds"])
        assert 0 < row["share_outside_unet"] < 1 and row["max_difference"] <= result["tolerance"]
    assert synthkit["speedup"] == 1 and result["rows"][0]["max_difference"] == 0
    table = as_text(result).splitlines()
    assert table[0].startswith("3 images at once, 2 steps, guidance 2") and table[-1].startswith("synthkit")


def test_synthkit_is_as_many_times_faster_as_the_other_takes_longer() -> None:
    clock = _Clock(None, False)
    slow = _Contender("slow", lambda: np.empty(0), clock, 1, [3.0, 9.0, 4.0], [1.0, 8.0, 3.0])
    ours = _Contender("synthkit", lambda: np.empty(0), clock, 2, [2.0, 2.5, 1.0], [1.5, 1.5, 0.5])
    expected = {
        "name": "slow",
        "images_per_second": 16.0,
        "unet_step_ms": 150.0,
        "share_outside_unet": 0.25,
        "speedup": 2.0,
        "seconds": [3.0, 9.0, 4.0],
        "max_difference": 0.5,
    }
    assert slow.row(ours, 64, 20, 0.5) == expected
    row = ours.row(ours, 64, 20, 0.0)
    assert (row["speedup"], row["images_per_second"], row["unet_step_ms"]) == (1.0, 32.0, 75.0)


def test_the_unet_s_time_is_the_mean_of_the_cores_that_draw() -> None:
    clock = _Clock(None, False)

    def draw() -> np.ndarray:
        clock.seconds += 0.5
        return np.empty(0)

    contender = _Contender("synthkit", draw, clock, at_once=2)
    contender.time()
    contender.time()
    assert contender.unet_seconds == [0.25, 0.25] and len(contender.seconds) == 2


def test_a_contender_that_draws_otherwise_is_refused(
    tiny_engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = EnginePipeline.draw

    def inverted(*given: object) -> np.ndarray:
        return 255 - draw(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(EnginePipeline, "draw", inverted)
    with pytest.raises(
        ParityError, match=r"synthkit draws other images than diffusers: they differ by .*--force"
    ):
        bench_engines(tiny_engines, batch=1, steps=1, guidance=1.0, runs=1)


def test_numbers_and_folders_that_cannot_be_used(tiny_engines: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch = 0, steps = 1 and runs = 1 must all be 1 or more"):
        bench_engines(tiny_engines, batch=0, steps=1, guidance=1.0, runs=1)
    with pytest.raises(EngineError, match="no engines folder"):
        bench_engines(tmp_path / "absent", batch=1, steps=1, guidance=1.0, runs=1)
