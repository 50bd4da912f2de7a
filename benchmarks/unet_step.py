"""Time of one UNet call beside diffusers and bare ONNX Runtime, and by operator.

    python -m benchmarks.unet_step ENGINES [--batch 1] [--guidance 2] [--profile]

For models with which a whole batch would take too long. The contenders run one after the other, so that only
one is in memory; the first call of each warms up and does not count. Their outputs are compared. `--profile`
adds ONNX Runtime's own profile of the denoising graph, on the CPU.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from synthkit.artifacts import versions, write_json
from synthkit.engines.diffusion.denoiser import Denoiser
from synthkit.engines.diffusion.engines_folder import base_model, existing_engines
from synthkit.engines.diffusion.export import quiet
from synthkit.engines.diffusion.parity import TOLERANCE, call_unet, random_feeds, source_unet
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.engines.runtime.component_spec import component_specs, read_geometry
from synthkit.engines.runtime.session import (
    OrtSession,
    open_session,
    session_options,
    settled_provider,
    usable_threads,
)
from synthkit.errors import EngineError, ParityError
from synthkit.models.generator import resolve_model
from synthkit.one_line import OneLineErrors

#: Side of the matrices of the reference product: 17 GFLOP, and larger than the caches.
_MATRIX = 2048
#: Operators with a smaller share of the time are added up in the table.
_SHOWN = 0.01

Step = Callable[[], np.ndarray]
"""One call of the UNet with guidance applied: float32 [images, channels, side, side]."""


@dataclass(frozen=True)
class UnetTask:
    """The input of one UNet call, the same for every contender.

    Attributes:
        latents: float32 [images, channels, side, side].
        timestep: of all of them.
        texts: further inputs of the UNet, a row per image; under guidance two, the unconditional ones first.
        guidance: the guidance scale.
    """

    latents: np.ndarray
    timestep: float
    texts: dict[str, np.ndarray]
    guidance: float

    @classmethod
    def random(cls, engines_dir: Path, images: int, guidance: float) -> UnetTask:
        """Random latents and texts for the UNet of an engines folder."""
        geometry = read_geometry(engines_dir)
        spec = next(spec for spec in component_specs(geometry) if spec.component == "unet")
        feeds = random_feeds(spec, geometry, images * (2 if guidance > 1 else 1))
        latents, timestep = feeds.pop("sample")[:images], feeds.pop("timestep")
        return cls(latents, float(timestep), feeds, guidance)

    @property
    def rows(self) -> int:
        """Batch of the plain UNet: doubled under guidance."""
        return len(self.latents) * (2 if self.guidance > 1 else 1)

    def plain_feeds(self) -> dict[str, np.ndarray]:
        """Inputs of the UNet as diffusers calls it."""
        sample = np.concatenate([self.latents] * (self.rows // len(self.latents)))
        return {"sample": sample, "timestep": np.asarray(self.timestep, np.float32), **self.texts}

    def guided(self, output: np.ndarray) -> np.ndarray:
        """The plain UNet's output with guidance applied."""
        if self.guidance <= 1:
            return output
        without, within = np.split(output, 2)
        return np.asarray(without + np.float32(self.guidance) * (within - without))

    def subset(self, rows: np.ndarray) -> UnetTask:
        """The task of some of the images.

        Args:
            rows: their positions.
        """
        both = np.concatenate([rows + start for start in range(0, self.rows, len(self.latents))])
        texts = {name: value[both] for name, value in self.texts.items()}
        return UnetTask(self.latents[rows], self.timestep, texts, self.guidance)


@dataclass(frozen=True)
class StepRow:
    """One contender's figures.

    Attributes:
        name: the contender.
        unet_step_ms: median time of a call.
        of_peak: the plain UNet's work in that time against the speed of a matrix product.
        speedup: of synthkit over the contender.
        seconds: of every call that counts.
        max_difference: from diffusers, as a fraction of the largest value.
    """

    name: str
    unet_step_ms: float
    of_peak: float
    speedup: float
    seconds: tuple[float, ...]
    max_difference: float


