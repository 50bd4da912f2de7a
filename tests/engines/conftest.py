"""What the tests of engines share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def half_engines(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX engines of `tiny_model` in half precision; tests that change files copy the folder first."""
    from synthkit.recipes.settings import EngineSettings
    from tests.stages import build_engines

    out = tmp_path_factory.mktemp("engines") / "tiny-half"
    settings = EngineSettings(model=str(tiny_model), backend="onnxruntime", precision="fp16", opset=17)
    return build_engines(settings, out).out
