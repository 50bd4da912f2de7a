"""What the tests of engines share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def half_engines(tiny_model: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The ONNX engines of `tiny_model` in half precision; tests that change files copy the folder first."""
    from synthkit.recipes.settings import EngineSettings
    from tests.stages import build_engines

    settings = EngineSettings(model=str(tiny_model), backend="onnxruntime", precision="fp16", opset=17)
    return made_once("half-engines", lambda folder: build_engines(settings, folder))
