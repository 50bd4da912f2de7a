from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthkit.errors import ConfigError, ModelError
from synthkit.models import generator
from synthkit.models.generator import (
    known_prompt_names,
    model_fingerprint,
    prompt_names,
    resolve_model,
)


def whole_folder(folder: Path) -> Path:
    for name in ("tokenizer", "scheduler", "text_encoder", "unet", "vae"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    for name in ("text_encoder", "unet", "vae"):
        (folder / name / "model.safetensors").write_bytes(b"weights")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model")
    assert resolve_model(str(folder)) == folder


def test_a_bundled_name_comes_before_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = whole_folder(tmp_path / "bundled" / "glyphs-32")
    monkeypatch.setattr(generator, "_HERE", tmp_path / "bundled")
    whole_folder(tmp_path / "here" / "glyphs-32")
    monkeypatch.chdir(tmp_path / "here")
    assert resolve_model("./glyphs-32") == Path("glyphs-32")
    assert resolve_model("glyphs-32") == bundled
    with pytest.raises(ModelError, match=r"no generator 'glyph-32'; did you mean glyphs-32\?; give"):
        resolve_model("glyph-32")


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model")
    (folder / "unet" / "model.safetensors").rename(folder / "unet" / "model.bin")
    (folder / "scheduler" / "config.json").unlink()
    (folder / "scheduler").rmdir()
    with pytest.raises(ModelError, match=r"lacks scheduler/, unet/\*\.safetensors; .*pickled"):
        resolve_model(str(folder))
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"holds no model_index\.json"):
        resolve_model(str(folder))


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "model")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": [], "text_encoder_2": []}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"StableDiffusion3Pipeline; supported are .*SDXL"):
        resolve_model(str(folder))


def test_offline_the_error_tells_how_to_use_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot fetch 'org/model' .*--model DIR") as caught:
        resolve_model("org/model")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"'org/model' is not on this machine yet"):
        resolve_model("org/model", download=False)


def test_only_the_files_that_are_needed_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder, asked = whole_folder(tmp_path / "model"), {}

    def snapshot_download(hub_id: str, **options: object) -> str:
        asked.update(options, hub_id=hub_id)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/model") == folder
    assert asked["hub_id"] == "org/model" and asked["local_files_only"] is False
    assert {"model_index.json", "unet/*.safetensors", "tokenizer/*.txt"} <= set(asked["allow_patterns"])
    assert all(one.endswith((".json", ".txt", ".safetensors", ".toml")) for one in asked["allow_patterns"])


def test_the_fingerprint_follows_the_weights_alone(tmp_path: Path) -> None:
    first, second = whole_folder(tmp_path / "a"), whole_folder(tmp_path / "elsewhere" / "b")
    (second / "notes.md").write_text("not read")
    assert model_fingerprint(first) == model_fingerprint(second)
    (second / "vae" / "model.safetensors").write_bytes(b"Weights")
    assert model_fingerprint(first) != model_fingerprint(second)


def test_words_of_an_unlimited_model(tmp_path: Path) -> None:
    words = prompt_names(tmp_path, ["red_fox", "b-2", "c"], {"c": "a cat"})
    assert words == {"red_fox": "red fox", "b-2": "b 2", "c": "a cat"}


def test_words_of_a_model_that_knows_its_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.toml").write_text('"7" = "digit seven"\n"A" = "capital letter A"\n')
    own = {"7": "7", "seven": "Digit seven"}
    assert prompt_names(tmp_path, ["7", "seven", "capital_letter_A"], own) == {
        "7": "digit seven",
        "seven": "Digit seven",
        "capital_letter_A": "capital letter A",
    }
    with pytest.raises(ModelError, match=r"does not know 'cat', 'dog'; .*--model HUB_ID_OR_DIR.*--no-synth"):
        prompt_names(tmp_path, ["7", "cat", "dog"], {"dog": "a dog"})


def test_a_broken_classes_file_is_named(tmp_path: Path) -> None:
    assert known_prompt_names(tmp_path) is None
    (tmp_path / "classes.toml").write_text('"7" = 7\n')
    with pytest.raises(ConfigError, match="7 = 7 must be words"):
        known_prompt_names(tmp_path)


def test_what_exists_on_disk_never_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "single.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"is a single file, not a diffusers folder; .*from_single_file"):
        resolve_model("models/single.safetensors")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"give --model {snapshot}"):
        resolve_model(str(tmp_path / "models--org--name"))
