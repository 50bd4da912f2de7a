"""A bundle opens only when it is whole, and runs where synthkit is not installed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from synthkit.artifacts import digest, file_sha256, write_json
from synthkit.engines.bundle.format import FILES, Bundle, read_facts, seal, verify
from synthkit.errors import BadImages, BundleError, DataError, MissingExtra
from tests.tiny_students import CLASSES, class_folders, tiny_bundle, tiny_student


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("made") / "bundle", trained_on=["00"])


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "my bundle")


def restate(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change bundle.json as someone who knows the digest would."""
    facts = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    facts.pop("digest")
    change(facts)
    (folder / "bundle.json").write_text(json.dumps({**facts, "digest": digest(facts)}), encoding="utf-8")


def rehash(folder: Path, *names: str) -> None:
    def change(facts: dict[str, object]) -> None:
        for name in names:
            size = (folder / name).stat().st_size
            facts["files"][name] = {"sha256": file_sha256(folder / name), "bytes": size}  # type: ignore[index]

    restate(folder, change)


def test_layout_is_the_stated_one(bundle: Path) -> None:
    assert sorted(path.name for path in bundle.iterdir()) == sorted(
        "model.onnx labels.txt preprocess.json bundle.json golden.npz predict.py build_engine.sh".split()
    )
    assert (bundle / "labels.txt").read_text(encoding="utf-8") == "".join(f"{name}\n" for name in CLASSES)
    facts = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    assert (facts["schema"], facts["version"], facts["default_precision"]) == (2, 1, "fp32")
    assert facts["input"] == {"name": "image", "dtype": "uint8", "shape": ["batch", 32, 32, 3]}
    assert facts["output"] == {"name": "logits", "dtype": "float32", "shape": ["batch", 3]}
    assert facts["provenance"] == {"trained_on": ["00"], "path": "last layer"}
    precision = facts["precisions"]["fp32"]
    assert (precision["file"], precision["opset"], precision["exporter"]) == ("model.onnx", 17, "torchscript")
    assert set(precision["head"]) == {"input", "weight", "bias"}
    assert precision["accuracy"] == {"top1": 0.5, "n_test": 6}
    assert precision["parity"]["max_abs_error"] <= precision["parity"]["tolerance"]
    metadata = {prop.key: prop.value for prop in onnx.load(bundle / "model.onnx").metadata_props}
    assert list(json.loads(metadata["names"]).values()) == list(CLASSES)
    assert json.loads(metadata["preprocess"]) == json.loads((bundle / "preprocess.json").read_text())


def test_a_whole_bundle_opens_and_classifies(bundle: Path, tmp_path: Path) -> None:
    assert verify(bundle) == []
    root = class_folders(tmp_path / "photos")
    paths = sorted(root.rglob("*.png"))
    opened = Bundle.open(bundle)
    found = [one.to_json() for one in opened.predict(paths, top=2)]
    student = tiny_student()
    from synthkit import standalone
    from synthkit.engines.student.onnx_export import Uint8Student, torch_logits

    inputs = np.stack([student.preprocessing(standalone.open_image(path)) for path in paths])
    logits = torch_logits(Uint8Student(student.model, student.preprocessing), inputs)
    assert [one["label"] for one in found] == [CLASSES[i] for i in logits.argmax(1)]
    assert found[0]["path"] == str(paths[0]) and [len(one["top"]) for one in found] == [2] * 6
    for one, row in zip(found, standalone.softmax(logits), strict=True):
        assert one["score"] == pytest.approx(row.max(), abs=1e-4) == pytest.approx(one["top"][0][1], abs=1e-4)
    many = np.repeat(inputs, 20, axis=0)
    assert np.abs(opened.logits(many)[::20] - logits).max() < 1e-3
    (tmp_path / "bad.jpg").write_text("x")
    with pytest.raises(BadImages, match=r"bad\.jpg"):
        opened.predict([paths[0], tmp_path / "bad.jpg"])


def test_what_using_a_bundle_leaves_behind_may_lie_there(bundle: Path) -> None:
    (bundle / "__pycache__").mkdir()
    for name in (
        "model.plan",
        "model.engine",
        ".hidden",
        "manifest.json",
        "__pycache__/predict.cpython-310.pyc",
    ):
        (bundle / name).write_text("")
    assert verify(bundle) == []