@dataclass(frozen=True)
class StepResult:
    """Times of one UNet call.

    Attributes:
        engines: name of the engines folder.
        provider: of ONNX Runtime.
        batch: images.
        unet_rows: batch of the plain UNet, doubled under guidance.
        latents: (channels, height, width) of an image's latents.
        guidance: guidance scale.
        runs: calls that count.
        threads: threads of a contender.
        versions: of the libraries.
        tolerance: largest `max_difference` that is allowed.
        gflop: work of the plain UNet.
        matmul_gflops: GFLOP/s that this machine reaches in a matrix product.
        rows: one per contender.
    """

    engines: str
    provider: str
    batch: int
    unet_rows: int
    latents: tuple[int, ...]
    guidance: float
    runs: int
    threads: int
    versions: dict[str, str]
    tolerance: float
    gflop: float
    matmul_gflops: float
    rows: tuple[StepRow, ...]

    def as_text(self) -> str:
        """The result as a table."""
        shape = "x".join(map(str, self.latents))
        lines = [
            f"one UNet step of {self.batch} images at guidance {self.guidance:g} (batch {self.unet_rows} of "
            f"{shape}, {self.gflop:.0f} GFLOP), {self.threads} threads; medians of {self.runs}",
            f"of peak: the plain UNet's work against a matrix product's {self.matmul_gflops:.0f} GFLOP/s",
            "",
            f"{'':22}{'UNet step':>12}{'of peak':>10}{'synthkit is':>13}",
        ]
        for row in self.rows:
            lines.append(
                f"{row.name:22}{row.unet_step_ms:>9.1f} ms{row.of_peak:>10.0%}{row.speedup:>11.2f} x"
            )
        return "\n".join(lines)


def measure_step(engines_dir: Path, *, batch: int = 1, guidance: float = 2.0, runs: int = 3) -> StepResult:
    """Time one UNet step of every contender on random inputs.

    Args:
        engines_dir: folder from `build-engines`.
        batch: images; guidance doubles them.
        guidance: guidance scale.
        runs: calls that count.

    Raises:
        EngineError: the engines cannot be used.
        ModelError: the model from which they were built is gone.
        ParityError: a contender computes something else.
    """
    model_dir = resolve_model(base_model(existing_engines(engines_dir)), download=False)
    path = engines_dir / "unet" / "model.onnx"
    provider, task = settled_provider(path, "auto"), UnetTask.random(engines_dir, batch, guidance)
    with quiet():
        gflop = _count_gflop(task, model_dir)
        steps = {
            "diffusers, eager": partial(_diffusers, task, model_dir, provider),
            "ONNX Runtime": partial(_bare, task, path, provider),
            "synthkit": partial(_synthkit, task, engines_dir),
        }
        timed = {name: _time(make, runs) for name, make in steps.items()}
    allowed, peak = _tolerance(path, guidance), round(matmul_gflops(usable_threads()), 1)
    return StepResult(
        engines=engines_dir.name,
        provider=provider,
        batch=batch,
        unet_rows=task.rows,
        latents=task.latents.shape[1:],
        guidance=guidance,
        runs=runs,
        threads=usable_threads(),
        versions=versions(),
        tolerance=allowed,
        gflop=round(gflop, 1),
        matmul_gflops=peak,
        rows=_rows(timed, gflop / peak, allowed),
    )


def matmul_gflops(threads: int, rounds: int = 5) -> float:
    """GFLOP/s of torch in the product of two float32 matrices, the best of `rounds`.

    Args:
        threads: threads of torch.
        rounds: products that count; one more warms up.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = torch.rand(_MATRIX, _MATRIX), torch.rand(_MATRIX, _MATRIX)
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * _MATRIX**3 / min(seconds[1:]) / 1e9


def _time(make: Callable[[], Step], runs: int) -> tuple[np.ndarray, list[float]]:
    """Output, and seconds of every call that counts; frees the network."""
    step = make()
    output, seconds = step(), []
    for _ in range(runs):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    del step
    gc.collect()
    return output, seconds


def _rows(
    timed: Mapping[str, tuple[np.ndarray, list[float]]], seconds_at_peak: float, allowed: float
) -> tuple[StepRow, ...]:
    medians = {name: statistics.median(seconds) for name, (_, seconds) in timed.items()}
    wanted, rows = next(iter(timed.values()))[0], []
    for name, (output, seconds) in timed.items():
        difference = float(np.abs(output - wanted).max() / np.abs(wanted).max())
        if not difference <= allowed:  # NaN too
            raise ParityError(
                f"{name} computes something else than diffusers: it differs by {difference:.3g} of the "
                f"largest value, allowed is {allowed:.3g}; rebuild the engines with --force"
            )
        rows.append(
            StepRow(
                name=name,
                unet_step_ms=round(1000 * medians[name], 3),
                of_peak=round(seconds_at_peak / medians[name], 4),
                speedup=round(medians[name] / medians["synthkit"], 3),
                seconds=tuple(round(value, 4) for value in seconds),
                max_difference=difference,
            )
        )
    return tuple(rows)


def _tolerance(path: Path, guidance: float) -> float:
    """The parity check's, enlarged by guidance: (1 - g) a + g b errs by up to 2g - 1 times as much."""
    from synthkit.engines.tensorrt.precision_check import graph_weights, main_precision

    return TOLERANCE[main_precision(graph_weights(path))] * max(1.0, 2 * guidance - 1)


