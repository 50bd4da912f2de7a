from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from benchmarks.generation import Trial, contents, kills, memory, session_clock
from synthkit.engines.diffusion.pipeline import EnginePipeline

DRAWING = """
import json, pathlib, sys, time
out, content = pathlib.Path(sys.argv[1]), sys.argv[2].encode()
partial = out.with_name(f".{out.name}.partial")
if not out.exists():
    (partial / "a").mkdir(parents=True, exist_ok=True)
    for number in range(40):
        path = partial / "a" / f"{number:05d}.png"
        if not path.exists():
            path.write_bytes(content)
            time.sleep(0.05)
    partial.rename(out)
print(json.dumps({"written": 40}))
"""


class _Drawing(Trial):
    """Stands for a drawing process: forty files, each with the same content whatever the batch size."""

    def content(self) -> str:
        return "x"

    def start(self, out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRAWING, str(out), self.content()]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class _Dependent(_Drawing):
    """Its images depend on the batch size."""

    def content(self) -> str:
        return str(self.batch_size)


@pytest.mark.parametrize(("kind", "same"), [(_Drawing, True), (_Dependent, False)])
def test_sets_of_killed_runs_are_compared_with_a_whole_one(
    kind: type[Trial], same: bool, tmp_path: Path
) -> None:
    found = kills(kind(tmp_path, None, ("a",), per_class=40, steps=1, batch_size=6), tmp_path, 3)
    assert found["kills"] >= 1 and found["batch_sizes"] == [6, 4]
    assert found["identical"] is same and bool(found["different"]) is not same
    assert found["whole"] == {"written": 40} and len(contents(tmp_path / "killed")) == 40


def test_a_trial_draws_and_times_the_set(tiny_engines: Path, tiny_style: Path, tmp_path: Path) -> None:
    found = Trial(tiny_engines, tiny_style, ("a", "b"), 6, 4, 5).here(tmp_path / "set")
    assert found["written"] == 12 and len(contents(tmp_path / "set")) == 13
    assert 0 < found["share_inside_sessions"] <= 1


GROWING = """
import pathlib, sys, time
folder, kept = pathlib.Path(sys.argv[1], "a"), []
folder.mkdir(parents=True)
for number in range(30):
    kept.append(b"x" * (4 * 2**20 * (number < 20)))
    (folder / f"{number:05d}.png").touch()
    time.sleep([0.02, 1][number in (4, 19)])
print('{"written": 30}')
"""


class _Growing(Trial):
    """Stands for a drawing process: 4 MiB more with each of its first 20 images, and a rest at 5 and 20."""

    def start(self, out: Path) -> subprocess.Popen[str]:
        partial = str(out.with_name(f".{out.name}.partial"))
        return subprocess.Popen([sys.executable, "-c", GROWING, partial], stdout=subprocess.PIPE, text=True)


def test_memory_is_read_as_images_add_up(tmp_path: Path) -> None:
    found = memory(_Growing(tmp_path, None, ("a",), 30, 1, 1), tmp_path / "memory", marks=(5, 20, 10_000))
    assert found["written"] == 30 and list(found["rss_mib"]) == [5, 20]
    assert 55 < found["rss_mib"][20] - found["rss_mib"][5] < 65


def test_the_clock_counts_unet_and_vae_alone(tiny_engines: Path) -> None:
    pipeline = EnginePipeline.open(tiny_engines, "cpu")
    with session_clock() as clock:
        texts = pipeline.embed(["a", "b"])
        assert clock() == 0
        started = time.perf_counter()
        pipeline.draw(texts, [1, 2], 5, 2.0)
        assert 0 < clock() <= time.perf_counter() - started
    counted = clock()
    pipeline.draw(texts, [1, 2], 5, 2.0)
    assert clock() == counted
