"""Nothing phones home: no entry point lets a library collect or look anything up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("timm")

from PIL import Image

from tests.tiny_students import tiny_bundle

# Counts the names that the process looks up, also from native threads: getaddrinfo is libc's.
LOOKUPS = """
import socket, sys
def refused(*args, **kwargs):
    print("LOOKUP", args, file=sys.stderr)
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = refused
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telemetry")
    Image.new("RGB", (40, 40), (200, 30, 30)).save(folder / "photo.png")
    return tiny_bundle(folder / "bundle")


def run(tmp_path: Path, *command: str | Path) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run with an empty home and cache, and without the variables that a tester may have set."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LOOKUPS)
    home = tmp_path / "home"
    home.mkdir()
    # Some libraries are quiet where CI is set.
    quiet = ("TELEMETRY", "USAGE_STATS", "DO_NOT_TRACK", "XDG_", "HF_", "CI")
    environment = {name: value for name, value in os.environ.items() if not any(one in name for one in quiet)}
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    environment |= {"HOME": str(home), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, check=False
    )
    return done, [str(one.relative_to(home)) for one in home.rglob("*") if one.is_file()]


def test_synthkit_predict_leaves_the_home_empty(bundle: Path, tmp_path: Path) -> None:
    command = ["-m", "synthkit", "predict", "--bundle", bundle, bundle.parent / "photo.png"]
    done, files = run(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert (files, "LOOKUP" in done.stderr) == ([], False), done.stderr


def test_the_bundle_s_own_predictor_leaves_the_home_empty(bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "copied"  # synthkit, which sets the same, is not what is tested here
    shutil.copytree(bundle, own)
    done, files = run(tmp_path, own / "predict.py", bundle.parent / "photo.png")
    assert done.returncode == 0, done.stderr
    assert (files, "LOOKUP" in done.stderr) == ([], False), done.stderr


def test_every_library_is_told_before_it_is_imported(tmp_path: Path) -> None:
    names = "ORT_DISABLE_TELEMETRY HF_HUB_DISABLE_TELEMETRY RAY_USAGE_STATS_ENABLED".split()
    code = f"import os, synthkit; print([os.environ[name] for name in {names}])"
    done, _ = run(tmp_path, "-c", code)
    assert done.stdout == "['1', '1', '0']\n", done.stderr