def _count_gflop(task: UnetTask, model_dir: Path) -> float:
    """Multiplications and additions of the plain UNet, counted on shapes alone."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(model_dir / "unet")))
    inputs = {name: torch.from_numpy(value).to("meta") for name, value in task.plain_feeds().items()}
    with FlopCounterMode(display=False) as counter:
        call_unet(unet, inputs)
    return float(counter.get_total_flops()) / 1e9


def _diffusers(task: UnetTask, model_dir: Path, provider: str) -> Step:
    import torch

    on_gpu = provider != "cpu" and torch.cuda.is_available()
    device, kind = ("cuda", torch.float16) if on_gpu else ("cpu", torch.float32)
    unet = source_unet(model_dir).to(device, kind)
    inputs = {name: torch.from_numpy(value).to(device, kind) for name, value in task.plain_feeds().items()}

    def step() -> np.ndarray:
        with torch.inference_mode():
            return task.guided(call_unet(unet, inputs).float().cpu().numpy())

    return step


def _bare(task: UnetTask, path: Path, provider: str) -> Step:
    session = open_session(path, provider)
    plain = task.plain_feeds()
    feeds = {spec.name: plain[spec.name].astype(spec.dtype, copy=False) for spec in session.inputs}
    return lambda: task.guided(session.run(feeds)["out_sample"].astype(np.float32, copy=False))


def _synthkit(task: UnetTask, engines_dir: Path) -> Step:
    """As the sampling loop calls it; a small UNet gets a part of the batch per core."""
    import torch

    pipeline = EnginePipeline.open(engines_dir)
    denoiser, images = pipeline.prepare(task.guidance), len(task.latents)
    parts = [task.subset(rows) for rows in np.array_split(np.arange(images), min(images, pipeline.workers))]
    bound = [
        (denoiser.bind(part.texts, part.latents.shape, part.guidance), torch.from_numpy(part.latents))
        for part in parts
    ]
    pool = ThreadPoolExecutor(len(parts))

    def step() -> np.ndarray:
        answers = pool.map(lambda pair: pair[0](pair[1], task.timestep).cpu().numpy(), bound)
        return np.concatenate(list(answers))

    return step


@dataclass(frozen=True)
class OperatorRow:
    """All nodes of one operator in one step.

    Attributes:
        operator: ONNX operator.
        ms: time per step.
        nodes: nodes per step.
        share: of the time of the step.
        gflop: work as the graph computes it, after all rewriting.
        of_peak: against the speed of a matrix product; None where the operator multiplies no matrices.
    """

    operator: str
    ms: float
    nodes: int
    share: float
    gflop: float
    of_peak: float | None


@dataclass(frozen=True)
class Profile:
    """Time of a UNet step by operator.

    Attributes:
        images: images of the step.
        threads: threads of the session.
        step_ms: time of the step.
        matmul_gflops: GFLOP/s that this machine reaches in a matrix product with as many threads.
        operators: the slowest first.
    """

    images: int
    threads: int
    step_ms: float
    matmul_gflops: float
    operators: tuple[OperatorRow, ...]

    def as_text(self) -> str:
        """The profile as a table."""
        lines = [
            f"by operator: a UNet step of {self.images} images, threads: {self.threads}; of peak: "
            f"against a matrix product's {self.matmul_gflops:.0f} GFLOP/s",
            "",
            f"{'':22}{'nodes':>7}{'time':>12}{'share':>8}{'GFLOP':>10}{'of peak':>9}",
        ]
        shown = [row for row in self.operators if row.share >= _SHOWN]
        if rest := [row for row in self.operators if row.share < _SHOWN]:
            nodes, ms, share = (
                sum(column) for column in zip(*((r.nodes, r.ms, r.share) for r in rest), strict=True)
            )
            shown.append(OperatorRow(f"{len(rest)} others", ms, int(nodes), share, 0.0, None))
        for row in shown:
            work = f"{row.gflop:>10.1f}{row.of_peak:>9.0%}" if row.of_peak else ""
            lines.append(f"{row.operator:22}{row.nodes:>7}{row.ms:>9.1f} ms{row.share:>8.1%}{work}")
        return "\n".join(lines)


@dataclass
class _Sum:
    """Nodes of an operator, added up over one step."""

    seconds: float = 0.0
    nodes: float = 0.0
    flop: float = 0.0


def profile_step(engines_dir: Path, *, batch: int = 1, guidance: float = 2.0, runs: int = 3) -> Profile:
    """Profile a UNet step as the sampling loop runs it on the CPU.

    Where the loop samples a part of the batch per core, this is one such part on one core.

    Args:
        engines_dir: folder from `build-engines`.
        batch: images; guidance doubles them where the graph does.
        guidance: guidance scale.
        runs: steps that count; one more comes before them.

    Raises:
        EngineError: the engines cannot be used, or do not run on the CPU.
    """
    pipeline = EnginePipeline.open(engines_dir)
    if pipeline.provider != "cpu":
        raise EngineError(f"--profile is for the CPU, these engines run on {pipeline.provider}; leave it out")
    threads = 1 if pipeline.workers > 1 else usable_threads()
    task = UnetTask.random(engines_dir, -(-batch // pipeline.workers), guidance)
    pipeline.close()
    events = _profiled_run(engines_dir / "unet" / "model.onnx", task, threads, runs)
    sums = _summed(_kernels(events), runs)
    peak, whole = matmul_gflops(threads), sum(found.seconds for found in sums.values())
    return Profile(
        images=len(task.latents),
        threads=threads,
        step_ms=round(1000 * whole, 3),
        matmul_gflops=round(peak, 1),
        operators=tuple(
            OperatorRow(
                operator=name,
                ms=round(1000 * found.seconds, 3),
                nodes=round(found.nodes),
                share=round(found.seconds / whole, 4),
                gflop=round(found.flop / 1e9, 3),
                of_peak=round(found.flop / 1e9 / found.seconds / peak, 4) if found.flop else None,
            )
            for name, found in sorted(sums.items(), key=lambda item: -item[1].seconds)
        ),
    )


def _profiled_run(path: Path, task: UnetTask, threads: int, runs: int) -> list[dict[str, Any]]:
    """Events of ONNX Runtime's profile, in the format of Chrome's tracing."""
    import onnxruntime
    import torch

    from synthkit.engines.diffusion.denoising_graph import split_unet

    graphs = split_unet(path, guided=task.guidance > 1)
    conditioning = open_session(graphs.conditioning.SerializeToString(), "cpu", path.parent, threads)
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(path.parent, threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "unet")
        content = graphs.denoising.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        denoiser = Denoiser(OrtSession(session, "cpu", "the UNet"), task.guidance > 1, conditioning)
        predict = denoiser.bind(task.texts, task.latents.shape, task.guidance)
        for _ in range(runs + 1):
            predict(torch.from_numpy(task.latents), task.timestep)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def _kernels(events: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Events of nodes, without those of the first step, which warms up."""
    events = list(events)
    first = min((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    for event in events:
        is_kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if is_kernel and event["ts"] >= first["ts"] + first["dur"]:
            yield event


def _summed(kernels: Iterable[Mapping[str, Any]], runs: int) -> dict[str, _Sum]:
    """Operator -> its nodes added up over one step."""
    sums: dict[str, _Sum] = defaultdict(_Sum)
    for event in kernels:
        operator = sums[event["args"]["op_name"]]
        operator.seconds += event["dur"] / 1e6 / runs
        operator.nodes += 1 / runs
        operator.flop += _flop(event["args"]) / runs
    return dict(sums)


def _flop(node: Mapping[str, Any]) -> float:
    """Multiplications and additions of a matrix product or a convolution; 0 of everything else."""
    inputs, outputs = (_shapes(node[f"{side}_type_shape"]) for side in ("input", "output"))
    if node["op_name"] in ("MatMul", "FusedMatMul", "Gemm"):
        # Packed weights are not listed among the inputs, so the summed dimension comes from the left one.
        summed = math.prod(inputs[0]) / math.prod(outputs[0][:-1])
    elif node["op_name"] in ("Conv", "FusedConv") and len(inputs[1]) == len(inputs[0]):
        summed = math.prod(inputs[1][1:])
    else:
        return 0.0
    return 2.0 * math.prod(outputs[0]) * summed


def _shapes(tensors: Iterable[Mapping[str, list[int]]]) -> list[list[int]]:
    """Shapes of tensors that the profile gives as {type: shape}."""
    return [next(iter(tensor.values())) for tensor in tensors]


@click.command(cls=OneLineErrors)
@click.argument("engines", type=click.Path(path_type=Path))
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Images; guidance doubles them."
)
@click.option("--guidance", default=2.0, show_default=True, help="Guidance scale.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Calls that count.")
@click.option("--profile", is_flag=True, help="Time by operator too, on the CPU.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(engines: Path, batch: int, guidance: float, runs: int, profile: bool, out: Path | None) -> None:
    """Time one UNet step of ENGINES beside diffusers and bare ONNX Runtime."""
    measured = measure_step(engines, batch=batch, guidance=guidance, runs=runs)
    click.echo(measured.as_text())
    result = asdict(measured)
    if profile:
        profiled = profile_step(engines, batch=batch, guidance=guidance, runs=runs)
        click.echo("\n" + profiled.as_text())
        result["profile"] = asdict(profiled)
    if out:
        write_json(out, result)


if __name__ == "__main__":
    main()
