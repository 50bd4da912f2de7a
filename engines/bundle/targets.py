"""The files that another system expects, beside a bundle's own: `target/<name>/` with a README of commands.

    jetpack5, 6, 7      build_engine.sh for that TensorRT generation; the bundle's models as they are
    jetson-inference    model.onnx with that library's input, normalisation and probabilities; labels.txt
    deepstream          the same with raw float pixels; nvinfer's configuration; labels on one line
    triton              a model repository; Triton takes the uint8 images as they are

Everything here was written from the systems' documentation and sources and was not run on their hardware;
what can be verified without it is that a rearranged model gives the probabilities of the bundle's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from synthkit.artifacts import write_bytes
from synthkit.data.images import Preprocessing
from synthkit.engines.bundle.build_script import write_build_script
from synthkit.engines.bundle.format import FILES, INPUT, OUTPUT
from synthkit.engines.runtime import onnx_graph
from synthkit.engines.runtime.session import open_session
from synthkit.errors import ConfigError, ParityError
from synthkit.standalone import in_batches, softmax

#: Largest error of a probability; sums in another order change about 1e-6.
TOLERANCE = 1e-4
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BundleContents:
    """What a target's files are made from.

    Attributes:
        bundle: the bundle's folder; it holds the model files.
        precisions: those that it holds.
        default: the one that runs when none is named.
        labels: class names in the order of the logits.
        preprocessing: how an image becomes the model's input.
        images: uint8 [N, height, width, 3] to verify a rearranged model on.
    """

    bundle: Path
    precisions: Sequence[str]
    default: str
    labels: Sequence[str]
    preprocessing: Preprocessing
    images: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the model's input."""
        return self.preprocessing.input_size[1], self.preprocessing.input_size[2]


@dataclass(frozen=True)
class Target:
    """What is known of a system.

    Attributes:
        opset: the newest ONNX opset that its oldest TensorRT reads, at most what one file for all needs.
        int8: which int8 form it runs.
        write: writes its files into a folder, from what `BundleContents` names; returns the README's text.
    """

    opset: int
    int8: str
    write: Callable[[BundleContents, Path], str] | None = None


@dataclass(frozen=True)
class Feed:
    """What a system puts into a float NCHW input: pixel / 255, minus a mean, divided by a deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of(self, images: np.ndarray) -> np.ndarray:
        """The input for uint8 images [N, height, width, 3], float32 [N, 3, height, width]."""
        values = (images / 255 - np.array(self.mean)) / np.array(self.std)
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)


IMAGENET = Feed(_IMAGENET_MEAN, _IMAGENET_STD)
RAW_PIXELS = Feed((0.0,) * 3, (1 / 255,) * 3)


def write_target(name: str, contents: BundleContents) -> None:
    """Write `target/<name>/` into a bundle that is not sealed yet; nothing for "generic".

    Raises:
        ConfigError: the labels cannot be written in the system's format.
        ParityError: a rearranged model does not give the bundle's probabilities.
    """
    write = TARGETS[name].write
    if write is not None:
        folder = contents.bundle / "target" / name
        folder.mkdir(parents=True)
        text = write(contents, folder)
        write_bytes(folder / "README.md", f"# {name}\n\n{_UNTRIED}\n\n{text}".encode())


def with_float_input(
    model: onnx.ModelProto, feed: Feed, names: tuple[str, str], batch: int | str
) -> onnx.ModelProto:
    """The model with a float NCHW input and probabilities, for systems that do not pass uint8 NHWC on.

    The system's normalisation is undone by the model's own scale and shift, so that the layers see what they
    see in the bundle's model.

    Args:
        model: the bundle's, in fp32.
        feed: what the system puts in.
        names: of the input and of the output.
        batch: images per run, or the name of the free axis.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    *_, scale_node, shift_node = onnx_graph.normalisation(changed, INPUT)
    tensors = onnx_graph.weights(changed)
    scale_name, shift_name = (_constant_input(node, tensors) for node in (scale_node, shift_node))
    scale, shift = (numpy_helper.to_array(tensors[name]) for name in (scale_name, shift_name))
    mean, std = (np.array(values).reshape(1, 3, 1, 1) * 255 for values in (feed.mean, feed.std))
    for name, values in ((scale_name, scale * std), (shift_name, shift + scale * mean)):
        tensors[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    scale_node.input[list(scale_node.input).index(scale_name) ^ 1] = names[0]
    graph.node.append(helper.make_node("Softmax", [OUTPUT], [names[1]], "probabilities", axis=-1))
    _, height, width, _ = (side.dim_value for side in graph.input[0].type.tensor_type.shape.dim)
    classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    graph.input[0].CopyFrom(
        helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [batch, 3, height, width])
    )
    graph.output[0].CopyFrom(helper.make_tensor_value_info(names[1], TensorProto.FLOAT, [batch, classes]))
    del graph.value_info[:]
    onnx_graph.drop_unused(changed)
    onnx.checker.check_model(changed, full_check=True)
    return changed


