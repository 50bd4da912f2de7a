"""The key of a TensorRT plan, its files, and which machine may load them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from synthkit.artifacts import digest
from synthkit.engines.runtime.component_spec import BatchRange
from synthkit.engines.tensorrt.build_plan import BuildOptions, BuildPlan, decide_plan
from synthkit.engines.tensorrt.plan_cache import (
    Machine,
    fitting_plan,
    misfit,
    network_digest,
    plan_key,
    read_plan,
    read_sidecar,
    sidecar_path,
    this_machine,
    write_plan,
)
from synthkit.engines.tensorrt.timing_cache import timing_cache_path
from synthkit.errors import EngineError
from tests.engines.tensorrt.test_tensorrt_plan import BATCH, UNET

onnx = pytest.importorskip("onnx")

ORIN = Machine("Orin (nvgpu)", "8.7", "10.3.0.26", "Linux", "aarch64")


def network(folder: Path, weight: float = 1.0, opset: int = 17, bias: float = 0.0) -> Path:
    """A network's folder; the weight lies in a file of its own, the bias in the graph."""
    weights = onnx.numpy_helper.from_array(np.full((64, 64), weight, np.float32), "w")
    small = onnx.numpy_helper.from_array(np.full(1, bias, np.float32), "b")
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["batch", 64]) for name in "xy")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["p"]),
        onnx.helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [weights, small])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    folder.mkdir(parents=True)
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=64,
    )
    return folder


def plan(
    batch: BatchRange = BATCH, precision: str = "fp16", version: str = "10.3.0", **options: Any
) -> BuildPlan:
    return decide_plan(UNET, batch, precision, BuildOptions(**options), version)


def key(folder: Path, build: BuildPlan | None = None, machine: Machine = ORIN) -> str:
    return digest(plan_key(network_digest(folder), build or plan(), machine))


def test_external_weights_alone_change_the_key(tmp_path: Path) -> None:
    one, other = network(tmp_path / "1"), network(tmp_path / "2", weight=2.0)
    assert (one / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()
    assert key(one) != key(other)


def test_what_changes_the_key(tmp_path: Path) -> None:
    folder = network(tmp_path / "1")
    sized = replace(UNET, inputs=tuple(replace(one, shape=("batch", 4, 32, 32)) for one in UNET.inputs[:1]))
    keys = [
        key(folder),
        key(network(tmp_path / "bias", bias=1.0)),
        key(network(tmp_path / "opset", opset=18)),
        key(folder, plan(BatchRange(1, 8, 17))),
        key(folder, decide_plan(sized, BATCH, "fp16", BuildOptions(), "10.3.0")),
        key(folder, plan(precision="fp32")),
        key(folder, plan(refit=True)),
        key(folder, plan(level=4)),
        key(folder, plan(workspace=64)),
        key(folder, plan(hardware="ampere+")),
        key(folder, plan(version_compatible=True)),
        key(folder, machine=replace(ORIN, tensorrt="10.3.0.27")),
        key(folder, machine=replace(ORIN, capability="8.6")),
        key(folder, machine=replace(ORIN, gpu="another")),
        key(folder, machine=replace(ORIN, system="Windows")),
        key(folder, machine=replace(ORIN, architecture="x86_64")),
    ]
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_the_key(tmp_path: Path) -> None:
    folder = network(tmp_path / "1")
    before = key(folder)
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(folder, moved)
    os.utime(moved / "model.onnx", (1, 1))
    (moved / "config.json").write_text("{}")
    write_plan(moved, plan_key(network_digest(moved), plan(), ORIN), b"engine", {})
    logger = logging.getLogger("synthkit")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    assert key(moved) == before
    logger.setLevel(level)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    folder = network(tmp_path / "engines" / "unet")
    return write_plan(folder, plan_key(network_digest(folder), plan(), ORIN), b"engine", {"seconds": 2.5})


def test_names_and_sidecar(written: Path) -> None:
    assert written.name == f"orin-nvgpu_10.3.0.26_{key(written.parent)[:12]}.plan"
    sidecar = read_sidecar(written)
    assert (sidecar["seconds"], sidecar["bytes"]) == (2.5, 6)
    assert sidecar["key"] == plan_key(network_digest(written.parent), plan(), ORIN)
    assert fitting_plan(written.parent, ORIN) == written
    assert read_plan(written) == b"engine"


@pytest.mark.parametrize("position", [0, 3, 5])
def test_a_flipped_byte_is_noticed(written: Path, position: int) -> None:
    content = bytearray(written.read_bytes())
    content[position] ^= 1
    written.write_bytes(content)
    with pytest.raises(EngineError, match=r"SHA-256 differs.*synthkit build-engines --backend tensorrt"):
        read_plan(written)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = json.loads(sidecar_path(path).read_text())
        change(data)
        sidecar_path(path).write_text(json.dumps(data))

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: sidecar_path(plan).unlink(),
        lambda plan: sidecar_path(plan).write_text("{"),
        lambda plan: sidecar_path(plan).write_text("[]"),
        _edit(lambda data: data["key"].pop("machine")),
        _edit(lambda data: data["key"]["machine"].update(more=1)),
        _edit(lambda data: data["key"].update(schema=0)),
        _edit(lambda data: data.update(sha256=None)),
    ],
)
def test_a_broken_sidecar_is_one_line(written: Path, damage: Callable[[Path], None]) -> None:
    damage(written)
    with pytest.raises(EngineError, match=r"sidecar .* is missing or broken; rebuild it with") as caught:
        fitting_plan(written.parent, ORIN)
    assert "\n" not in str(caught.value)


