from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthkit.engines.runtime.component_spec import BatchRange, component_specs, parse_batch, read_geometry
from synthkit.errors import ConfigError, ModelError

CONFIGS = {  # the fields of Stable Diffusion 1.5's own config files that matter
    "text_encoder": {"hidden_size": 768, "max_position_embeddings": 77, "vocab_size": 49408},
    "unet": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 768,
        "block_out_channels": [320, 640, 1280, 1280],
    },
    "vae": {"block_out_channels": [128, 256, 512, 512]},
}


def pipeline_folder(folder: Path, **changes: dict[str, object]) -> Path:
    for name, config in CONFIGS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({**config, **changes.get(name, {})}))
    return folder


def test_the_geometry_of_stable_diffusion(tmp_path: Path) -> None:
    geometry = read_geometry(pipeline_folder(tmp_path))
    assert (geometry.image, geometry.latent, geometry.size_multiple) == (512, 64, 64)
    assert (geometry.scaling, geometry.shift) == (0.18215, 0.0)
    assert read_geometry(tmp_path, size=256).latent == 32


def test_every_component_has_its_tensors(tmp_path: Path) -> None:
    specs = {spec.component: spec for spec in component_specs(read_geometry(pipeline_folder(tmp_path)))}
    assert list(specs) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    unet = specs["unet"]
    assert unet.path == "unet/model.onnx"
    assert [one.shape for one in unet.inputs] == [("batch", 4, 64, 64), (), ("batch", 77, 768)]
    assert specs["vae_decoder"].outputs[0].shape == ("batch", 3, 512, 512)
    assert specs["vae_encoder"].outputs[0].shape == ("batch", 8, 64, 64)


def test_a_size_that_the_networks_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"size = 500 must be a multiple of 64 .* 448 or 512"):
        read_geometry(pipeline_folder(tmp_path), size=500)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"unet": {"addition_embed_type": "image"}}, "addition_embed_type = image"),
        ({"unet": {"in_channels": 9}}, "in_channels = 9"),
        ({"unet": {"cross_attention_dim": 1024}}, "cross_attention_dim = 1024"),
        ({"unet": {"block_out_channels": None}}, "lack"),
    ],
)
def test_other_kinds_of_pipelines_are_refused(
    tmp_path: Path, changes: dict[str, dict[str, object]], problem: str
) -> None:
    with pytest.raises(ModelError, match=f"{problem}.*supported are"):
        read_geometry(pipeline_folder(tmp_path, **changes))


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*unet/config\.json \(JSONDecodeError\)"):
        read_geometry(folder)


def test_batch_ranges() -> None:
    assert parse_batch("1:4:16") == BatchRange(1, 4, 16)
    assert parse_batch("8") == BatchRange(8, 8, 8)


@pytest.mark.parametrize("text", ["", "1:2", "a:b:c", "4:2:8", "0:1:2", "1:4:-8", "1:16:8"])
def test_other_batch_ranges_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"batch = .* must .*1:32:128"):
        parse_batch(text)