def _constant_input(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> str:
    return str(next(name for name in node.input if name in tensors))


def check_variant(path: Path, original: Path, feed: Feed, images: np.ndarray) -> float:
    """Largest difference of a rearranged model's probabilities from the original's.

    Raises:
        ParityError: it exceeds `TOLERANCE`.
    """
    session, reference = open_session(path), open_session(original)
    takes, gives = session.inputs[0].name, session.outputs[0].name
    one_by_one = [session.run({takes: feed.of(image[None])})[gives] for image in images]
    expected = softmax(in_batches(lambda batch: reference.run({INPUT: batch})[OUTPUT], images))
    error = float(np.abs(np.concatenate(one_by_one) - expected).max())
    if not error <= TOLERANCE:  # NaN too
        raise ParityError(
            f"the model for this target differs from the bundle's by {error:.2g} in a probability, allowed "
            f"are {TOLERANCE:.2g}, so it was not written; use --target generic and report this student"
        )
    return error


def _write_variant(
    contents: BundleContents, folder: Path, feed: Feed, names: tuple[str, str], batch: int | str
) -> None:
    original, path = contents.bundle / FILES["fp32"], folder / "model.onnx"
    onnx.save(with_float_input(onnx.load(original), feed, names, batch), path)
    check_variant(path, original, feed, contents.images)


def _jetpack(generation: str, facts: str) -> Callable[[BundleContents, Path], str]:
    def write(contents: BundleContents, folder: Path) -> str:
        write_build_script(folder / "build_engine.sh", contents.size, generation, "../..")
        height, width = contents.size
        held = ", ".join(contents.precisions)
        return _JETPACK.format(facts=facts, held=held, default=contents.default, height=height, width=width)

    return write


def _jetson_inference(contents: BundleContents, folder: Path) -> str:
    _write_variant(contents, folder, IMAGENET, ("input_0", "output_0"), 1)
    shutil.copyfile(contents.bundle / "labels.txt", folder / "labels.txt")
    return _JETSON_INFERENCE.format(cutting=_cutting(contents))


def _deepstream(contents: BundleContents, folder: Path) -> str:
    if wrong := [label for label in contents.labels if ";" in label]:
        raise ConfigError(f"DeepStream separates labels by ';', which {wrong[0]!r} holds; rename that class")
    _write_variant(contents, folder, RAW_PIXELS, (INPUT, "probabilities"), "batch")
    height, width = contents.size
    write_bytes(folder / "labels.txt", (";".join(contents.labels) + "\n").encode())
    write_bytes(folder / "config_infer_primary.txt", _NVINFER.format(height=height, width=width).encode())
    return _DEEPSTREAM.format(cutting=_cutting(contents))


def _triton(contents: BundleContents, folder: Path) -> str:
    height, width = contents.size
    for precision in contents.precisions:
        home = folder / "model_repository" / f"classifier_{precision}"
        (home / "1").mkdir(parents=True)
        shutil.copyfile(contents.bundle / FILES[precision], home / "1" / "model.onnx")
        shutil.copyfile(contents.bundle / "labels.txt", home / "labels.txt")
        text = _TRITON_CONFIG.format(
            name=home.name,
            height=height,
            width=width,
            classes=len(contents.labels),
            input=INPUT,
            output=OUTPUT,
        )
        write_bytes(home / "config.pbtxt", text.encode())
    return _TRITON.format(name=f"classifier_{contents.default}", height=height, width=width)


def _cutting(contents: BundleContents) -> str:
    """Whether the system, which stretches a frame to the model's size, cuts images as the student learned."""
    config = contents.preprocessing
    if config.crop_mode == "squash":
        return "It stretches each frame to the model's size, as this student expects."
    facts = json.dumps(
        {"crop_mode": config.crop_mode, "crop_pct": config.crop_pct, "filter": config.interpolation}
    )
    return (
        f"It stretches each whole frame to the model's size, where this student expects {facts}: scores "
        "differ from `synthkit predict`. Crop the frames alike before, or measure what it costs."
    )


_UNTRIED = "Written from the system's documentation and **not run on its hardware**."

_JETPACK = """{facts}
The bundle holds: {held}. Run on the device, in this folder:

    ./build_engine.sh {default} 8                 # ../../model.{default}.plan, for batches of 1 to 8
    /usr/src/tensorrt/bin/trtexec --loadEngine=../../model.{default}.plan --shapes=image:1x{height}x{width}x3
    python3 ../../predict.py photo.jpg            # the same answer by ONNX Runtime, to compare with

The engine takes `image`, uint8 RGB [batch, height, width, 3] at the model's size, and gives `logits`.
"""

_JETSON_INFERENCE = """`model.onnx` takes what jetson-inference's `imageNet` puts in (float RGB, NCHW,
ImageNet's mean and standard deviation) and gives probabilities; it was verified to equal the bundle's model.
{cutting}
The library builds its own fp16 engine at the first start and keys it by the model file's hash.

    blobs="--input_blob=input_0 --output_blob=output_0"
    imagenet --model=model.onnx --labels=labels.txt $blobs photo.jpg out.jpg
    imagenet --model=model.onnx --labels=labels.txt $blobs csi://0
"""

_DEEPSTREAM = """`model.onnx` takes what nvinfer puts in with `net-scale-factor=1` and no offsets (raw RGB
pixels as floats, NCHW), normalises them itself and gives probabilities; it was verified to equal the
bundle's model. {cutting}

    gst-launch-1.0 filesrc location=photo.jpg ! jpegdec ! nvvideoconvert \\
      ! 'video/x-raw(memory:NVMM),format=NV12' ! mux.sink_0 nvstreammux name=mux batch-size=1 width=1280 \\
      height=720 ! nvinfer config-file-path=config_infer_primary.txt ! nvdsosd ! fakesink
    deepstream-app -c YOUR_APP.txt                # with [primary-gie] config-file=config_infer_primary.txt
    python3 ../../predict.py photo.jpg            # the same answer by ONNX Runtime, to compare with
"""

_NVINFER = """# nvinfer: the classifier on whole frames.
# Written from the DeepStream documentation, not run on hardware.
[property]
gpu-id=0
onnx-file=model.onnx
labelfile-path=labels.txt
batch-size=1
# 0: fp32, 2: fp16
network-mode=2
# 1: classifier, whose output is probabilities
network-type=1
# 1: on whole frames; 2: on the objects of a detector before it
process-mode=1
gie-unique-id=1
# 0: RGB
model-color-format=0
infer-dims=3;{height};{width}
maintain-aspect-ratio=0
net-scale-factor=1
offsets=0;0;0
output-blob-names=probabilities
classifier-threshold=0.5
"""

_TRITON = """A model repository with one model per precision; each takes uint8 images
[batch, {height}, {width}, 3] as `predict.py` cuts them, and gives logits.
Labels come with the classification extension.

    docker run --rm -p 8000:8000 -v "$PWD/model_repository:/models" nvcr.io/nvidia/tritonserver:YY.MM-py3 \\
      tritonserver --model-repository=/models
    curl -s localhost:8000/v2/models/{name}/config
    python3 ../../predict.py photo.jpg            # the same answer by ONNX Runtime, to compare with
"""

_TRITON_CONFIG = """name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: 32
input [ {{ name: "{input}", data_type: TYPE_UINT8, dims: [ {height}, {width}, 3 ] }} ]
output [ {{ name: "{output}", data_type: TYPE_FP32, dims: [ {classes} ], label_filename: "labels.txt" }} ]
dynamic_batching {{ }}
"""

_JETPACK5 = _jetpack("8", "JetPack 5.1 has TensorRT 8.5; the 8.4 of JetPack 5.0 takes no uint8 input.")
_JETPACK6 = _jetpack("10", "JetPack 6.1, 6.2 have TensorRT 10.3; for 6.0 (8.6) take ../../build_engine.sh.")
_JETPACK7 = _jetpack("10", "JetPack 7 has TensorRT 10.13 or newer.")

#: `--target` -> the system. Opset 16 is what TensorRT 8.4 and 8.5 read, 17 what 8.6 and all newer ones do.
TARGETS = {
    "generic": Target(17, "cpu"),
    "jetpack5": Target(16, "tensorrt", _JETPACK5),
    "jetpack6": Target(17, "tensorrt", _JETPACK6),
    "jetpack7": Target(17, "tensorrt", _JETPACK7),
    "jetson-inference": Target(16, "tensorrt", _jetson_inference),
    "deepstream": Target(16, "tensorrt", _deepstream),
    "triton": Target(17, "cpu", _triton),
}
