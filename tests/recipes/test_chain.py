"""`synthkit adapt`: the whole chain from a few photos to a bundle, and nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from PIL import Image

from synthkit import artifacts, standalone
from synthkit.cli import main
from synthkit.config import Given
from synthkit.engines.bundle.format import Bundle
from synthkit.learning.students import load_student, new_student
from synthkit.recipes.chain import ChainSettings, Workspace
from synthkit.recipes.settings import SECTIONS, EngineSettings
from tests.tiny_models import tiny_sdxl
from tests.tiny_students import colour_folders

pytestmark = pytest.mark.slow

COLOURS = ("blue", "green", "red")
STAGES = ["build-engines", "learn-style", "generate", "train", "adapt", "export"]
QUICK = ["--per-class", "4", "--student", "test_resnet"] + [
    word
    for setting in (
        "learn-style.steps=3 learn-style.init_word=the learn-style.batch_size=4 generate.steps=2 "
        "train.epochs=1 train.real_steps=4 train.batch_size=6 adapt.adapt_steps=4"
    ).split()
    for word in ("--set", setting)
]


@dataclass(frozen=True)
class Site:
    """A workspace with photos and a test set beside it."""

    root: Path

    @property
    def workspace(self) -> Path:
        return self.root / "w"

    def call(self, *words: str | Path, photos: bool = True) -> Result:
        folders = ["--real-dir", self.root / "few_shots"] if photos else []
        arguments = ["--workspace", self.workspace, words[0], *folders, *words[1:]]
        return CliRunner().invoke(main, [str(one) for one in arguments])

    def adapt(self, *words: str | Path) -> dict[str, Any]:
        result = self.call("adapt", *QUICK, *words, "--json")
        assert result.exit_code == 0, result.stderr
        return dict(json.loads(result.stdout))

    def files(self) -> dict[str, int]:
        """Path -> time of the last change of everything that the workspace holds."""
        return {
            str(path.relative_to(self.workspace)): path.stat().st_mtime_ns
            for path in self.workspace.rglob("*")
            if path.is_file()
        }


@pytest.fixture(scope="module")
def first(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, dict[str, Any]]:
    """A site where the chain has run, and what it answered."""
    site = Site(tmp_path_factory.mktemp("site"))
    colour_folders(site.root / "few_shots", COLOURS, each=2, seed=1)
    colour_folders(site.root / "test", COLOURS, each=3, seed=2)
    return site, site.adapt("--model", tiny_model, "--test-dir", site.root / "test")


@pytest.fixture
def site(first: tuple[Site, Any], tmp_path: Path) -> Site:
    """A copy that a test may change."""
    shutil.copytree(first[0].root, tmp_path / "site")
    return Site(tmp_path / "site")


def done(answer: dict[str, Any]) -> list[str]:
    return [name for name, state in answer["stages"].items() if state == "done"]


def test_the_chain_ends_in_a_bundle_that_predicts(first: tuple[Site, dict[str, Any]]) -> None:
    site, answer = first
    assert done(answer) == list(answer["stages"]) == STAGES
    assert answer["n_test"] == 9 and 0 <= answer["top1"] <= 1 and set(answer["per_class"]) == set(COLOURS)
    assert answer["seconds"] > 0 and answer["strategy"] and answer["reason"]
    result = site.call("predict", site.root / "test" / "red" / "0.png", "--json", photos=False)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["predictions"][0]["label"] in COLOURS
    evaluated = site.call("evaluate", "--test-dir", site.root / "test", "--json", photos=False)
    assert json.loads(evaluated.stdout)["top1"] == answer["top1"]
    assert Bundle.open(site.workspace / "bundle").labels == COLOURS
    assert len(list((site.workspace / "synthetic").glob("*/*.png"))) == 12


def test_the_photos_are_no_test_set(first: tuple[Site, Any]) -> None:
    site, _ = first
    evaluated = site.call("evaluate", "--test-dir", site.root / "few_shots", photos=False)
    assert evaluated.exit_code == 1 and "shares 6 image(s)" in evaluated.stderr


def test_a_second_run_does_no_work_and_says_so(site: Site) -> None:
    """It also remembers the model, which is not named again."""
    before = site.files()
    answer = site.adapt("--test-dir", site.root / "test")
    assert answer["stages"] == dict.fromkeys(STAGES, "skipped") and answer["seconds"] == 0
    assert answer["n_test"] == 9
    assert site.files() == before
    told = site.call("adapt", *QUICK).stdout
    assert "nothing has changed" in told and told.count("skipped") == 6


def test_a_run_in_which_nothing_changed_decodes_no_image_and_reads_no_file_twice(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in site.root.rglob("*"):  # as after a while; a manifest is younger than what it lists
        if path.is_file():
            os.utime(path, (2000, 2000) if path.name == "manifest.json" else (1000, 1000))
    decoded: list[Path] = []
    read: list[Path] = []
    decode, sha256 = standalone.open_image, artifacts._read_sha256
    monkeypatch.setattr(standalone, "open_image", lambda path: decoded.append(path) or decode(path))
    monkeypatch.setattr(artifacts, "_read_sha256", lambda path: read.append(path) or sha256(path))
    artifacts._sha256.cache_clear()
    answer = site.adapt()
    assert answer["stages"] == dict.fromkeys(STAGES, "skipped")
    assert decoded == []
    assert len(read) == len(set(read)), "the model is an input of two stages, and is hashed once"
    assert not any(path.is_relative_to(site.workspace.resolve()) for path in read), "by size and age alone"
    assert {".safetensors", ".png"} <= {path.suffix for path in read}
    (site.root / "few_shots" / "red" / "2.png").write_bytes(b"no image")
    result = site.call("adapt", *QUICK)
    assert result.exit_code == 1 and "2.png (not an image)" in result.stderr and decoded


def test_an_unchanged_stage_is_skipped_on_its_own_too(site: Site) -> None:
    before = site.files()
    commands: list[list[str | Path]] = [
        ["learn-style", "--steps", "3"],
        ["generate", "--per-class", "4", "--steps", "2"],
        ["train", "--epochs", "1", "--student", "test_resnet"],
    ]
    more = "learn-style.init_word=the learn-style.batch_size=4 train.real_steps=4 train.batch_size=6".split()
    for words in commands:
        result = site.call(*words, *(word for setting in more for word in ("--set", setting)), "--json")
        assert result.exit_code == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer.get("written", 0) == 0 and answer["skipped"], words[0]
    assert site.files() == before


def test_a_dry_run_plans_and_does_nothing(site: Site, tiny_model: Path, tmp_path: Path) -> None:
    before = site.files()
    plan = site.adapt("--dry-run")["plan"]
    assert plan == dict.fromkeys(STAGES, "unchanged")
    plan = site.adapt("--dry-run", "--set", "train.epochs=2")["plan"]
    assert plan["generate"] == "unchanged" and plan["train"] == "changed: train.epochs"
    assert plan["adapt"] == plan["export"] == "follows"
    plan = site.adapt("--dry-run", "--force")["plan"]
    assert plan == dict.fromkeys(STAGES[:4], "unchanged") | {"adapt": "forced", "export": "follows"}
    assert site.files() == before
    shutil.rmtree(site.workspace)
    plan = site.adapt("--dry-run", "--model", tiny_model)["plan"]
    assert plan == {"build-engines": "absent", **dict.fromkeys(STAGES[1:], "follows")}
    assert not site.workspace.exists()


def test_another_photo_redoes_what_depends_on_it(site: Site) -> None:
    for path in (site.root / "few_shots" / "red").iterdir():  # three steps do not look at every photo
        with Image.open(path) as image:
            image.rotate(90).save(path)
    assert done(site.adapt()) == STAGES[1:]


def test_a_renamed_photo_redoes_nothing(site: Site) -> None:
    path = site.root / "few_shots" / "red" / "0.png"
    path.rename(path.with_name("first of all.png"))
    assert done(site.adapt()) == []


def test_a_setting_redoes_its_stage_and_what_follows(site: Site) -> None:
    assert done(site.adapt("--set", "adapt.adapt_steps=3")) == STAGES[4:]


def test_adapt_and_generate_filter_alike(site: Site) -> None:
    filters = ["--set", "filter.filter=blank,leak", "--test-dir", site.root / "test"]
    assert done(site.adapt(*filters)) == ["generate"]  # nothing was rejected, so the student stays
    manifest = json.loads((site.workspace / "synthetic" / "manifest.json").read_text("utf-8"))
    assert manifest["settings"]["filter"]["filter"] == "blank,leak"
    again = site.call("generate", "--per-class", "4", "--steps", "2", *filters, "--json")
    assert json.loads(again.stdout)["written"] == 0
    assert site.adapt("--dry-run")["plan"]["generate"].startswith("changed")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "filter.filter=leak"], "give them with --test-dir"),
        (
            ["--set", "filter.filter=class", "--set", "filter.classifier=w/student"],
            "is made by this very run",
        ),
        (["--set", "generate.template=a {words:photo}"], "cannot be read"),
        (["--set", "train.real_share=2"], "real_share = 2.0: must lie between 0 and 1"),
        (["--weights", "nowhere"], "no weights nowhere"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_any_work(
    site: Site, tiny_model: Path, words: list[str], message: str
) -> None:
    shutil.rmtree(site.workspace)
    (site.root / "w" / "student").mkdir(parents=True)
    given = [one.replace("=w/", f"={site.root}/w/") for one in words]
    for more in ([], ["--dry-run"]):
        refused = site.call("adapt", *QUICK, "--model", tiny_model, *given, *more)
        assert refused.exit_code == 1 and message in refused.stderr, refused.stderr
    assert sorted(path.name for path in site.workspace.iterdir()) == [".lock", "student"]


def test_sdxl_is_refused_before_its_engines_are_built(site: Site, tmp_path: Path) -> None:
    shutil.rmtree(site.workspace)
    refused = site.call("adapt", *QUICK, "--model", tiny_sdxl(tmp_path / "xl"))
    assert refused.exit_code == 1 and "is SDXL" in refused.stderr
    assert not (site.workspace / "engines").exists()


def test_photos_of_another_site_do_not_replace_the_bundle_unasked(site: Site) -> None:
    before = (site.workspace / "bundle" / "bundle.json").read_bytes()
    (site.root / "few_shots" / "red").rename(site.root / "few_shots" / "rust")
    for more in ([], ["--dry-run"]):
        text = refusal(site, ["adapt", *QUICK, *more])
        assert "bundle knows blue, green, red, and these photos show blue, green, rust" in text
    assert (site.workspace / "bundle" / "bundle.json").read_bytes() == before
    site.adapt("--force")
    assert Bundle.open(site.workspace / "bundle").labels == ("blue", "green", "rust")
    assert (site.workspace / "bundle.previous" / "bundle.json").read_bytes() == before


def test_a_second_run_keeps_what_export_made(site: Site) -> None:
    exported = site.call("export", "--precision", "fp32,fp16", "--target", "jetpack6")
    assert exported.exit_code == 0, exported.stderr
    assert done(site.adapt()) == []
    assert done(site.adapt("--force")) == STAGES[4:]
    bundle = site.workspace / "bundle"
    assert (bundle / "model.fp16.onnx").is_file() and (bundle / "target" / "jetpack6").is_dir()
    assert done(site.adapt("--set", "export.precision=fp32")) == ["export"]
    assert not (bundle / "model.fp16.onnx").exists() and (bundle / "target" / "jetpack6").is_dir()


def test_force_adapts_and_exports_again(site: Site) -> None:
    assert done(site.adapt("--force")) == STAGES[4:]


@pytest.mark.parametrize("stage", ["synthetic", "bundle"])
def test_a_damaged_folder_is_made_again(site: Site, stage: str) -> None:
    kept = {path.name: path.read_bytes() for path in (site.workspace / stage).rglob("*.png")}
    next(iter((site.workspace / stage).rglob("*.png" if kept else "model.onnx"))).unlink()
    assert done(site.adapt()) == [{"synthetic": "generate", "bundle": "export"}[stage]]


def test_without_synthetic_images_the_photos_alone_count(site: Site, tmp_path: Path) -> None:
    shutil.rmtree(site.workspace)
    weights = tmp_path / "weights"
    new_student("test_resnet", ("x", "y"), image_size=32).save(weights)
    answer = site.adapt("--no-synth", "--weights", weights, "--strategy", "last-1")
    assert done(answer) == STAGES[4:] and answer["strategy"] == "last-1"
    assert not (site.workspace / "engines").exists()
    assert site.adapt("--no-synth", "--weights", weights, "--strategy", "last-1")["seconds"] == 0
    words = ["--no-synth", "--weights", weights, "--strategy", "last-2", "--dry-run"]
    plan = site.adapt(*words)["plan"]
    assert plan == {"adapt": "changed: adapt.strategy", "export": "follows"}


def test_a_trained_student_replaces_the_stages_before_adapt(site: Site) -> None:
    student = site.root / "own student"
    shutil.move(site.workspace / "student", student)
    shutil.rmtree(site.workspace)
    answer = site.adapt("--student", student, "--strategy", "unchanged")
    assert done(answer) == STAGES[4:]
    adapted, given = load_student(site.workspace / "adapted"), load_student(student / "synthetic")
    assert adapted.head.weight.equal(given.head.weight)


def engines(site: Site, **given: Any) -> EngineSettings:
    return ChainSettings.from_given(Given({"build-engines": given}), Workspace(site.workspace)).engines


def test_the_workspace_remembers_its_engines(
    first: tuple[Site, Any], tiny_model: Path, tmp_path: Path
) -> None:
    site, _ = first
    assert engines(site).model == str(tiny_model.resolve())
    assert engines(site, model="glyphs-32") == EngineSettings(), (
        "asked for by name, even if it is the default"
    )
    assert engines(site, model="other/one") == EngineSettings(model="other/one")
    shutil.copytree(site.workspace / "engines", tmp_path / "w" / "engines")
    manifest = json.loads((tmp_path / "w" / "engines" / "manifest.json").read_text("utf-8"))
    manifest["settings"]["build-engines"] |= {"batch": "1:8:8", "precision": "fp32", "size": 16}
    (tmp_path / "w" / "engines" / "manifest.json").write_text(json.dumps(manifest))
    made = engines(Site(tmp_path))
    assert (made.batch, made.precision, made.size) == ("1:8:8", "fp32", 16)
    usual = EngineSettings().batch
    assert engines(Site(tmp_path), batch=usual).batch == usual, "given, so it wins, even as the default"
    changed = engines(site, precision="fp16")
    assert (changed.model, changed.precision) == (str(tiny_model.resolve()), "fp16")
    assert engines(Site(tmp_path / "elsewhere")) == EngineSettings()


def refusal(site: Site, words: Sequence[str | Path]) -> str:
    result = site.call(*words)
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_the_settings_of_a_manifest_can_be_fed_back(site: Site) -> None:
    """As they were recorded, and into another workspace."""
    recorded = {
        name: json.loads((site.workspace / folder / "manifest.json").read_text("utf-8"))["settings"]
        for name, folder in zip(STAGES, "engines style synthetic student adapted bundle".split(), strict=True)
    }
    everything = {section: values for one in recorded.values() for section, values in one.items()}
    assert list(everything) == list(SECTIONS)
    recipe = site.root / "recipe.json"
    recipe.write_text(json.dumps({"settings": everything}))
    result = site.call("adapt", "--config", recipe, "--json")
    assert done(json.loads(result.stdout)) == [], result.stderr
    trained = site.workspace / "student" / "manifest.json"
    result = site.call("train", "--config", trained, "--json")
    assert json.loads(result.stdout)["skipped"], result.stderr


def test_a_recipe_file_serves_the_whole_chain(site: Site, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[learn-style]\nsteps = 3\ninit_word = "the"\nbatch_size = 4\n[generate]\nper_class = 4\nsteps = 2\n'
        '[train]\nstudent = "test_resnet"\nepochs = 1\nreal_steps = 4\nbatch_size = 6\n'
        "[adapt]\nadapt_steps = 4\n"
    )
    result = site.call("adapt", "--config", recipe, "--json")
    assert done(json.loads(result.stdout)) == [], result.stderr
    recipe.write_text(recipe.read_text("utf-8") + '[export]\nprecision = "fp32,fp16"\n')
    result = site.call("adapt", "--config", recipe, "--json")
    assert done(json.loads(result.stdout)) == ["export"], result.stderr
    assert (site.workspace / "bundle" / "model.fp16.onnx").is_file()
    recipe.write_text("[learn_style]\nsteps = 3\n[train]\nepoch = 2\n")
    text = refusal(site, ["adapt", "--config", recipe])
    assert "unknown section [learn_style]; did you mean learn-style" in text
    assert "[train] unknown key 'epoch'; did you mean epochs" in text