def test_a_note_beside_the_model_is_told_and_used_all_the_same(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (bundle / "note.txt").write_text("from the workshop")
    opened = Bundle.open(bundle)
    assert "note.txt does not belong to it" in caplog.text
    assert opened.verify().to_json() == {"ok": False, "failures": ["note.txt does not belong to it"]}
    (bundle / "note.txt").unlink()
    assert opened.verify().ok and opened.verify().failures == ()


def test_files_arrays_and_pillow_images_are_the_same_images(bundle: Path, tmp_path: Path) -> None:
    path = next(class_folders(tmp_path / "photos").rglob("*.png"))
    opened = Bundle.open(bundle)
    with Image.open(path) as image:
        (from_pillow,) = opened.predict(image)
        pixels = np.asarray(image.convert("RGB"))
    (from_path,), (from_array,) = opened.predict(str(path)), opened.predict(pixels)
    assert from_pillow == from_array == replace(from_path, path=None) and from_path.path == str(path)
    assert from_path.label == from_path.top[0][0] and len(from_path.top) == 3
    assert [one.path for one in opened.predict([path, pixels])] == [str(path), None]
    assert opened.predict([]) == []
    for wrong in (pixels / 255, pixels[..., 0], [7]):
        with pytest.raises(DataError, match="an image is a file, a Pillow image or an array uint8"):
            opened.predict(wrong)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def another_schema(folder: Path) -> None:
    restate(folder, lambda facts: facts.update(schema=99))


def spoiled_weight(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    tensor = next(one for one in model.graph.initializer if len(one.dims) == 4)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.05), tensor.name))
    onnx.save(model, folder / "model.onnx")
    rehash(folder, "model.onnx")


def spoiled_to_nan(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        spoiled = numpy_helper.to_array(tensor) * np.float32("nan")
        tensor.CopyFrom(numpy_helper.from_array(spoiled, tensor.name))
    onnx.save(model, folder / "model.onnx")
    rehash(folder, "model.onnx")


def lost_label(folder: Path) -> None:
    (folder / "labels.txt").write_text("a\nb\n")
    rehash(folder, "labels.txt")


def another_input(folder: Path) -> None:
    restate(folder, lambda facts: facts["input"].update(shape=["batch", 64, 64, 3]))  # type: ignore[attr-defined]


def no_model(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"no graph")
    rehash(folder, "model.onnx")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "predict.py").unlink(), "predict.py is missing"),
        (lambda folder: cut(folder / "model.onnx"), "model.onnx was altered"),
        (lambda folder: (folder / "bundle.json").unlink(), "no bundle: .*bundle.json is missing"),
        (shutil.rmtree, "no bundle"),
        (lambda folder: cut(folder / "bundle.json") or cut(folder / "bundle.json"), "is not a bundle's JSON"),
        (lambda folder: (folder / "bundle.json").write_text("[]"), "is not a bundle's JSON"),
        (another_schema, "schema 99, this synthkit reads 2"),
        (spoiled_weight, "model.onnx differs from golden.npz by"),
        (spoiled_to_nan, "model.onnx differs from golden.npz by nan"),
        (lost_label, "labels.txt holds 2 names, model.onnx has 3 logits"),
        (another_input, r"uint8 \['batch', 32, 32, 3\] .* states image uint8 \['batch', 64, 64, 3\]"),
        (no_model, "model.onnx cannot be loaded"),
    ],
)
def test_a_damaged_bundle_is_refused(bundle: Path, damage: Callable[[Path], object], text: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=text) as caught:
        Bundle.open(bundle)
    assert "my bundle" in str(caught.value)
    (failure,) = verify(bundle)
    assert failure.split(": ")[-1] in str(caught.value)


def test_provenance_edited_by_hand_is_noticed(bundle: Path) -> None:
    path = bundle / "bundle.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"00"', '"11"'), encoding="utf-8")
    assert verify(bundle) == [f"{path} was altered; export or copy the bundle again"]


def test_every_altered_file_is_named(bundle: Path) -> None:
    (bundle / "labels.txt").write_text("x")
    (bundle / "golden.npz").unlink()
    assert verify(bundle) == ["golden.npz is missing", "labels.txt was altered"]


def test_without_onnxruntime_the_extra_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'synthkit-edge\[cpu\]'"):
        Bundle.open(bundle)


