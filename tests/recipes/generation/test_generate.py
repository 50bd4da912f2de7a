from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.generation import contents
from synthkit.artifacts import fingerprint, write_bytes
from synthkit.cli import main
from synthkit.diffusion import style_token as style_files
from synthkit.errors import ConfigError, EngineError
from synthkit.recipes.generation.plan import image_seed
from synthkit.recipes.settings import FilterSettings, GenerateSettings
from tests.stages import generate, generate_stage, key

pytest.importorskip("onnxruntime")
CLASSES = {"b": "letter b", "ä x": "letter a"}
SETTINGS = GenerateSettings(per_class=5, steps=3, batch_size=4)


@pytest.fixture(scope="module")
def generated_set(tiny_engines: Path, tiny_style: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "synthetic"
    generate(SETTINGS, tiny_engines, CLASSES, tiny_style, out)
    return out


def test_the_set_is_an_image_folder_with_metadata(generated_set: Path) -> None:
    lines = [
        json.loads(line)
        for line in (generated_set / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(one["class"], one["index"]) for one in lines] == [(c, i) for c in ("b", "ä x") for i in range(5)]
    for line in lines:
        path = generated_set / line["file_name"]
        assert path.name == f"{line['index']:05d}.png" and path.parent.name == line["class"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == line["sha256"]
        assert line["seed"] == image_seed(0, line["class"], line["index"])
        assert line["prompt"] == f"A {CLASSES[line['class']]} photo in the style of <tiny>"
        with Image.open(path) as image:
            assert image.size == (16, 16) and image.mode == "RGB"
        assert (line["token"], line["resample"], line["steps"], line["guidance"]) == ("<tiny>", 0, 3, 2.0)
    assert {"model", "style", "engines", "negative_prompt", "init"} <= lines[0].keys()
    assert len({line["sha256"] for line in lines}) == 10


@pytest.mark.slow
def test_the_batch_size_changes_nothing(
    generated_set: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    settings = GenerateSettings(per_class=5, steps=3, batch_size=3)
    result = generate(settings, tiny_engines, CLASSES, tiny_style, tmp_path / "synthetic")
    assert contents(tmp_path / "synthetic") == contents(generated_set)
    metrics = result.manifest.metrics
    assert metrics["written"] == 10 and metrics["images_per_second"] > 0 and metrics["rejected"] == 0
    assert metrics["per_class"] == {name: {"kept": 5, "resampled": 0, "dropped": {}} for name in CLASSES}


@pytest.mark.slow
def test_a_new_style_or_run_seed_gives_other_images(
    generated_set: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    generate(SETTINGS, tiny_engines, CLASSES, None, tmp_path / "plain")
    seeded = GenerateSettings(per_class=5, steps=3, seed=1)
    generate(seeded, tiny_engines, CLASSES, tiny_style, tmp_path / "seeded")
    one = "b/00000.png"
    assert (
        len(
            {
                (folder / one).read_bytes()
                for folder in (generated_set, tmp_path / "plain", tmp_path / "seeded")
            }
        )
        == 3
    )


def test_a_finished_set_gets_back_what_it_lost(
    generated_set: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    shutil.copytree(generated_set, tmp_path / "set")
    (tmp_path / "set" / "b" / "00003.png").unlink()
    (tmp_path / "set" / "b" / "00001.png").write_bytes(b"not what was generated")
    (tmp_path / "set" / "metadata.jsonl").write_text("edited")
    result = generate(SETTINGS, tiny_engines, CLASSES, tiny_style, tmp_path / "set")
    assert (result.manifest.metrics["written"], result.manifest.metrics["skipped"]) == (2, 8)
    assert contents(tmp_path / "set") == contents(generated_set)


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_more_images_keep_those_that_are_there(
    links: bool,
    generated_set: Path,
    tiny_engines: Path,
    tiny_style: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_links(target: Path, source: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(target))

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    more = replace(SETTINGS, per_class=7)
    generate(more, tiny_engines, CLASSES, tiny_style, tmp_path / "fresh")
    shutil.copytree(generated_set, tmp_path / "set")
    result = generate(more, tiny_engines, CLASSES, tiny_style, tmp_path / "set")
    assert (result.manifest.metrics["written"], result.manifest.metrics["skipped"]) == (4, 10)
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")
    fewer = generate(SETTINGS, tiny_engines, CLASSES, tiny_style, tmp_path / "set")
    assert (fewer.manifest.metrics["written"], fewer.manifest.metrics["skipped"]) == (0, 10)
    assert contents(tmp_path / "set") == contents(generated_set)
    again = generate(SETTINGS, tiny_engines, CLASSES, tiny_style, tmp_path / "set", force=True)
    assert again.manifest.metrics["written"] == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "styled", "kept"),
    [
        ({"steps": 4}, True, 0),
        ({"seed": 1}, True, 0),
        ({"guidance": 1.5}, True, 0),
        ({"negative": "blur"}, True, 0),
        ({"plain_share": 0.5}, True, 8),
        ({"strength": 0.5}, True, 10),
        ({}, False, 0),
    ],
)
def test_images_that_would_differ_are_generated_again(
    changes: dict[str, Any],
    styled: bool,
    kept: int,
    generated_set: Path,
    tiny_engines: Path,
    tiny_style: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(generated_set, tmp_path / "set")
    settings, style = replace(SETTINGS, **changes), tiny_style if styled else None
    result = generate(settings, tiny_engines, CLASSES, style, tmp_path / "set")
    assert result.manifest.metrics["skipped"] == kept
    generate(settings, tiny_engines, CLASSES, style, tmp_path / "fresh")
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_edited_images_and_metadata_are_not_taken_over(
    generated_set: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    more = replace(SETTINGS, per_class=6)
    generate(more, tiny_engines, CLASSES, tiny_style, tmp_path / "fresh")
    for name, kept in (("b/00002.png", 9), ("metadata.jsonl", 0)):
        folder = shutil.copytree(generated_set, tmp_path / name.replace("/", "-"))
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        result = generate(more, tiny_engines, CLASSES, tiny_style, folder)
        assert result.manifest.metrics["skipped"] == kept
        assert contents(folder) == contents(tmp_path / "fresh")


class _Refusing:
    """Stands for fitted filters: refuses images by their content."""

    def __init__(self) -> None:
        self.looked_at: list[int] = []

    def reasons(self, images: Sequence[tuple[Path, str]]) -> list[str | None]:
        self.looked_at.append(len(images))
        return [
            "class" if hashlib.sha256(path.read_bytes()).digest()[0] < 110 else None for path, _ in images
        ]

    def describe(self) -> dict[str, Any]:
        return {"thresholds": {}}

    def near_photos(self, images: Sequence[tuple[Path, str]]) -> int:
        return len(images)


@pytest.mark.slow
def test_what_filters_reject_is_resampled_or_dropped(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = _Refusing()
    monkeypatch.setattr("synthkit.recipes.generation.generate.fit_filters", lambda *_: filters)
    strict = FilterSettings(filter="blank", retries=1)
    results = []
    for name, batch in (("one", 20), ("two", 3)):
        settings = GenerateSettings(per_class=8, steps=2, batch_size=batch)
        results.append(generate(settings, tiny_engines, CLASSES, None, tmp_path / name, filters=strict))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    metrics = results[0].manifest.metrics
    lines = [json.loads(line) for line in (tmp_path / "one" / "metadata.jsonl").read_text().splitlines()]
    resampled = sum(line["resample"] for line in lines)
    assert resampled > 0 and metrics["dropped"] > 0, "the test must see both"
    assert len(lines) == 16 - metrics["dropped"]
    assert metrics["rejected"] == resampled + 2 * metrics["dropped"]
    assert metrics["written"] == 16 + resampled + metrics["dropped"]
    assert sum(one["resampled"] for one in metrics["per_class"].values()) == resampled
    for line in lines:
        assert line["seed"] == image_seed(0, line["class"], line["index"], line["resample"])
        assert hashlib.sha256((tmp_path / "one" / line["file_name"]).read_bytes()).digest()[0] >= 110
    more = GenerateSettings(per_class=11, steps=2)
    larger = generate(more, tiny_engines, CLASSES, None, tmp_path / "two", filters=strict)
    generate(more, tiny_engines, CLASSES, None, tmp_path / "fresh", filters=strict)
    assert contents(tmp_path / "two") == contents(tmp_path / "fresh")
    assert larger.manifest.metrics["skipped"] == len(lines)
    rejected = list((tmp_path / "one" / ".rejected" / "class").glob("*.png"))
    assert len(rejected) == metrics["rejected"] and (tmp_path / "one" / ".rejected" / "class.png").is_file()


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    generated_set: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthkit.recipes.generation import sampler

    written = []

    def write(path: Path, content: bytes) -> None:
        if len(written) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write_bytes(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(sampler, "write_bytes", write)
        code, out, errors = run(
            *["--workspace", tmp_path, "generate", "--classes", "b", "--per-class", "9", "--steps", "3"],
            *["--engines", tiny_engines, "--style", tiny_style, "--batch-size", "4"],
        )
    assert (code, out) == (1, "") and errors.count("\n") == 1
    assert (
        errors.startswith("error: cannot write") and "No space left" in errors and "goes on from it" in errors
    )
    settings = GenerateSettings(per_class=9, steps=3)
    result = generate(settings, tiny_engines, {"b": "b"}, tiny_style, tmp_path / "synthetic")
    assert (result.manifest.metrics["written"], result.manifest.metrics["skipped"]) == (3, 6)


def test_what_decides_the_images(tiny_engines: Path, tiny_style: Path, tmp_path: Path) -> None:
    stage = generate_stage(SETTINGS, tiny_engines, CLASSES, tiny_style, tmp_path)
    token = style_files.load(tiny_style)
    digest = hashlib.sha256(token.token.encode() + b"\0" + token.vectors.tobytes()).hexdigest()
    assert stage.key().inputs == {"engines": fingerprint(tiny_engines), "style": digest}
    assert stage.key().resolved == {"classes": {name: [words] for name, words in CLASSES.items()}}
    same = replace(SETTINGS, batch_size=3, ray="local", ray_workers=2)
    assert key(generate_stage(same, tiny_engines, CLASSES, tiny_style, tmp_path)) == key(stage)
    off = FilterSettings(retries=7)  # no filter is on
    assert key(replace(stage, filters=off)) == key(stage)
    assert key(replace(stage, filters=replace(off, filter="blank"))) != key(stage)


CHILD = """
import sys
from pathlib import Path
from synthkit.artifacts import run_stage
from synthkit.recipes.generation.generate import Generate
from synthkit.recipes.settings import GenerateSettings
engines, style, out = map(Path, sys.argv[1:])
run_stage(Generate(GenerateSettings(60, 10, batch_size=2), engines, ("a", "b"), out, style=style))
"""


@pytest.mark.slow
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
    generated_set: Path, tiny_engines: Path, tiny_style: Path
) -> None:
    assert generate(SETTINGS, tiny_engines, CLASSES, tiny_style, generated_set).skipped
    usual = key(generate_stage(SETTINGS, tiny_engines, CLASSES, tiny_style, generated_set))
    other = GenerateSettings(per_class=5, steps=4)
    assert key(generate_stage(other, tiny_engines, CLASSES, tiny_style, generated_set)) != usual
    assert key(generate_stage(SETTINGS, tiny_engines, {"b": "b"}, tiny_style, generated_set)) != usual
    assert key(generate_stage(SETTINGS, tiny_engines, CLASSES, None, generated_set)) != usual


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
        Image.new("RGB", (8, 8), (200, len(name), 0)).save(tmp_path / "real" / name / "a.png")
    (tmp_path / "real" / "classes.toml").write_text('"7" = "digit seven"\n')
    flags = ["--real-dir", tmp_path / "real", "--engines", tiny_engines, "--dry-run", "--json"]
    code, out, _ = run("--workspace", tmp_path / "w", "generate", *flags)
    assert code == 0
    assert json.loads(out)["state"] == "absent"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --real-dir DIR or --classes"),
        (["--classes", "a", "--real-dir", "x"], "either --real-dir DIR or --classes"),
        (["--classes", "a"], "no engines folder"),
        (["--classes", "a", "--style", "absent.safetensors", "--engines", "."], "no style token"),
        (["--classes", "a", "--style", "pyproject.toml", "--engines", "."], "not a safetensors file"),
        (
            ["--classes", "a", "--engines", ".", "--set", "generate.strength=1.5"],
            "strength = 1.5: must lie between 0 and 1",
        ),
        (["--classes", "a", "--engines", ".", "--per-class", "0"], "per_class = 0: must be at least 1"),
        (["--classes", "a", "--engines", ".", "--steps", "5:2"], "steps = '5:2': must be a whole number"),
        (["--classes", "a", "--engines", ".", "--set", "generate.template=x"], "does not name the class"),
        (["--classes", "a", "--engines", ".", "--set", "generate.init=real"], "folder with --real-dir"),
    ],
)
def test_bad_calls_are_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    code, out, errors = run("--workspace", tmp_path / "w", "generate", *flags)
    assert code == 1 and out == "" and errors.startswith("error: ") and message in errors
    assert errors.count("\n") == 1
