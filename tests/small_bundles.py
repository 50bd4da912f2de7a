"""Bundles in three precisions and coloured photos, for the tests of what happens on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from synthkit.engines.bundle import format as bundles
from synthkit.engines.bundle.format import FP32, Golden
from tests.tiny_students import noise, tiny_bundle

COLOURS = {
    "Ærø brücke": (140, 0, 0),
    "a dog": (0, 140, 0),
    "Ω": (0, 0, 140),
    "new": (140, 140, 0),
    "other": (0, 140, 140),
}


def coloured_photos(root: Path, classes: Sequence[str], each: int, seed: int = 0, noisy: int = 90) -> Path:
    """Noisy images in the colour of their class: even a network of random weights tells them apart."""
    random = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, noisy, (32, 32, 3), dtype=np.uint8) + np.uint8(COLOURS[name])
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def three_precisions(folder: Path, trained_on: Sequence[str] = ()) -> Path:
    """A tiny bundle that also holds a half-precision and a statically quantized model, heads in float."""
    import onnx
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.transformers.float16 import convert_float_to_float16

    tiny_bundle(folder, trained_on)
    model = onnx.load(folder / "model.onnx")
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    half = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(half, folder / "model.fp16.onnx")
    quantize_static(
        folder / "model.onnx",
        folder / "model.int8.onnx",
        _Reader(),
        quant_format=QuantFormat.QDQ,
        nodes_to_exclude=[gemm.name],
    )
    _state(folder, ("fp16", "int8"))
    return folder


class _Reader:
    """Calibration images for the quantizer."""

    def __init__(self) -> None:
        self._left: Iterator[dict[str, np.ndarray]] = iter([{"image": noise(4, seed=9)}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def _state(folder: Path, precisions: Sequence[str]) -> None:
    facts = bundles.read_facts(folder)
    stated, own = dict(facts.precisions), {}
    with np.load(folder / "golden.npz") as golden:
        inputs, logits = golden["inputs"], golden["logits"]
    for name in precisions:
        entry: dict[str, Any] = {**facts.precisions[FP32], "file": bundles.FILES[name]}
        path = folder / entry["file"]
        entry["head"] = head_names(path)
        entry["opset"] = 17
        entry["golden_tolerance"] = {"relative": bundles.TOLERANCES[name].relative}
        stated[name] = entry
        own[name] = bundles.open_session(path).run({"image": inputs})["logits"]
    bundles.write_golden(folder, Golden(inputs, logits, own))
    bundles.seal(folder, replace(facts, precisions=stated))


def head_names(path: Path) -> dict[str, str]:
    import onnx

    gemm = next(node for node in reversed(onnx.load(path).graph.node) if node.op_type == "Gemm")
    return dict(zip(("input", "weight", "bias"), gemm.input, strict=True))


def facts_of(folder: Path) -> bundles.BundleFacts:
    return bundles.read_facts(folder)
