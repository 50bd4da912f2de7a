"""`learn-style` as a stage: clusters, the control, previews, exports, resumption, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import torch

from synthkit.artifacts import StageResult, read_manifest
from synthkit.calibration import textual_inversion as inversion
from synthkit.cli import main
from synthkit.data.images import ImageSet
from synthkit.diffusion import parts as diffusion
from synthkit.diffusion import style_token as style
from synthkit.errors import ConfigError, ModelError
from synthkit.recipes.learn_style import LearnStyle, cluster_token
from synthkit.recipes.settings import StyleSettings
from tests.stages import given, key, learn_style
from tests.tiny_models import IMAGE, WIDTH, tiny_sdxl

SETTINGS = StyleSettings(init_word="the", steps=3, batch_size=2, checkpoint_every=2)
WORDS = {"a": "letter a", "b": "letter b"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Two classes; three dark photos, then two light ones of each."""
    root = tmp_path_factory.mktemp("photos") / "few_shots"
    random = np.random.default_rng(0)
    for name in WORDS:
        (root / name).mkdir(parents=True)
        for index in range(5):
            pixels = random.integers(0, 60, (IMAGE, IMAGE, 3)) + (190 if index > 2 else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return ImageSet.scan(root)


def learn(tiny_model: Path, photos: ImageSet, out: Path, **changes: Any) -> StageResult:
    return learn_style(replace(SETTINGS, **changes), str(tiny_model), photos, out)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_one_token_by_default_and_nothing_else(tiny_model: Path, photos: ImageSet, tmp_path: Path) -> None:
    from safetensors import safe_open

    done = learn(tiny_model, photos, tmp_path / "style")
    assert files(done.out).keys() == {"learned_embeds.safetensors", "losses.json"}
    with safe_open(done.out / "learned_embeds.safetensors", "np") as file:
        assert set(file.metadata()) == {"format", "base_model", "base_weights"}, "no shares"
    losses = json.loads((done.out / "losses.json").read_text(encoding="utf-8"))["<site-style>"]
    metrics = done.manifest.metrics
    assert len(losses["training"]) == 3 and losses["held_out"] == {}
    assert metrics["loss_first"] == losses["training"][0] and metrics["loss_last"] == losses["training"][-1]
    assert metrics["not_from_the_paper"] == {
        "lr": 0.02, "schedule": "constant", "batch_size": 2, "init_word": "the", "steps": 3
    }  # fmt: skip


def test_photos_that_look_alike_share_a_token(
    tiny_model: Path, photos: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    real = diffusion.encode_images
    monkeypatch.setattr(
        diffusion, "encode_images", lambda vae, images: encoded.append(len(images)) or real(vae, images)
    )
    done = learn(tiny_model, photos, tmp_path / "style", clusters=2, a1111=True)
    assert encoded == [10], "the latents are computed once"
    dark, light = style.load_all(done.out / "learned_embeds.safetensors")
    assert (dark.token, light.token) == ("<site-style>", "<site-style-2>")
    assert style.shares(done.out / "learned_embeds.safetensors") == pytest.approx((0.6, 0.4))
    assert not np.allclose(dark.vectors, light.vectors, atol=0.01)
    members = json.loads((done.out / "clusters.json").read_text(encoding="utf-8"))
    assert sorted(Path(path).name for path in members["<site-style-2>"]) == ["3.png"] * 2 + ["4.png"] * 2
    assert [one["photos"] for one in done.manifest.metrics["tokens"]] == [6, 4]
    assert style.load(done.out / "a1111" / "site-style-2.safetensors").token == "<site-style-2>"
    with Image.open(done.out / "clusters.png") as sheet:
        assert sheet.height == 2 * (IMAGE + 2)


def test_a_cluster_learns_from_its_own_photos_alone(
    tiny_model: Path, photos: ImageSet, tmp_path: Path
) -> None:
    both = learn(tiny_model, photos, tmp_path / "both", clusters=2)
    light = photos.subset(i for i, one in enumerate(photos.items) if one.path.stem in "34")
    alone = learn(tiny_model, light, tmp_path / "alone", token="<site-style-2>")
    second = style.load_all(both.out / "learned_embeds.safetensors")[1]
    assert np.array_equal(second.vectors, style.load(alone.out / "learned_embeds.safetensors").vectors)


@pytest.mark.slow
def test_a_run_killed_in_its_second_cluster_does_not_redo_the_first(
    tiny_model: Path, photos: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"clusters": 2, "preview_every": 3}
    whole = learn(tiny_model, photos, tmp_path / "whole", **changes)
    real, left, made = inversion._gradient_step, iter(range(5)), []

    def step(*arguments: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        made.append(arguments[-1])
        real(*arguments)

    monkeypatch.setattr(inversion, "_gradient_step", step)
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_model, photos, tmp_path / "style", **changes)
    assert not (tmp_path / "style").exists() and made == [0, 1, 2, 0, 1]
    left = iter(range(1))
    done = learn(tiny_model, photos, tmp_path / "style", **changes)
    assert made[5:] == [2] and files(done.out) == files(whole.out)


def test_the_control_is_one_flag(tiny_model: Path, photos: ImageSet, tmp_path: Path) -> None:
    learned = learn(tiny_model, photos, tmp_path / "style", vectors=2)
    done = learn(tiny_model, photos, tmp_path / "control", vectors=2, control=True)
    token, other = (style.load(one.out / "learned_embeds.safetensors") for one in (done, learned))
    assert token.token == other.token and token.vectors.shape == (2, WIDTH)
    metrics = done.manifest.metrics
    assert done.manifest.settings["learn-style"]["control"] is True and metrics["loss_first"] is None
    assert metrics["tokens"][0]["steps"] == 0 and metrics["tokens"][0]["photos"] == 10
    several = learn(tiny_model, photos, tmp_path / "several", control=True, clusters=2)
    one, two = style.load_all(several.out / "learned_embeds.safetensors")
    assert not np.allclose(one.vectors, two.vectors)


@pytest.mark.slow
def test_previews_show_one_image_of_each_word_over_the_steps(
    tiny_model: Path, photos: ImageSet, tmp_path: Path
) -> None:
    done = learn(tiny_model, photos, tmp_path / "style", steps=4, preview_every=2, lr=5.0)
    names = sorted(path.name for path in (done.out / "previews" / "site-style").iterdir())
    assert names == ["00000.png", "00002.png", "00004.png"]
    sheets = [np.asarray(Image.open(done.out / "previews" / "site-style" / name)) for name in names]
    assert all(sheet.shape[0] == IMAGE + 2 and sheet.shape[1] > 2 * IMAGE for sheet in sheets)
    pictures = [sheet[:IMAGE, -2 * IMAGE - 2 :] for sheet in sheets]
    assert len({one.tobytes() for one in pictures}) == 3, "the style moves from look to look"
    plain = learn(tiny_model, photos, tmp_path / "plain", steps=4, lr=5.0)
    token = "learned_embeds.safetensors"
    assert (plain.out / token).read_bytes() == (done.out / token).read_bytes(), "looking changes nothing"


def test_what_decides_the_style_and_what_does_not(tiny_model: Path, photos: ImageSet) -> None:
    def of(**changes: Any) -> str:
        return key(LearnStyle(replace(SETTINGS, **changes), str(tiny_model), photos, Path("style")))

    assert of(device="auto") == of(device="cpu")
    assert len({of(), of(seed=1), of(early_stop=1), of(early_stop=1, checkpoint_every=7)}) == 4


@pytest.mark.slow
def test_early_stop_writes_the_held_out_losses(tiny_model: Path, photos: ImageSet, tmp_path: Path) -> None:
    done = learn(tiny_model, photos, tmp_path / "style", early_stop=3, steps=4)
    losses = json.loads((done.out / "losses.json").read_text(encoding="utf-8"))["<site-style>"]
    assert list(losses["held_out"]) == ["0", "2", "4"]
    assert done.manifest.metrics["tokens"][0]["loss_held_out"] == min(losses["held_out"].values())


def test_names_of_clusters() -> None:
    assert [cluster_token("<s>", number) for number in range(3)] == ["<s>", "<s-2>", "<s-3>"]
    assert cluster_token("style", 1) == "style-2"


def test_a_gpu_that_is_not_there_is_refused(
    tiny_model: Path, photos: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device = cuda, but torch finds no GPU"):
        learn(tiny_model, photos, tmp_path / "style", device="cuda")


def test_sdxl_is_refused_with_what_to_do(photos: ImageSet, tmp_path: Path) -> None:
    model = tiny_sdxl(tmp_path / "xl")
    with pytest.raises(ModelError, match=r"is SDXL, .* learn a style with a Stable Diffusion 1.x or 2.x"):
        learn(model, photos, tmp_path / "style")
    assert not (tmp_path / "style").exists()


def test_noise_prediction_models_learn_too(
    tiny_epsilon_model: Path, photos: ImageSet, tmp_path: Path
) -> None:
    done = learn(tiny_epsilon_model, photos, tmp_path / "style", preview_every=3)
    assert np.isfinite(done.manifest.metrics["loss_last"])
    assert (done.out / "previews" / "site-style" / "00003.png").is_file()


@pytest.fixture
def workspace(tmp_path: Path, tiny_engines: Path) -> Iterator[Path]:
    shutil.copytree(tiny_engines, tmp_path / "w" / "engines")
    yield tmp_path / "w"


def call(workspace: Path, photos: ImageSet, *words: str) -> tuple[int, str, str]:
    usual = ["--steps", "2", "--real-dir", str(photos.root)]
    usual += given("learn-style.init_word=the", "learn-style.batch_size=2")
    arguments = ["--quiet", "--workspace", str(workspace), "learn-style", *usual, *words]
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clusters", "11"], "11 clusters were asked for, but there are 10 photos that differ"),
        (["--clusters", "0"], "clusters = 0: must be at least 1"),
        (["--set", "learn-style.early_stop=-1"], "early_stop = -1: must be at least 0"),
        (["--set", "learn-style.accumulate=0"], "accumulate = 0: must be at least 1"),
    ],
)
def test_bad_settings_are_one_line(workspace: Path, photos: ImageSet, words: list[str], message: str) -> None:
    code, out, text = call(workspace, photos, *words)
    assert (code, out) == (1, "") and text.count("\n") == 1 and message in text


def test_the_command_tells_of_each_token(workspace: Path, photos: ImageSet) -> None:
    code, out, text = call(workspace, photos, "--clusters", "2")
    assert code == 0, text
    first, second = out.splitlines()
    assert first.startswith("<site-style> in ") and ": 6 photos, loss " in first and "in 2 steps" in first
    assert second.startswith("<site-style-2> in ") and ": 4 photos" in second
    code, out, _ = call(workspace, photos, "--clusters", "2", "--json")
    answer = json.loads(out)
    assert answer["skipped"] and [one["token"] for one in answer["tokens"]] == [
        "<site-style>",
        "<site-style-2>",
    ]
    code, out, _ = call(workspace, photos, "--set", "learn-style.control=true")
    assert code == 0 and "10 photos, untrained" in out
    manifest = read_manifest(workspace / "style")
    assert manifest is not None and manifest.settings["learn-style"]["control"] is True
