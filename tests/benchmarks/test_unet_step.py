"""One UNet step beside diffusers and bare ONNX Runtime, and its time by operator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks import profile_unet, unet_step
from benchmarks.unet_step import UnetTask, bench_unet_step
from synthkit.cli import main
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.errors import ConfigError, EngineError, ParityError

onnx = pytest.importorskip("onnx")
pytest.importorskip("diffusers")


@pytest.mark.parametrize(("images", "guidance", "rows"), [(3, 2.0, 6), (2, 1.0, 2)])
def test_every_contender_computes_the_same_and_is_timed(
    tiny_engines: Path, monkeypatch: pytest.MonkeyPatch, images: int, guidance: float, rows: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the small UNet then draws in two parts
    monkeypatch.setattr(unet_step, "_count_gflop", lambda task, model_dir: 3.0)
    monkeypatch.setattr(unet_step, "matmul_gflops", lambda threads: 60.0)
    result = bench_unet_step(tiny_engines, batch=images, guidance=guidance, runs=2)
    assert json.loads(json.dumps(result)) == result
    assert (result["unet_rows"], result["latents"], result["threads"]) == (rows, [4, 4, 4], 2)
    assert [row["name"] for row in result["rows"]] == ["diffusers, eager", "ONNX Runtime", "synthkit"]
    assert [row["max_difference"] > 0 for row in result["rows"]] == [False, True, True]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and row["max_difference"] <= result["tolerance"]
        assert row["of_peak"] == pytest.approx(0.05 / (row["unet_step_ms"] / 1000), rel=0.01)
    assert (result["gflop"], result["matmul_gflops"], result["rows"][-1]["speedup"]) == (3.0, 60.0, 1)
    assert result["tolerance"] == pytest.approx(1e-4 * (3 if guidance > 1 else 1))
    assert unet_step.as_text(result).splitlines()[-1].startswith("synthkit")


def test_figures_of_a_contender_follow_from_its_times() -> None:
    output = np.array([4.0, -8.0], np.float32)
    taken = {
        "diffusers, eager": (output, [3.0, 9.0, 4.0]),
        "ONNX Runtime": (output + np.float32(0.5), [1.0, 0.5, 1.5]),
        "synthkit": (output, [2.0, 2.0, 7.0]),
    }
    rows = unet_step._rows(taken, at_peak=0.5, allowed=0.1)
    assert [row["unet_step_ms"] for row in rows] == [4000, 1000, 2000]
    assert [row["of_peak"] for row in rows] == [0.125, 0.5, 0.25]
    assert [row["speedup"] for row in rows] == [2, 0.5, 1], "above 1 where synthkit is the faster one"
    assert [row["max_difference"] for row in rows] == [0, 0.0625, 0]


def test_work_is_counted_as_torch_does_it(tiny_model: Path, tiny_engines: Path) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from synthkit.engines.diffusion.parity import call_unet, source_unet

    task = UnetTask.random(tiny_engines, 2, 2.0)
    unet, counted = source_unet(tiny_model), unet_step._count_gflop(task, tiny_model)
    inputs = {name: torch.from_numpy(value) for name, value in task.plain_feeds().items()}
    # torch does not count its fused attention on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call_unet(unet, inputs)
    assert counted == pytest.approx(counter.get_total_flops() / 1e9) and counted > 0
    assert unet_step._count_gflop(UnetTask.random(tiny_engines, 1, 1.0), tiny_model) == counted / 4


@pytest.mark.parametrize("shift", [0.05, np.nan])
def test_a_contender_that_computes_otherwise_is_refused(
    tiny_engines: Path, tmp_path: Path, shift: float
) -> None:
    shutil.copytree(tiny_engines, tmp_path / "engines")
    path = tmp_path / "engines" / "unet" / "model.onnx"
    model = onnx.load(path)
    bias = next(one for one in model.graph.initializer if one.name.endswith("conv_in.bias"))
    values = onnx.numpy_helper.to_array(bias) + np.float32(shift)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, path)
    with pytest.raises(ParityError, match=r"ONNX Runtime computes something else than diffusers: .*--force"):
        bench_unet_step(tmp_path / "engines", batch=1, guidance=2.0, runs=1)


def test_half_precision_has_its_own_tolerance(half_engines_path: Path) -> None:
    assert unet_step._tolerance(half_engines_path, 3.0) == pytest.approx(3e-2 * 5)


@pytest.fixture
def half_engines_path(tiny_engines: Path, tmp_path: Path) -> Path:
    """A graph whose weights are float16; what it computes does not matter."""
    weight = onnx.numpy_helper.from_array(np.zeros(4, np.float16), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_parts_of_a_task_hold_both_texts_of_their_images(tiny_engines: Path) -> None:
    task = UnetTask.random(tiny_engines, 3, 2.0)
    part = task.part(np.array([1, 2]))
    texts = task.texts["encoder_hidden_states"]
    assert np.array_equal(part.latents, task.latents[1:])
    assert np.array_equal(part.texts["encoder_hidden_states"], texts[[1, 2, 4, 5]])


def test_numbers_and_folders_that_cannot_be_used(tiny_engines: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch = 1 and runs = 0 must both be 1 or more"):
        bench_unet_step(tiny_engines, batch=1, runs=0)
    with pytest.raises(EngineError, match="no engines folder"):
        bench_unet_step(tmp_path / "absent")


def test_the_profile_covers_a_step(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from synthkit.engines.diffusion.denoising_graph import loop_graphs

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    profile = profile_unet.profile_unet(tiny_engines, batch=4, guidance=2.0, runs=2)
    assert json.loads(json.dumps(profile)) == profile
    assert (profile["images"], profile["threads"]) == (2, 1), "one of the two parts, on one core"
    rows = {one["operator"]: one for one in profile["operators"]}
    assert sum(one["share"] for one in rows.values()) == pytest.approx(1, abs=0.01)
    assert sum(one["ms"] for one in rows.values()) == pytest.approx(profile["step_ms"], rel=0.05)
    times = [one["ms"] for one in profile["operators"]]
    assert times == sorted(times, reverse=True)
    graph = loop_graphs(tiny_engines / "unet" / "model.onnx", True).step.graph
    assert rows["Conv"]["nodes"] == sum(node.op_type == "Conv" for node in graph.node)
    assert rows["Conv"]["of_peak"] > 0 and rows["Reshape"]["of_peak"] is None


def test_the_profile_s_table_adds_up_what_is_small() -> None:
    rows = [
        {"operator": "Conv", "ms": 9.0, "nodes": 2, "share": 0.9, "gflop": 1.5, "of_peak": 0.5},
        *(
            {"operator": name, "ms": 0.4, "nodes": 3, "share": 0.004, "gflop": 0.0, "of_peak": None}
            for name in ("Add", "Mul")
        ),
    ]
    text = profile_unet.as_text({"images": 1, "threads": 2, "matmul_gflops": 80.0, "operators": rows})
    assert text.splitlines()[-2].split() == ["Conv", "2", "9.0", "ms", "90.0%", "1.5", "50%"]
    assert text.splitlines()[-1].split() == ["2", "others", "6", "0.8", "ms", "0.8%"]


@pytest.mark.parametrize(
    ("operator", "inputs", "output", "flop"),
    [
        ("Conv", [[2, 8, 5, 5], [16, 4, 3, 3], [16]], [2, 16, 5, 5], 2 * 800 * 4 * 9),  # two groups
        ("MatMul", [[3, 7, 5], [5, 11]], [3, 7, 11], 2 * 3 * 7 * 11 * 5),
        ("MatMul", [[3, 7, 5]], [3, 7, 11], 2 * 3 * 7 * 11 * 5),  # weights packed
        ("FusedMatMul", [[2, 4, 7, 5], [2, 4, 9, 5]], [2, 4, 7, 9], 2 * 8 * 7 * 9 * 5),
        ("Gemm", [[7, 5], [11]], [7, 11], 2 * 7 * 11 * 5),
        ("Add", [[7, 5], [7, 5]], [7, 5], 0),
    ],
)
def test_work_of_a_node(operator: str, inputs: list[list[int]], output: list[int], flop: int) -> None:
    node = {
        "op_name": operator,
        "input_type_shape": [{"float": shape} for shape in inputs],
        "output_type_shape": [{"float": output}],
    }
    assert profile_unet._flop(node) == flop


def test_only_the_processor_is_profiled(tiny_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        provider = "cuda"

    monkeypatch.setattr(EnginePipeline, "open", lambda folder: OnGpu())
    with pytest.raises(EngineError, match="these engines run on cuda"):
        profile_unet.profile_unet(tiny_engines)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_the_command_joins_both(tiny_engines: Path) -> None:
    chosen = ("--engines", tiny_engines, "--unet-step", "--profile", "--batch", "1", "--runs", "1")
    answer = json.loads(call(*chosen, "--guidance", "1", "--json").stdout)
    assert answer["unet_rows"] == 1 and answer["profile"]["images"] == 1
    text = call(*chosen).stdout
    assert "one UNet step" in text and "by operator" in text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--engines", "e", "--unet-step", "--steps", "3"], "--steps and --unet-step exclude each other"),
        (["--bundle", "b", "--unet-step"], "--unet-step is for engines only"),
        (["--bundle", "b", "--profile"], "--profile is for engines only"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], problem: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 1 and problem in result.stderr and result.stderr.count("\n") == 1
