"""Sampling speed beside diffusers and Optimum: images are compared, figures follow from times."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.sampling_speed import Row, _Clock, _Contender, main, measure
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.errors import ParityError

pytest.importorskip("optimum.onnxruntime")


@pytest.mark.slow
def test_every_pipeline_samples_the_same_and_is_timed(tiny_engines: Path, tmp_path: Path) -> None:
    words = "--batch 3 --steps 2 --runs 2 --out".split()
    called = CliRunner().invoke(main, [str(tiny_engines), *words, str(tmp_path / "speed.json")])
    assert called.exit_code == 0, called.output
    assert "3 images at once, 2 steps, guidance 2" in called.stdout
    result = json.loads((tmp_path / "speed.json").read_text("utf-8"))
    assert [row["name"] for row in result["rows"]] == ["diffusers, eager", "Optimum", "synthkit"]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and 0 < row["share_outside_unet"] < 1
        assert row["max_difference"] <= result["tolerance"]


def test_speedup_and_step_time_follow_from_the_medians() -> None:
    clock = _Clock(None, False)
    slow = _Contender("slow", lambda: np.empty(0), clock, 1, [3.0, 9.0, 4.0], [1.0, 8.0, 3.0])
    ours = _Contender("synthkit", lambda: np.empty(0), clock, 2, [2.0, 2.5, 1.0], [1.5, 1.5, 0.5])
    assert slow.row(ours, 64, 20, 0.5) == Row("slow", 16.0, 150.0, 0.25, 2.0, (3.0, 9.0, 4.0), 0.5)
    row = ours.row(ours, 64, 20, 0.0)
    assert (row.speedup, row.images_per_second, row.unet_step_ms) == (1.0, 32.0, 75.0)


@pytest.mark.slow
def test_other_images_are_refused(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = EnginePipeline.generate

    def inverted(*given: object) -> np.ndarray:
        return 255 - generate(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(EnginePipeline, "generate", inverted)
    with pytest.raises(ParityError, match=r"synthkit samples other images than diffusers: they differ by"):
        measure(tiny_engines, batch=1, steps=1, guidance=1.0, runs=1)
