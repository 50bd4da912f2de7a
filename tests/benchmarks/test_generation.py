"""`generate` at volume: killed runs are compared with a whole one, sessions timed, memory read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from benchmarks.generation import Trial, contents, kills, memory

GENERATING = """
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


class _Generating(Trial):
    """Stands for a generating process: forty files, each with the same content whatever the batch size."""

    def content(self) -> str:
        return "x"

    def start(self, out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", GENERATING, str(out), self.content()]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class _Dependent(_Generating):
    """Its images depend on the batch size."""

    def content(self) -> str:
        return str(self.batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "same"), [(_Generating, True), (_Dependent, False)])
def test_sets_of_killed_runs_are_compared_with_a_whole_one(
    kind: type[Trial], same: bool, tmp_path: Path
) -> None:
    found = kills(kind(tmp_path, None, ("a",), per_class=40, steps=1, batch_size=6), tmp_path, 3)
    assert found["kills"] >= 1 and found["batch_sizes"] == [6, 4]
    assert found["identical"] is same and bool(found["different"]) is not same
    assert found["whole"] == {"written": 40} and len(contents(tmp_path / "killed")) == 40


@pytest.mark.slow
def test_a_trial_generates_and_times_the_set(tiny_engines: Path, tiny_style: Path, tmp_path: Path) -> None:
    found = Trial(tiny_engines, tiny_style, ("a", "b"), 6, 4, 5).here(tmp_path / "set")
    assert found["written"] == 12 and len(contents(tmp_path / "set")) == 13
    assert 0 < found["share_inside_sessions"] <= 1


@pytest.mark.slow
def test_memory_is_read_as_images_add_up(tmp_path: Path) -> None:
    trial = _Generating(tmp_path, None, ("a",), 40, 1, 1)
    found = memory(trial, tmp_path / "memory", marks=(5, 20, 10_000))
    assert found["written"] == 40 and list(found["rss_mib"]) == [5, 20] and found["rss_mib"][5] > 1
