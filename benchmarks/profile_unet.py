"""`bench --engines --profile`: where the time of a UNet step goes, operator by operator.

ONNX Runtime's own profile of the graph that the sampling loop runs, beside what this machine reaches in a
matrix product.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.unet_step import UnetTask, matmul_gflops
from synthkit.engines.diffusion.denoiser import Denoiser
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.engines.runtime.session import OrtSession, open_session, session_options, usable_threads
from synthkit.errors import EngineError

_SHOWN = 0.01  # operators that take less of the time are added up in the table


@dataclass
class _Operator:
    """All nodes of one operator, in one step."""

    seconds: float = 0.0
    nodes: float = 0.0
    flop: float = 0.0


def profile_unet(
    engines_dir: Path, *, batch: int = 1, guidance: float = 2.0, runs: int = 3
) -> dict[str, Any]:
    """Time of a UNet step by operator, as the sampling loop runs it on the CPU.

    Where the loop draws a part of the batch per core, this is one such part on one core.

    Args:
        engines_dir: what `build_engines` wrote.
        batch: images; guidance doubles them where the graph does.
        guidance: guidance scale.
        runs: steps that count; one more comes before them.

    Returns:
        JSON data: `images`, `threads`, `step_ms`, `matmul_gflops`, and `operators`, the slowest first, each
        with `ms` and `nodes` per step, `share` of the time, `gflop` as the graph computes it (after all
        rewriting), and `of_peak`, None where an operator multiplies no matrices.

    Raises:
        EngineError: the engines cannot be used, or do not run on the CPU.
    """
    pipeline = EnginePipeline.open(engines_dir)
    if pipeline.provider != "cpu":
        raise EngineError(f"--profile is for the CPU, these engines run on {pipeline.provider}; leave it out")
    threads = 1 if pipeline.workers > 1 else usable_threads()
    task = UnetTask.random(engines_dir, -(-batch // pipeline.workers), guidance)
    pipeline.close()
    operators = _summed(_kernels(_run(engines_dir / "unet" / "model.onnx", task, threads, runs)), runs)
    peak, whole = matmul_gflops(threads), sum(one.seconds for one in operators.values())
    return {
        "images": len(task.latents),
        "threads": threads,
        "step_ms": round(1000 * whole, 3),
        "matmul_gflops": round(peak, 1),
        "operators": [
            {
                "operator": name,
                "ms": round(1000 * one.seconds, 3),
                "nodes": round(one.nodes),
                "share": round(one.seconds / whole, 4),
                "gflop": round(one.flop / 1e9, 3),
                "of_peak": round(one.flop / 1e9 / one.seconds / peak, 4) if one.flop else None,
            }
            for name, one in sorted(operators.items(), key=lambda item: -item[1].seconds)
        ],
    }


def as_text(profile: Mapping[str, Any]) -> str:
    """The profile as a table."""
    lines = [
        f"by operator: a UNet step of {profile['images']} images, threads: {profile['threads']}; of peak: "
        f"against a matrix product's {profile['matmul_gflops']:.0f} GFLOP/s",
        "",
        f"{'':22}{'nodes':>7}{'time':>12}{'share':>8}{'GFLOP':>10}{'of peak':>9}",
    ]
    shown = [one for one in profile["operators"] if one["share"] >= _SHOWN]
    if rest := [one for one in profile["operators"] if one["share"] < _SHOWN]:
        sums = {name: sum(one[name] for one in rest) for name in ("nodes", "ms", "share")}
        shown.append({"operator": f"{len(rest)} others", "of_peak": None, **sums})
    for one in shown:
        work = f"{one['gflop']:>10.1f}{one['of_peak']:>9.0%}" if one["of_peak"] else ""
        lines.append(f"{one['operator']:22}{one['nodes']:>7}{one['ms']:>9.1f} ms{one['share']:>8.1%}{work}")
    return "\n".join(lines)


def _run(path: Path, task: UnetTask, threads: int, runs: int) -> list[dict[str, Any]]:
    """The events of ONNX Runtime's profile; its format is that of Chrome's tracing."""
    import onnxruntime
    import torch

    from synthkit.engines.diffusion.denoising_graph import loop_graphs

    graphs = loop_graphs(path, guided=task.guidance > 1)
    prelude = open_session(graphs.prelude.SerializeToString(), "cpu", path.parent, threads)
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(path.parent, threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "unet")
        content = graphs.step.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        denoiser = Denoiser(OrtSession(session, "cpu", "the UNet"), task.guidance > 1, prelude)
        step = denoiser.bind(task.texts, task.latents.shape, task.guidance)
        for _ in range(runs + 1):
            step(torch.from_numpy(task.latents), task.timestep)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def _kernels(events: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The events of nodes, without those of the first step, which warms up."""
    events = list(events)
    first = min((one for one in events if one["name"] == "model_run"), key=lambda one: one["ts"])
    for one in events:
        is_kernel = one.get("cat") == "Node" and one["name"].endswith("_kernel_time")
        if is_kernel and one["ts"] >= first["ts"] + first["dur"]:
            yield one


def _summed(kernels: Iterable[Mapping[str, Any]], runs: int) -> dict[str, _Operator]:
    """Operator -> its nodes added up, of one step."""
    found: dict[str, _Operator] = defaultdict(_Operator)
    for one in kernels:
        operator = found[one["args"]["op_name"]]
        operator.seconds += one["dur"] / 1e6 / runs
        operator.nodes += 1 / runs
        operator.flop += _flop(one["args"]) / runs
    return dict(found)


def _flop(node: Mapping[str, Any]) -> float:
    """Multiplications and additions of a matrix product or a convolution; 0 of everything else."""
    inputs, outputs = (_shapes(node[f"{side}_type_shape"]) for side in ("input", "output"))
    if node["op_name"] in ("MatMul", "FusedMatMul", "Gemm"):
        summed = math.prod(inputs[0]) / math.prod(outputs[0][:-1])  # weights may be packed and not listed
    elif node["op_name"] in ("Conv", "FusedConv") and len(inputs[1]) == len(inputs[0]):
        summed = math.prod(inputs[1][1:])
    else:
        return 0.0
    return 2.0 * math.prod(outputs[0]) * summed


def _shapes(tensors: Iterable[Mapping[str, list[int]]]) -> list[list[int]]:
    """Shapes of tensors that the profile gives as {type: shape}."""
    return [next(iter(one.values())) for one in tensors]
