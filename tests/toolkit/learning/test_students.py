"""Students: folders that timm reads too, units from stem to head, weights that fit or are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("timm")

import timm
import torch
from safetensors.torch import load_file, save_file

from synthkit.errors import ConfigError, ModelError
from synthkit.learning.students import Student, load_student, new_student, to_unit_range
from tests.tiny_students import CLASSES, PREPROCESSING, lively_student, noise


@pytest.fixture(scope="module")
def student() -> Student:
    return lively_student(seed=3)


@pytest.fixture
def folder(student: Student, tmp_path: Path) -> Path:
    student.save(tmp_path / "student")
    return tmp_path / "student"


def state(student: Student) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in student.model.state_dict().items()}


def changed(student: Student, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in student.model.state_dict().items() if not torch.equal(value, before[key])}


def test_a_saved_student_comes_back_whole(student: Student, folder: Path) -> None:
    loaded = load_student(folder)
    logits = student.logits(noise())
    assert logits.std() > 0.1, "logits near zero would show nothing"
    assert torch.equal(loaded.logits(noise()), logits)
    assert (loaded.classes, loaded.preprocessing) == (student.classes, student.preprocessing)
    assert loaded.architecture == "test_resnet"


def test_timm_loads_the_folder_without_synthkit(student: Student, folder: Path) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(student.normalise(to_unit_range(noise())))
    assert torch.equal(logits, student.logits(noise()))
    data_config = timm.data.resolve_model_data_config(model)
    assert tuple(data_config["input_size"]) == PREPROCESSING.input_size
    assert data_config["crop_pct"] == PREPROCESSING.crop_pct
    assert json.loads((folder / "config.json").read_text("utf-8"))["label_names"] == list(CLASSES)


def test_batches_of_any_size_give_the_same_logits(student: Student) -> None:
    assert torch.allclose(student.logits(noise(), batch_size=4), student.logits(noise()), atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "mobilenetv2_050"])
def test_the_head_makes_the_logits_of_the_features(name: str) -> None:
    student = lively_student(1, name=name)
    size = student.model.pretrained_cfg["input_size"][1] if "vit" in name else 32
    images = noise(5, size)
    features = student.features(images, batch_size=2)
    assert features.shape == (5, student.head.in_features) and features.dtype == np.float32
    logits = student.head(torch.from_numpy(features))
    assert torch.allclose(logits, student.logits(images), atol=1e-4)


def test_a_clone_has_weights_of_its_own(student: Student) -> None:
    before = state(student)
    with torch.no_grad():
        next(student.clone().model.parameters()).zero_()
    assert not changed(student, before)


ARCHITECTURES = ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_end_with_the_head_alone(name: str) -> None:
    student = new_student(name, CLASSES)
    units = student.layer_groups()
    names = [name for name, _ in student.model.named_parameters()]
    assert sorted(name for unit in units for name in unit) == sorted(names), "each parameter in one unit"
    own = {id(parameter) for parameter in student.head.parameters()}
    assert [id(dict(student.model.named_parameters())[one]) in own for one in units[-1]] == [True, True]
    assert len(units) >= 5
    for count in (1, 2, 4, 0):
        student.train_only_last(count)
        trained = {name for name, one in student.model.named_parameters() if one.requires_grad}
        assert trained == {name for unit in units[len(units) - count :] for name in unit}


def test_a_resnet_s_units_are_its_blocks() -> None:
    units = new_student("resnet10t", CLASSES).layer_groups()
    starts = [unit[0].rpartition(".")[0].split(".")[0] for unit in units]
    assert starts == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "test_vit"])
def test_a_new_head_changes_the_head_only_and_always_alike(name: str) -> None:
    student = new_student(name, CLASSES, image_size=32)
    before, random = state(student), torch.random.get_rng_state()
    student.reset_head(5)
    head = set(student.layer_groups()[-1])
    assert changed(student, before) <= head and any("weight" in key for key in changed(student, before))
    assert torch.equal(torch.random.get_rng_state(), random), "the global random state is the caller's"
    first = state(student)
    student.reset_head(5)
    assert not changed(student, first)
    student.reset_head(6)
    assert changed(student, first)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = new_student("test_resnet", CLASSES, seed=4)
    torch.manual_seed(2)
    assert not changed(new_student("test_resnet", CLASSES, seed=4), state(first))
    assert changed(new_student("test_resnet", CLASSES, seed=5), state(first))


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"knows no student 'resnet10'.*did you mean resnet10t"):
        new_student("resnet10", CLASSES)


def test_a_student_with_two_heads_is_refused() -> None:
    with pytest.raises(ModelError, match="more than one head"):
        new_student("deit_tiny_distilled_patch16_224", CLASSES)


def test_weights_start_the_body_and_not_the_head(student: Student, folder: Path) -> None:
    fresh = new_student("test_resnet", ("a", "b"), weights=folder)
    own, given = state(fresh), state(student)
    body = [key for key in own if not key.startswith("fc.")]
    assert body and all(torch.equal(own[key], given[key]) for key in body)
    assert fresh.head.weight.shape[0] == 2


def test_a_weights_folder_keeps_its_preprocessing(student: Student, tmp_path: Path) -> None:
    odd = replace(PREPROCESSING, interpolation="bilinear", crop_pct=0.7, mean=(0.1, 0.2, 0.3))
    replace(student, preprocessing=odd).save(tmp_path / "odd")
    assert new_student("test_resnet", CLASSES, weights=tmp_path / "odd").preprocessing == odd
    by_file = new_student("test_resnet", CLASSES, weights=tmp_path / "odd" / "model.safetensors")
    assert by_file.preprocessing == odd
    sized = new_student("test_resnet", CLASSES, weights=tmp_path / "odd", image_size=48).preprocessing
    assert sized == replace(odd, input_size=(3, 48, 48), crop_pct=1.0)


def test_a_student_from_scratch_sees_the_whole_picture() -> None:
    preprocessing = new_student("test_resnet", CLASSES, image_size=32).preprocessing
    assert (preprocessing.crop_mode, preprocessing.crop_pct) == ("squash", 1.0)
    assert preprocessing.input_size == (3, 32, 32)


def test_a_transformer_is_built_for_its_size(tmp_path: Path) -> None:
    student = new_student("test_vit", CLASSES, image_size=64)
    student.save(tmp_path)
    assert torch.equal(load_student(tmp_path).logits(noise(2, 64)), student.logits(noise(2, 64)))


def test_weights_without_batch_counts_are_accepted(student: Student, folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if "num_batches_tracked" not in key}
    save_file(tensors, tmp_path / "lean.safetensors")
    new_student("test_resnet", CLASSES, weights=tmp_path / "lean.safetensors")
    save_file(tensors, path)
    assert torch.equal(load_student(folder).logits(noise()), student.logits(noise()))


def test_weights_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors holds no weights of test_vit: .* are missing"):
        new_student("test_vit", CLASSES, weights=folder)
    with pytest.raises(ModelError, match="cannot read weights from"):
        new_student("test_resnet", CLASSES, weights=tmp_path)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ModelError, match="cannot read weights from"):
        new_student("test_resnet", CLASSES, weights=tmp_path / "text.safetensors")
    with pytest.raises(ConfigError, match="exclude each other"):
        new_student("test_resnet", CLASSES, weights=folder, pretrained=True)


def test_hub_weights_that_cannot_be_fetched_name_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **others: Any) -> Any:
        if pretrained:
            raise OSError("no route to the hub")
        return real(name, **others)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match=r"resnet10t cannot be fetched .* --weights, .* --no-pretrained"):
        new_student("resnet10t", CLASSES, pretrained=True)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.pop("architecture"), "is no student"),
        (
            lambda config: (config.pop("label_names"), config["pretrained_cfg"].pop("label_names")),
            "no student",
        ),
        (lambda config: config.update(architecture="nonsense"), "'nonsense' that timm does not know"),
        (lambda config: config.update(label_names=["a", "b"]), "does not fit test_resnet"),
        (lambda config: config.update(architecture="test_vit"), "does not fit test_vit"),
    ],
)
def test_a_broken_student_s_folder_is_refused(folder: Path, edit: Any, message: str) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_student(folder)


def test_pixels_are_normalised_as_timm_does(student: Student) -> None:
    images = np.full((1, 2, 2, 3), 255, np.uint8)
    found = student.normalise(to_unit_range(images))
    expected = [(1 - mean) / std for mean, std in zip(PREPROCESSING.mean, PREPROCESSING.std, strict=True)]
    assert found.shape == (1, 3, 2, 2) and torch.allclose(found[0, :, 0, 0], torch.tensor(expected))


def test_a_new_head_on_pretrained_weights_favours_no_class(tmp_path: Path) -> None:
    """The head that timm makes for a MobileNet gives logits in the tens before anything is learned."""
    new_student("mobilenetv2_035", CLASSES, image_size=32).save(tmp_path)
    student = new_student("mobilenetv2_035", CLASSES, weights=tmp_path, image_size=32)
    assert not student.logits(noise(2)).any()
    student.reset_head(0)
    assert student.logits(noise(2)).any()


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet10t", "test_vit"])
def test_a_new_head_is_of_the_scale_of_the_features(name: str) -> None:
    """Only the head that timm creates a MobileNet with is large: the one that `new_head` makes is torch's."""
    student = new_student(name, CLASSES)
    student.reset_head(0)
    weight = student.head.weight.detach()
    gain = float(weight.std()) * weight.shape[1] ** 0.5  # logits over features, both as standard deviations
    assert gain == pytest.approx(3**-0.5, rel=0.1)
