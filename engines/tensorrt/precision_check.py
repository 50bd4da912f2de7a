"""Check that an engine computes in the precision that was asked for.

An fp16 engine that is fp32 inside works, is merely twice as large and slow, and nothing says so. The evidence
is what TensorRT's engine inspector says of the layers, or the size of the plan per weight. This module knows
no TensorRT.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthkit.engines.runtime.graph_check import dtype_histogram
from synthkit.engines.tensorrt.build_plan import BuildPlan
from synthkit.errors import EngineError, MissingExtra

_LARGE = 8 * 2**20  # weights from which on the plan's size tells; a smaller plan is mostly kernels
_HALF = re.compile(r"\b(half|fp16|float16)\b", re.IGNORECASE)
_SINGLE = re.compile(r"\b(float|fp32|float32)\b", re.IGNORECASE)


def graph_weights(onnx_path: Path) -> Counter[str]:
    """Number of floating-point weights of an ONNX file by ONNX's name of their type.

    Raises:
        MissingExtra: the onnx package is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise MissingExtra("onnx", "train") from None
    return dtype_histogram(onnx.load(onnx_path, load_external_data=False))


def main_precision(weights: Counter[str]) -> str:
    """The precision of most weights."""
    return "fp16" if weights["FLOAT16"] > weights["FLOAT"] else "fp32"


def check_precision(plan: BuildPlan, information: str, size: int, weights: int) -> str:
    """Check that an engine has its plan's precision, and say by which evidence.

    Args:
        plan: with the precision asked for.
        information: JSON of the engine inspector, of an engine built with detailed profiling verbosity.
        size: bytes of the serialised engine.
        weights: floating-point weights of the graph.

    Returns:
        One phrase for the sidecar.

    Raises:
        EngineError: the engine has another precision, or nothing tells which it has.
    """
    counted, tensors = _dtype_histograms(information)
    if sum(counted.values()) >= weights / 2:
        return _judged(plan, counted, "weights in its layers")
    if weights >= _LARGE and "VERSION_COMPATIBLE" not in plan.flags:  # such a plan also holds a runtime
        per_weight = size / weights  # bytes: 2 and some kernels for fp16, 4 and more for fp32
        if (per_weight < 3) != (plan.precision == "fp16"):
            raise _wrong(plan, f"it takes {per_weight:.1f} bytes per weight")
        return f"{per_weight:.1f} bytes per weight"
    if tensors:
        return _judged(plan, tensors, "tensors between its layers")
    raise EngineError(
        f"the engine {plan.component} does not tell its precision (the inspector lists no layers); "
        "it was not kept; use --backend onnxruntime"
    )


def _judged(plan: BuildPlan, counts: Counter[str], what: str) -> str:
    share = counts["fp16"] / sum(counts.values())
    seen = f"{share:.0%} of {sum(counts.values())} {what} are fp16"
    if (share >= 0.5) != (plan.precision == "fp16"):
        raise _wrong(plan, seen)
    return f"inspector: {seen}"


def _wrong(plan: BuildPlan, seen: str) -> EngineError:
    return EngineError(
        f"the engine {plan.component} was to be {plan.precision}, but {seen}; it was not kept; "
        f"rebuild with --force, or ask for --precision {'fp32' if plan.precision == 'fp16' else 'fp16'}"
    )


def _dtype_histograms(information: str) -> tuple[Counter[str], Counter[str]]:
    """Precision -> number of weights, and of tensors, in what the inspector says of the layers.

    8 and 10 name a tensor's type in "Format/Datatype", 11 in "DataType"; weights have "Type" and "Count".
    """
    weights: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for node in _objects(_layers(information)):
        if isinstance(node.get("Count"), int) and (precision := _precision(node.get("Type"))):
            weights[precision] += node["Count"]
        for name, value in node.items():
            if name.lower().endswith("datatype") and (precision := _precision(value)):
                tensors[precision] += 1
    return weights, tensors


def _layers(information: str) -> Any:
    try:
        return json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        return []


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _objects(child)


def _precision(text: object) -> str:
    if not isinstance(text, str):
        return ""
    return "fp16" if _HALF.search(text) else "fp32" if _SINGLE.search(text) else ""
