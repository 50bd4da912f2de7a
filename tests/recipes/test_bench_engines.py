from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from synthkit.engines.pipeline import EnginePipeline
from synthkit.errors import ConfigError, EngineError, ParityError
from synthkit.recipes.bench_engines import as_text, bench_engines

pytest.importorskip("optimum.onnxruntime")


def test_every_contender_draws_the_same_and_is_timed(tiny_engines: Path) -> None:
    result = bench_engines(tiny_engines, batch=3, steps=2, guidance=2.0, runs=2)
    assert json.loads(json.dumps(result)) == result
    assert [row["name"] for row in result["rows"]] == ["diffusers, eager", "Optimum", "synthkit"]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and row["images_per_second"] > 0
        assert 0 < row["unet_step_ms"] * 2 / 1000 < max(row["seconds"])
        assert 0 < row["share_outside_unet"] < 1 and row["max_difference"] <= result["tolerance"]
    assert result["rows"][-1]["speedup"] == 1 and result["rows"][0]["max_difference"] == 0
    table = as_text(result).splitlines()
    assert table[0].startswith("3 images at once, 2 steps, guidance 2") and table[-1].startswith("synthkit")


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
