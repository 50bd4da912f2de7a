"""A student's ONNX file computes what the student computes, or is not written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from synthkit.engines.runtime.session import open_session
from synthkit.engines.runtime.tensor_spec import TensorSpec
from synthkit.engines.student import onnx_export as student_onnx
from synthkit.engines.student.onnx_export import Uint8Student, check_parity, export_student, torch_logits
from synthkit.errors import EngineError, ParityError
from tests.tiny_students import MEAN, PREPROCESSING, STD, noise, tiny_student

Exported = tuple[Any, np.ndarray, Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    path = tmp_path_factory.mktemp("student") / "model.onnx"
    facts, logits = export_student(
        tiny_student().model, PREPROCESSING, noise(), path, {"names": '{"0": "Ω"}'}
    )
    return facts, logits, path


def test_logits_are_those_of_the_model_on_normalised_images(exported: Exported) -> None:
    _, logits, path = exported
    model = tiny_student().model.eval()
    pixels = (noise() / 255 - np.array(MEAN)) / np.array(STD)
    with torch.no_grad():
        expected = model(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)).numpy()
    scale = np.abs(expected).max()
    assert scale > 0.5 and len(set(expected.argmax(1))) > 1
    assert np.abs(logits - expected).max() < 1e-4 * scale
    session = open_session(path)
    for count in (1, 3, 6):
        found = session.run({"image": noise()[:count]})["logits"]
        assert np.abs(found - expected[:count]).max() < 1e-4 * scale


def test_the_file_is_whole_and_says_what_it_is(exported: Exported) -> None:
    facts, _, path = exported
    assert [one.name for one in path.parent.iterdir()] == ["model.onnx"]
    session = open_session(path)
    assert session.inputs == (TensorSpec("image", "uint8", ("batch", 32, 32, 3)),)
    assert session.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)
    model = onnx.load(path)
    assert json.loads({prop.key: prop.value for prop in model.metadata_props}["names"]) == {"0": "Ω"}
    assert (facts.exporter, facts.opset) == ("torchscript", student_onnx.OPSET)
    assert facts.parity.finite and facts.parity.top1_agreement == 1.0 and facts.parity.images == 6
    (first,) = [node for node in model.graph.node if "image" in node.input]
    assert first.op_type == "Cast"  # TensorRT takes uint8 into a Cast only


def test_the_heads_tensors_can_be_replaced_alone(exported: Exported, tmp_path: Path) -> None:
    facts, _, path = exported
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    bias = numpy_helper.to_array(weights[facts.head["bias"]])
    assert np.array_equal(bias, tiny_student().model.get_classifier().bias.detach().numpy())
    changed = np.zeros((3, weights[facts.head["weight"]].dims[1]), np.float32)
    weights[facts.head["weight"]].CopyFrom(numpy_helper.from_array(changed, facts.head["weight"]))
    onnx.save(model, tmp_path / "changed.onnx")
    found = open_session(tmp_path / "changed.onnx").run({"image": noise()})["logits"]
    assert np.allclose(found, bias, atol=1e-6)
    assert facts.head["input"] in {name for node in model.graph.node for name in node.output}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit"])
def test_other_kinds_of_students(tmp_path: Path, name: str) -> None:
    from dataclasses import replace

    side = 160 if name == "test_vit" else 32
    preprocessing = replace(PREPROCESSING, input_size=(3, side, side))
    model = tiny_student(name=name).model
    facts, logits = export_student(model, preprocessing, noise(3, side), tmp_path / "model.onnx", {})
    assert facts.head["weight"].endswith(".weight") and np.ptp(logits) > 0.1


def spoil_weight(path: Path, factor: float = 1.01) -> None:
    model = onnx.load(path)
    tensor = next(one for one in model.graph.initializer if len(one.dims) == 4)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(model, path)


def test_a_planted_wrong_weight_is_found_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = student_onnx._finish

    def spoiled(path: Path, *rest: Any) -> Any:
        found = finish(path, *rest)
        spoil_weight(path)
        return found

    monkeypatch.setattr(student_onnx, "_finish", spoiled)
    with pytest.raises(ParityError, match="differs from the torch student by"):
        export_student(tiny_student().model, PREPROCESSING, noise(), tmp_path / "model.onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_logits_near_zero_are_held_to_their_own_scale(tmp_path: Path) -> None:
    model = tiny_student().model
    with torch.no_grad():
        model.get_classifier().weight.mul_(1e-6)
        model.get_classifier().bias.mul_(1e-6)
    export_student(model, PREPROCESSING, noise(), tmp_path / "model.onnx", {})
    spoil_weight(tmp_path / "model.onnx")
    logits = torch_logits(Uint8Student(model, PREPROCESSING), noise())
    with pytest.raises(ParityError):
        check_parity(logits, tmp_path / "model.onnx", noise())


def test_a_student_that_gives_nan_is_refused(tmp_path: Path) -> None:
    model = tiny_student().model
    with torch.no_grad():
        model.get_classifier().bias[0] = float("nan")
    with pytest.raises(ParityError, match="not finite"):
        export_student(model, PREPROCESSING, noise(), tmp_path / "model.onnx", {})
    assert list(tmp_path.iterdir()) == []


class Plain(torch.nn.Module):
    """No timm model, with a Linear head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(3, 8, 8, 8)
        self.head = torch.nn.Linear(8, 3, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).relu().mean((2, 3)))

    def get_classifier(self) -> torch.nn.Module:
        return self.head


def test_equal_weights_get_a_tensor_each(tmp_path: Path) -> None:
    model = Plain()
    model.body = torch.nn.Sequential(model.body, torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 8, 1))
    model.head = torch.nn.Linear(8, 8)
    with torch.no_grad():
        for layer in (model.body[1], model.body[2], model.head):
            layer.bias.zero_()
    facts, _ = export_student(model, PREPROCESSING, noise(), tmp_path / "model.onnx", {})
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not any(node.op_type == "Identity" for node in graph.node)
    assert sum(facts.head["bias"] in node.input for node in graph.node) == 1


@pytest.mark.slow
def test_a_refused_student_goes_to_the_other_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse: Callable[..., None] = lambda *rest: (_ for _ in ()).throw(RuntimeError("no such operator\nx"))  # noqa: E731
    monkeypatch.setitem(student_onnx._EXPORTERS, "torchscript", refuse)
    facts, logits = export_student(Plain(), PREPROCESSING, noise(), tmp_path / "model.onnx", {})
    assert (facts.exporter, facts.opset, facts.parity.finite) == ("dynamo", 18, True)
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]
    weights = {
        one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    assert weights[facts.head["bias"]].tolist() == [0, 0, 0] and np.ptp(logits) > 0
    monkeypatch.setitem(student_onnx._EXPORTERS, "dynamo", refuse)
    with pytest.raises(EngineError, match=r"torchscript: no such operator; dynamo: no such operator\); use"):
        export_student(Plain(), PREPROCESSING, noise(), tmp_path / "other.onnx", {})


def test_a_student_without_a_linear_head_has_none(tmp_path: Path) -> None:
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32), torch.nn.Flatten())
    facts, _ = export_student(body, PREPROCESSING, noise(), tmp_path / "model.onnx", {})
    assert facts.head is None


def test_exporting_leaves_the_student_as_it_was() -> None:
    model = tiny_student().model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch_logits(Uint8Student(model, PREPROCESSING), noise())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
