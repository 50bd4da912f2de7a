"""A style token goes with the engines of the model that it was learned for, and with no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from synthkit.artifacts import read_manifest
from synthkit.diffusion import style_token as style_files
from synthkit.engines.diffusion.engines_folder import check_same_model
from synthkit.errors import ModelError
from synthkit.models.generator import base_weights_fingerprint
from synthkit.recipes.settings import GenerateSettings
from tests.stages import generate_stage
from tests.tiny_models import tiny_pipeline

pytest.importorskip("safetensors")


def token_of(style: Path, out: Path, weights: str | None) -> Path:
    style_files.save_all([style_files.load(style)], out, "other-model", base_weights=weights)
    return out


def test_the_manifest_and_the_token_say_which_weights(
    tiny_model: Path, tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    own = base_weights_fingerprint(tiny_model)
    manifest = read_manifest(tiny_engines)
    assert manifest and manifest.metrics["weights"] == own
    path = token_of(tiny_style, tmp_path / "token.safetensors", own)
    assert style_files.base_of(path) == ("other-model", own)
    check_same_model(path, tiny_engines)


def test_a_token_of_another_model_of_the_same_width_is_refused(
    tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    other = base_weights_fingerprint(tiny_pipeline(tmp_path / "other", seed=1))
    path = token_of(tiny_style, tmp_path / "token.safetensors", other)
    with pytest.raises(ModelError, match=r"learned for 'other-model', the engines .*'tiny-v' with other we"):
        generate_stage(GenerateSettings(), tiny_engines, {"a": "a"}, path, tmp_path / "out").key()


def test_what_does_not_tell_its_model_is_let_through(
    tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    assert style_files.base_of(tiny_style) == ("tiny", "")
    check_same_model(tiny_style, tiny_engines)
    path = token_of(tiny_style, tmp_path / "token.safetensors", "0" * 64)
    shutil.copytree(tiny_engines, tmp_path / "engines")
    manifest = tmp_path / "engines" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["metrics"]["weights"]  # of an engines folder of an earlier version
    manifest.write_text(json.dumps(content))
    check_same_model(path, tmp_path / "engines")
    manifest.unlink()  # of Optimum
    check_same_model(path, tmp_path / "engines")


def test_only_weights_that_give_a_token_its_meaning_count(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    own = base_weights_fingerprint(tiny_model)
    for name in ("scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"):
        (model / name).write_bytes((model / name).read_bytes() + b" ")
        assert base_weights_fingerprint(model) == own, name
    for name in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        before = base_weights_fingerprint(model)
        (model / name).write_bytes((model / name).read_bytes() + b" ")
        assert base_weights_fingerprint(model) != before, name