BARE = """
import runpy, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

allowed = {"numpy", "PIL", "onnxruntime"}
blocked = {"synthkit", "torch", "timm", "onnx", "click", "tqdm", *sys.argv.pop(1).split(",")}
sys.meta_path.insert(0, Nothing())
allowed -= blocked
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_a_bare_device(folder: Path, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-I", "-W", "error", "-X", "utf8", "-c", BARE]
    return subprocess.run(
        [*python, without, folder / "predict.py", *arguments],
        capture_output=True, text=True, check=False, cwd=folder.parent, env=environment, encoding="utf-8",
    )  # fmt: skip


def test_predict_py_agrees_with_synthkit_and_needs_none_of_it(bundle: Path, tmp_path: Path) -> None:
    paths = sorted(class_folders(tmp_path / "photos").rglob("*.png"))
    done = on_a_bare_device(bundle, "--json", "--top", "3", *map(str, paths))
    assert done.returncode == 0, done.stderr
    expected = [one.to_json() for one in Bundle.open(bundle).predict(paths, top=3)]
    assert json.loads(done.stdout) == {"predictions": expected}
    done = on_a_bare_device(bundle, str(paths[0]))
    assert done.stdout.startswith(f"{paths[0]}: ") and done.stdout.count("\n") == 1


def test_predict_py_says_in_one_line_what_is_wrong(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("x")
    done = on_a_bare_device(bundle, "bad.jpg", "absent.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: bad.jpg: not an image; absent.png: no such file\n"
    done = on_a_bare_device(bundle, "bad.jpg", without="onnxruntime")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "pip install onnxruntime" in done.stderr


def trtexec(folder: Path, help_text: str) -> dict[str, str]:
    """An environment whose trtexec prints its arguments, one per line."""
    fake = folder / "trtexec"
    fake.write_text(f'#!/bin/sh\n[ "$1" = --help ] && echo "{help_text}" && exit\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    return {**os.environ, "TRTEXEC": str(fake)}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    ("flags", "generation"), [("--fp16", "8"), ("--fp16 --stronglyTyped", "10"), ("--useCudaGraph", "11")]
)
def test_build_engine_gives_each_generation_its_line(
    bundle: Path, flags: str, generation: str, precision: str
) -> None:
    (bundle / FILES[precision]).touch()
    done = subprocess.run(
        [bundle / "build_engine.sh", precision, "16"],
        env=trtexec(bundle.parent, flags), capture_output=True, text=True, check=True,
    )  # fmt: skip
    weak = {"fp32": [], "fp16": ["--fp16"], "int8": ["--int8", "--fp16"]}[precision]
    typing = {"8": weak, "10": ["--stronglyTyped"], "11": []}[generation]
    shapes = ["--minShapes=image:1x32x32x3", "--optShapes=image:4x32x32x3", "--maxShapes=image:16x32x32x3"]
    files = [f"--onnx={FILES[precision]}", f"--saveEngine=model.{precision}.plan"]
    assert done.stdout.split() == [*files, *typing, *shapes]


def test_build_engine_says_what_the_bundle_lacks(bundle: Path) -> None:
    for argument, text in (("fp16", "holds no model.fp16.onnx"), ("fp8", "no precision 'fp8'")):
        done = subprocess.run(
            [bundle / "build_engine.sh", argument],
            env=trtexec(bundle.parent, ""), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "") and text in done.stderr


def test_a_precision_that_is_not_there_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no int8 model, but fp32; make one with `synthkit export"):
        Bundle.open(bundle, "int8")


def test_labels_in_another_order_than_the_models_are_noticed(bundle: Path) -> None:
    (bundle / "labels.txt").write_text("".join(f"{name}\n" for name in reversed(CLASSES)), encoding="utf-8")
    rehash(bundle, "labels.txt")
    assert verify(bundle) == ["labels.txt names other classes than the metadata of model.onnx"]


def test_a_changed_bundle_can_be_sealed_again(bundle: Path) -> None:
    facts = read_facts(bundle)
    (bundle / "notes.txt").write_text("x")
    assert verify(bundle) == ["notes.txt does not belong to it"]
    seal(bundle, replace(facts, version=2))
    assert verify(bundle) == [] and read_facts(bundle).version == 2
    assert set(read_facts(bundle).files) == {*facts.files, "notes.txt"}


@pytest.mark.parametrize(
    ("name", "content", "failure"),
    [
        ("preprocess.json", "{}", "preprocess.json is not usable: KeyError('input_size')"),
        ("preprocess.json", "[1]", "preprocess.json is not usable"),
        ("golden.npz", "junk", "golden.npz holds no readable inputs and outputs for model.onnx"),
        ("replay_buffer.npz", "junk", "replay_buffer.npz holds no readable features"),
        ("confidence.json", "junk", "confidence.json holds no probabilities"),
        ("confidence.json", "[1, 2]", "confidence.json holds no probabilities"),
        ("confidence.json", '{"threshold": 7}', "confidence.json holds no probabilities"),
    ],
)
def test_a_sealed_file_that_cannot_be_read_is_named(
    bundle: Path, name: str, content: str, failure: str
) -> None:
    (bundle / name).write_text(content)
    seal(bundle, read_facts(bundle))
    (found,) = verify(bundle)
    assert found.startswith(failure)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"labels": np.array([0, len(CLASSES)])},
        {"labels": np.array([0.5, 1.0])},
        {"sha256": np.array(["a"])},
        {"features_fp32": np.ones((3, 4), np.float16)},
        {"features_fp32": np.full((2, 4), np.nan, np.float16)},
    ],
)
def test_a_sealed_replay_buffer_of_another_bundle_is_named(
    bundle: Path, spoilt: dict[str, np.ndarray]
) -> None:
    whole = {"labels": np.array([0, 1]), "sha256": np.array(["a", "b"])}
    whole["features_fp32"] = np.ones((2, 4), np.float16)
    np.savez(bundle / "replay_buffer.npz", **whole)
    seal(bundle, read_facts(bundle))
    assert verify(bundle) == []
    np.savez(bundle / "replay_buffer.npz", **(whole | spoilt))
    seal(bundle, read_facts(bundle))
    classes = len(CLASSES)
    assert verify(bundle) == [f"replay_buffer.npz does not fit the bundle's {classes} classes and its models"]


def test_a_sealed_preprocessing_that_the_model_does_not_know_is_named(bundle: Path) -> None:
    edited = json.loads((bundle / "preprocess.json").read_text()) | {"crop_pct": 0.5}
    write_json(bundle / "preprocess.json", edited)
    seal(bundle, read_facts(bundle))
    assert verify(bundle) == ["preprocess.json differs from the metadata of model.onnx"]
    with pytest.raises(BundleError, match="differs from the metadata"):
        Bundle.open(bundle)