def test_a_plan_that_is_gone(written: Path) -> None:
    written.unlink()
    with pytest.raises(EngineError, match=r"no TensorRT plan in .*; build it with"):
        fitting_plan(written.parent, ORIN)
    with pytest.raises(EngineError, match="cannot read the plan"):
        read_plan(written)
    (written.parent / "model.onnx").unlink()
    with pytest.raises(EngineError, match=r"no engine .*model\.onnx"):
        network_digest(written.parent)


def test_a_plan_of_other_weights_is_refused(written: Path) -> None:
    other = network(written.parent.parent / "other", weight=3.0)
    shutil.copy(other / "model.onnx_data", written.parent)
    with pytest.raises(EngineError, match=r"built of another model\.onnx; rebuild it with"):
        fitting_plan(written.parent, ORIN)


NEWER, NEXT, OLDER = (replace(ORIN, tensorrt=one) for one in ("10.16.1.11", "11.4.0.106", "10.0.1.6"))
SAME_KIND, AMPERE = replace(ORIN, gpu="Orin NX"), replace(ORIN, gpu="A100", capability="8.0")
TURING = replace(ORIN, gpu="T4", capability="7.5")


@pytest.mark.parametrize(
    ("options", "machine", "problem"),
    [
        ({}, ORIN, ""),
        ({}, NEWER, "by TensorRT 10.3.0.26, here is 10.16.1.11"),
        ({}, replace(ORIN, tensorrt="10.3.0.27"), "here is 10.3.0.27"),
        ({"version_compatible": True}, NEWER, ""),
        ({"version_compatible": True}, NEXT, ""),
        ({"version_compatible": True}, OLDER, "here is 10.0.1.6"),
        ({"version_compatible": True}, replace(ORIN, tensorrt="12.0.0.1"), "here is 12.0.0.1"),
        ({}, SAME_KIND, "for Orin (nvgpu) (compute capability 8.7), this is Orin NX (8.7)"),
        ({"hardware": "same-capability"}, SAME_KIND, ""),
        ({"hardware": "same-capability"}, AMPERE, "this is A100 (8.0)"),
        ({"hardware": "ampere+"}, AMPERE, ""),
        ({"hardware": "ampere+"}, TURING, "this is T4 (7.5)"),
        ({}, replace(ORIN, architecture="x86_64"), "on Linux aarch64, this is Linux x86_64"),
        ({}, replace(ORIN, system="Windows"), "this is Windows aarch64"),
    ],
)
def test_which_machine_may_load_a_plan(options: dict[str, Any], machine: Machine, problem: str) -> None:
    found = misfit(plan_key("n", plan(**options), ORIN), "n", machine)
    assert problem in found and bool(problem) == bool(found)
    assert "another model.onnx" in misfit(plan_key("n", plan(), ORIN), "m", ORIN)


def test_of_several_plans_the_fitting_one_is_taken(written: Path) -> None:
    folder = written.parent
    other = write_plan(folder, plan_key(network_digest(folder), plan(), AMPERE), b"other", {})
    assert fitting_plan(folder, ORIN) == written and fitting_plan(folder, AMPERE) == other
    with pytest.raises(EngineError, match=r"does not fit: .*this is T4 \(7.5\); rebuild it with"):
        fitting_plan(folder, TURING)


def test_this_machine_needs_torch_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="sees no GPU; install a torch built for"):
        this_machine("10.3.0")
    cuda = SimpleNamespace(
        is_available=lambda: True, get_device_name=lambda: "T4", get_device_capability=lambda: (7, 5)
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    machine = this_machine("10.3.0")
    assert (machine.gpu, machine.capability, machine.tensorrt) == ("T4", "7.5", "10.3.0")
    assert machine.label == "t4_10.3.0"
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(EngineError, match="torch, which is not installed"):
        this_machine("10.3.0")


def test_where_timings_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine("Stand-in GPU", "8.7", "10.3.0", "Linux", "aarch64")
    assert timing_cache_path(tmp_path, machine) == tmp_path / "stand-in-gpu_10.3.0_8.7.timing"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert timing_cache_path(None, machine).parent == tmp_path / "x" / "synthkit"
