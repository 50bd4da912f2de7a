"""One UNet step beside diffusers and bare ONNX Runtime, and its time by operator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import unet_step
from benchmarks.unet_step import UnetTask, main
from synthkit.errors import ParityError

pytest.importorskip("onnx")
pytest.importorskip("diffusers")


@pytest.mark.slow
def test_every_contender_computes_the_same_and_operators_add_up(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The small UNet then samples in two parts.
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(unet_step, "matmul_gflops", lambda threads: 60.0)
    words = ["--batch", "4", "--runs", "2", "--profile", "--out", str(tmp_path / "step.json")]
    called = CliRunner().invoke(main, [str(tiny_engines), *words], catch_exceptions=False)
    assert called.exit_code == 0, called.output
    result = json.loads((tmp_path / "step.json").read_text("utf-8"))
    assert (result["unet_rows"], result["latents"], result["threads"]) == (8, [4, 4, 4], 2)
    assert [row["name"] for row in result["rows"]] == ["diffusers, eager", "ONNX Runtime", "synthkit"]
    assert [row["max_difference"] > 0 for row in result["rows"]] == [False, True, True]
    assert result["tolerance"] == pytest.approx(3e-4)
    profile = result["profile"]
    assert (profile["images"], profile["threads"]) == (2, 1), "one of the two parts, on one core"
    rows = {row["operator"]: row for row in profile["operators"]}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.01)
    assert rows["Conv"]["of_peak"] > 0 and rows["Reshape"]["of_peak"] is None
    assert "synthkit" in called.stdout and "by operator" in called.stdout


@pytest.mark.slow
def test_work_is_counted_as_torch_does_it(tiny_model: Path, tiny_engines: Path) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from synthkit.engines.diffusion.parity import call_unet, source_unet

    task = UnetTask.random(tiny_engines, 2, 2.0)
    inputs = {name: torch.from_numpy(value) for name, value in task.plain_feeds().items()}
    # torch does not count its fused attention on the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call_unet(source_unet(tiny_model), inputs)
    assert unet_step._count_gflop(task, tiny_model) == pytest.approx(counter.get_total_flops() / 1e9)


def test_figures_of_a_contender_follow_from_its_times() -> None:
    output = np.array([4.0, -8.0], np.float32)
    timed = {
        "diffusers, eager": (output, [3.0, 9.0, 4.0]),
        "ONNX Runtime": (output + np.float32(0.5), [1.0, 0.5, 1.5]),
        "synthkit": (output, [2.0, 2.0, 7.0]),
    }
    rows = unet_step._rows(timed, seconds_at_peak=0.5, allowed=0.1)
    assert [row.unet_step_ms for row in rows] == [4000, 1000, 2000]
    assert [row.of_peak for row in rows] == [0.125, 0.5, 0.25]
    assert [row.speedup for row in rows] == [2, 0.5, 1], "above 1 where synthkit is the faster one"
    assert [row.max_difference for row in rows] == [0, 0.0625, 0]
    with pytest.raises(ParityError, match=r"ONNX Runtime computes something else than diffusers: .*--force"):
        unet_step._rows(timed, seconds_at_peak=0.5, allowed=0.06)


@pytest.mark.parametrize(
    ("operator", "inputs", "output", "flop"),
    [
        ("Conv", [[2, 8, 5, 5], [16, 4, 3, 3], [16]], [2, 16, 5, 5], 2 * 800 * 4 * 9),  # two groups
        ("MatMul", [[3, 7, 5], [5, 11]], [3, 7, 11], 2 * 3 * 7 * 11 * 5),
        ("MatMul", [[3, 7, 5]], [3, 7, 11], 2 * 3 * 7 * 11 * 5),  # weights packed
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
    assert unet_step._flop(node) == flop
