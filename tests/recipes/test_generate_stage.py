from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from synthkit.artifacts import read_manifest
from synthkit.cli import main
from synthkit.errors import ConfigError, EngineError
from synthkit.recipes.generate import generate, generate_request, image_seed
from synthkit.recipes.settings import GenerateSettings

pytest.importorskip("onnxruntime")
CLASSES = {"b": "letter b", "ä x": "letter a"}
SETTINGS = GenerateSettings(per_class=5, steps=3, batch_size=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture(scope="module")
def drawn(tiny_engines: Path, tiny_style: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "synthetic"
    generate(SETTINGS, tiny_engines, CLASSES, tiny_style, out)
    return out


def test_the_set_is_an_image_folder_with_metadata(drawn: Path) -> None:
    lines = [json.loads(line) for line in (drawn / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["class"], one["index"]) for one in lines] == [(c, i) for c in ("b", "ä x") for i in range(5)]
    for line in lines:
        path = drawn / line["file_name"]
        assert path.name == f"{line['index']:05d}.png" and path.parent.name == line["class"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == line["sha256"]
        assert line["seed"] == image_seed(0, line["class"], line["index"])
        assert line["prompt"] == f"A {CLASSES[line['class']]} photo in the style of <tiny>"
        with Image.open(path) as image:
            assert image.size == (16, 16) and image.mode == "RGB"
    assert {"guidance", "steps", "model", "style"} <= lines[0].keys()
    assert len({line["sha256"] for line in lines}) == 10


def test_the_batch_size_changes_nothing(
    drawn: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    settings = GenerateSettings(per_class=5, steps=3, batch_size=3)
    result = generate(settings, tiny_engines, CLASSES, tiny_style, tmp_path / "synthetic")
    assert contents(tmp_path / "synthetic") == contents(drawn)
    assert result.manifest.metrics["written"] == 10 and result.manifest.metrics["images_per_second"] > 0


def test_a_new_style_or_run_seed_draws_others(
    drawn: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    generate(SETTINGS, tiny_engines, CLASSES, None, tmp_path / "plain")
    seeded = GenerateSettings(per_class=5, steps=3, seed=1)
    generate(seeded, tiny_engines, CLASSES, tiny_style, tmp_path / "seeded")
    one = "b/00000.png"
    assert (
        len({(folder / one).read_bytes() for folder in (drawn, tmp_path / "plain", tmp_path / "seeded")}) == 3
    )


def test_a_seed_is_its_own() -> None:
    assert image_seed(0, "7", 3) == 221968626312874
    names = [(seed, name, index) for seed in range(3) for name in ("1", "11") for index in range(30)]
    assert len({image_seed(*name) for name in names}) == len(names)


CHILD = """
import sys
from pathlib import Path
from synthkit.recipes.generate import generate
from synthkit.recipes.settings import GenerateSettings
engines, style, out = map(Path, sys.argv[1:])
generate(GenerateSettings(per_class=60, steps=10, batch_size=2), engines, {"a": "a", "b": "b"}, style, out)
"""


def test_a_killed_run_goes_on_where_it_was(tiny_engines: Path, tiny_style: Path, tmp_path: Path) -> None:
    out = tmp_path / "synthetic"
    partial = tmp_path / ".synthetic.partial"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tiny_engines), str(tiny_style), str(out)])
    deadline = time.monotonic() + 120
    while len(list(partial.glob("*/*.png"))) < 10:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = {path.name: path.stat().st_mtime_ns for path in (partial / "a").glob("[0-9]*.png")}
    (partial / "a" / f".00059.png.{os.getpid()}.tmp").write_bytes(b"torn")
    assert not out.exists() and 10 <= len(before) < 60

    settings, classes = GenerateSettings(per_class=60, steps=10, batch_size=50), {"a": "a", "b": "b"}
    result = generate(settings, tiny_engines, classes, tiny_style, out)
    assert result.manifest.metrics["skipped"] == len(before)
    assert {name: (out / "a" / name).stat().st_mtime_ns for name in before} == before
    generate(settings, tiny_engines, classes, tiny_style, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_an_unchanged_set_is_skipped_and_changes_show(
    drawn: Path, tiny_engines: Path, tiny_style: Path
) -> None:
    assert generate(SETTINGS, tiny_engines, CLASSES, tiny_style, drawn).skipped
    key = read_manifest(drawn).key  # type: ignore[union-attr]
    other = GenerateSettings(per_class=5, steps=4)
    assert generate_request(other, tiny_engines, CLASSES, tiny_style, drawn).key != key
    assert generate_request(SETTINGS, tiny_engines, {"b": "b"}, tiny_style, drawn).key != key
    assert generate_request(SETTINGS, tiny_engines, CLASSES, None, drawn).key != key


def test_names_and_folders_that_cannot_be_used(tiny_engines: Path, tmp_path: Path) -> None:
    for classes in ({"a/b": "a"}, {".hidden": "a"}, {}):
        with pytest.raises(ConfigError):
            generate(SETTINGS, tiny_engines, classes, None, tmp_path / "synthetic")
    with pytest.raises(EngineError, match="no engines folder"):
        generate(SETTINGS, tmp_path / "absent", CLASSES, None, tmp_path / "synthetic")


def run(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_commands_end_to_end(
    tiny_model: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "w"
    shutil.copytree(tiny_engines, workspace / "engines")
    code, out, _ = run("--workspace", workspace, "build-engines", "--model", tiny_model, "--json")
    engines = json.loads(out)["engines"]
    assert code == 0 and [one["cached"] for one in engines] == [True] * 4
    flags = ["--classes", "a,b", "--style", tiny_style, "--per-class", "2", "--steps", "2"]
    generate_words = ["--workspace", workspace, "generate", *flags]
    code, out, _ = run(*generate_words, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["state"] == "absent" and not (workspace / "synthetic").exists()
    code, out, _ = run(*generate_words, "--json")
    answer = json.loads(out)
    assert code == 0 and (answer["written"], answer["skipped"], answer["rejected"]) == (4, 0, 0)
    assert answer["images_per_second"] > 0
    code, out, _ = run(*generate_words, "--json")
    assert code == 0 and (json.loads(out)["written"], json.loads(out)["skipped"]) == (0, 4)


def test_classes_come_from_the_photos_and_their_words_file(tiny_engines: Path, tmp_path: Path) -> None:
    for name in ("red_fox", "7"):
        (tmp_path / "real" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "real" / name / "a.png")
    (tmp_path / "real" / "classes.toml").write_text('"7" = "digit seven"\n')
    flags = ["--real-dir", tmp_path / "real", "--engines", tiny_engines, "--dry-run", "--json"]
    code, out, _ = run("--workspace", tmp_path / "w", "generate", *flags)
    assert code == 0
    assert json.loads(out)["config"]["classes"] == {"7": "digit seven", "red_fox": "red fox"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --real-dir DIR or --classes"),
        (["--classes", "a", "--real-dir", "x"], "either --real-dir DIR or --classes"),
        (["--classes", "a"], "no engines folder"),
        (["--classes", "a", "--style", "absent.safetensors", "--engines", "."], "no style token"),
    ],
)
def test_bad_calls_are_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    code, out, errors = run("--workspace", tmp_path / "w", "generate", *flags)
    assert code == 1 and out == "" and errors.startswith("error: ") and message in errors
    assert errors.count("\n") == 1
