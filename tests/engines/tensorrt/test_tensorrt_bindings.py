"""The TensorRT backend over NVIDIA's real Python bindings, with libraries that compute nothing under them.

Needs a compiler and the bindings: importable as `tensorrt_bindings`, or in folders (unpacked wheels,
separated as in PATH) that the variable SYNTHKIT_TENSORRT_BINDINGS names. The wheel `tensorrt-cu13-bindings`
of the package index is enough; neither NVIDIA's libraries nor a GPU are needed. It shows that names,
arguments and types of all calls are what the real dispatcher takes, for each version that is given.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DATA = ROOT / "tests" / "data"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")
ALIAS = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"


def bindings() -> list[Path]:
    """Folders that hold a package `tensorrt_bindings`."""
    named = os.environ.get("SYNTHKIT_TENSORRT_BINDINGS", "")
    found = [Path(one) for one in named.split(os.pathsep) if one]
    spec = importlib.util.find_spec("tensorrt_bindings")
    if not found and spec and spec.origin:
        found = [Path(spec.origin).parents[1]]
    return found


COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = [
    pytest.mark.skipif(not bindings(), reason="no tensorrt_bindings: set SYNTHKIT_TENSORRT_BINDINGS"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.maxsize < 2**32, reason="the stand-in lies beyond 4 GiB"),
]


def run(wheel: Path, folder: Path, onnx: Path, *flags: str) -> dict[str, Any]:
    """What tests/data/run_over_bindings.py told: step -> last answer."""
    version = (wheel / "tensorrt_bindings" / "__init__.py").read_text()
    major = re.search(r'__version__ = "(\d+)\.', version)[1]  # type: ignore[index]
    libraries = []
    for name in LIBRARIES:
        path = folder / f"lib{name}.so.{major}"
        line = [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{path.name}", *flags, "-o", str(path)]
        subprocess.run([*line, str(DATA / "tensorrt_stand_in.cpp")], check=True)  # type: ignore[list-item]
        libraries.append(str(path))
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(ALIAS)
    paths = os.pathsep.join(map(str, (folder, wheel, ROOT)))
    done = subprocess.run(
        [sys.executable, str(DATA / "run_over_bindings.py"), *libraries, "--", str(onnx), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{paths}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr[-2000:]}"
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(params=bindings() or [Path("none")], ids=lambda wheel: wheel.name)
def wheel(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_every_call_is_one_that_the_bindings_take(wheel: Path, half_engines: Path, tmp_path: Path) -> None:
    told = run(wheel, tmp_path, half_engines / "unet" / "model.onnx")
    assert told["probe"] is None
    assert told["plan"][-2:] == ["VERSION_COMPATIBLE", "REFIT"]
    assert told["build"] > 0 and told["timings"]
    assert told["inputs"] == [{"name": "", "dtype": "float16", "shape": []}]
    assert "infer the shapes of it: not enough is known" in told["one shape missing"]
    assert told["run"] == [] and told["graphs"] == [2]


def test_without_a_driver_it_is_one_line(wheel: Path, half_engines: Path, tmp_path: Path) -> None:
    told = run(wheel, tmp_path, half_engines / "unet" / "model.onnx", "-DNOTHING")
    assert told["probe"].endswith("cannot start: it finds no GPU and driver that it can use")
    assert "could not start the builder for unet: it finds no GPU" in told["build"]
    assert told["load"].endswith("check the NVIDIA driver with `synthkit doctor`")
