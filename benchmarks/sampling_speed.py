"""Sampling speed beside diffusers and Optimum, on the same model.

    python -m benchmarks.sampling_speed ENGINES [--batch 64] [--steps 20] [--guidance 2]

Every pipeline samples the same batch from the same latents. They take turns, so that whatever else the
machine does falls on all of them; the first round warms up and does not count. Their images are compared
before anything is timed.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from synthkit.artifacts import versions, write_json
from synthkit.engines.diffusion.engines_folder import base_model, existing_engines
from synthkit.engines.diffusion.export import quiet
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.engines.runtime.session import usable_threads
from synthkit.errors import ParityError
from synthkit.models.generator import INDEX, resolve_model
from synthkit.one_line import OneLineErrors

PROMPT = "A digit seven photo"
#: Largest difference of a pixel, 0 to 1, by the type of the UNet's weights. synthkit rounds to 8 bits, 2e-3
#: of the range; fp32 sums in another order add 1e-5, the fp16 roundings of all steps some hundredths.
TOLERANCE = {"float32": 5e-3, "float16": 0.1}

#: Samples the batch once: float [n, height, width, 3], 0 to 1.
Sample = Callable[[], np.ndarray]


class _Clock:
    """Wraps a UNet and adds up the time in its calls; all other attributes are the UNet's."""

    def __init__(self, unet: Any, on_gpu: bool) -> None:
        self._unet, self._on_gpu = unet, on_gpu
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, *inputs: Any, **further: Any) -> Any:
        started = time.perf_counter()
        output = self._unet(*inputs, **further)
        if self._on_gpu:
            import torch

            # Calls return before the GPU has computed.
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        return output


@dataclass(frozen=True)
class Row:
    """One pipeline's figures, medians over the rounds.

    Attributes:
        name: the pipeline.
        images_per_second: of a whole batch.
        unet_step_ms: time of a UNet call.
        share_outside_unet: of the batch's time, 0..1.
        speedup: of synthkit over the pipeline.
        seconds: of every round that counts.
        max_difference: of a pixel, 0..1, from diffusers.
    """

    name: str
    images_per_second: float
    unet_step_ms: float
    share_outside_unet: float
    speedup: float
    seconds: tuple[float, ...]
    max_difference: float


@dataclass(frozen=True)
class Result:
    """Speed of every pipeline on one batch.

    Attributes:
        engines: name of the engines folder.
        model: diffusers' class of the pipeline.
        provider: of ONNX Runtime.
        batch: images per batch.
        steps: denoising steps.
        guidance: guidance scale.
        runs: rounds that count.
        threads: threads of a pipeline.
        device: processor or GPU.
        versions: of the libraries.
        tolerance: largest `max_difference` that is allowed.
        rows: one per pipeline, diffusers first and synthkit last.
    """

    engines: str
    model: str | None
    provider: str
    batch: int
    steps: int
    guidance: float
    runs: int
    threads: int
    device: str
    versions: dict[str, str]
    tolerance: float
    rows: tuple[Row, ...]

    def as_text(self) -> str:
        """The result as a table."""
        lines = [
            f"{self.batch} images at once, {self.steps} steps, guidance {self.guidance:g}, on {self.device} "
            f"with {self.threads} threads; medians of {self.runs} rounds in turns",
            "",
            f"{'':22}{'images/s':>10}{'UNet step':>12}{'outside UNet':>14}{'synthkit is':>13}",
        ]
        for row in self.rows:
            lines.append(
                f"{row.name:22}{row.images_per_second:>10.2f}{row.unet_step_ms:>9.1f} ms"
                f"{row.share_outside_unet:>13.1%}{row.speedup:>11.2f} x"
            )
        return "\n".join(lines)


@dataclass
class _Contender:
    """A pipeline, the clock of its UNet, and seconds per round: in all, and in the UNet.

    `workers` cores sample a part of the batch each; the UNet's time is then their mean.
    """

    name: str
    sample: Sample
    clock: _Clock
    workers: int = 1
    seconds: list[float] = field(default_factory=list)
    unet_seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        """Run one round."""
        self.clock.seconds = 0.0
        started = time.perf_counter()
        self.sample()
        self.seconds.append(time.perf_counter() - started)
        self.unet_seconds.append(self.clock.seconds / self.workers)

    def row(self, ours: _Contender, batch: int, steps: int, difference: float) -> Row:
        """The figures; the speedup is of `ours`."""
        whole, unet = statistics.median(self.seconds), statistics.median(self.unet_seconds)
        return Row(
            name=self.name,
            images_per_second=round(batch / whole, 3),
            unet_step_ms=round(1000 * unet / steps, 3),
            share_outside_unet=round(1 - unet / whole, 4),
            speedup=round(whole / statistics.median(ours.seconds), 3),
            seconds=tuple(round(value, 4) for value in self.seconds),
            max_difference=difference,
        )


def measure(
    engines_dir: Path, *, batch: int = 64, steps: int = 20, guidance: float = 2.0, runs: int = 3
) -> Result:
    """Images per second, time of a UNet step and share of time outside the UNet, of every pipeline.

    Args:
        engines_dir: folder from `build-engines`.
        batch: images per batch.
        steps: denoising steps.
        guidance: guidance scale.
        runs: rounds that count.

    Raises:
        EngineError: the engines cannot be used.
        ModelError: the model from which they were built is gone.
        ParityError: a pipeline samples something else.
    """
    model_dir = resolve_model(base_model(existing_engines(engines_dir)), download=False)
    with quiet(), _without_deprecations():
        ours = EnginePipeline.open(engines_dir)
        task = _Task(ours, batch, steps, guidance)
        contenders = _contenders(task, model_dir, engines_dir)
        differences = _compare([one.sample() for one in contenders], contenders, task.tolerance)
        for _ in range(runs):
            for contender in contenders:
                contender.time()
    return Result(
        engines=engines_dir.name,
        model=json.loads((engines_dir / INDEX).read_text(encoding="utf-8")).get("_class_name"),
        provider=ours.provider,
        batch=batch,
        steps=steps,
        guidance=guidance,
        runs=runs,
        threads=usable_threads(),
        device=_device(ours.provider),
        versions=versions(),
        tolerance=task.tolerance,
        rows=tuple(one.row(contenders[-1], batch, steps, differences[one.name]) for one in contenders),
    )


@dataclass
class _Task:
    """The batch that every pipeline samples."""

    ours: EnginePipeline
    batch: int
    steps: int
    guidance: float

    @property
    def seeds(self) -> list[int]:
        return list(range(self.batch))

    @property
    def prompts(self) -> list[str]:
        return [PROMPT] * self.batch

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.ours.prepare(self.guidance).precision]

    def of_pipeline(self, name: str, pipeline: Any, on_gpu: bool) -> _Contender:
        """A pipeline that has diffusers' interface."""
        import torch

        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet = clock = _Clock(pipeline.unet, on_gpu)
        noise = torch.from_numpy(self.ours.initial_latents(self.seeds))
        kind = getattr(clock, "dtype", torch.float32)

        def sample() -> np.ndarray:
            images: np.ndarray = pipeline(
                self.prompts,
                latents=noise.to(pipeline.device, kind),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in self.seeds],
                output_type="np",
            ).images
            return images

        return _Contender(name, sample, clock)

    def of_engines(self) -> _Contender:
        """Sampling as `generate` does it: the embedding of a class is computed once."""
        texts = self.ours.embed([PROMPT]).take([0] * self.batch)
        denoiser = self.ours.prepare(self.guidance)
        clock, bind = _Clock(None, False), denoiser.bind

        def bind_timed(*of_batch: Any) -> Callable[..., Any]:
            step = bind(*of_batch)

            def timed(*inputs: Any) -> Any:
                started = time.perf_counter()
                output = step(*inputs)
                clock.seconds += time.perf_counter() - started
                return output

            return timed

        vars(denoiser)["bind"] = bind_timed

        def sample() -> np.ndarray:
            images = self.ours.generate(texts, self.seeds, self.steps, self.guidance)
            return images.astype(np.float32) / 255

        return _Contender("synthkit", sample, clock, self.ours.workers)


def _contenders(task: _Task, model_dir: Path, engines_dir: Path) -> list[_Contender]:
    """Diffusers first, synthkit last."""
    import diffusers
    import torch

    on_gpu = task.ours.provider != "cpu" and torch.cuda.is_available()
    half = on_gpu and task.ours.prepare(task.guidance).precision == "float16"
    source = diffusers.DiffusionPipeline.from_pretrained(
        str(model_dir),
        torch_dtype=torch.float16 if half else torch.float32,
        use_safetensors=True,
        local_files_only=True,
    ).to("cuda" if on_gpu else "cpu")
    pipelines = []
    if on_gpu:
        # Before the eager pipeline's UNet gets its clock, which cannot be compiled.
        compiled = diffusers.DiffusionPipeline.from_pipe(source)
        compiled.unet = torch.compile(source.unet)
        pipelines.append(task.of_pipeline("diffusers, compiled", compiled, on_gpu))
    pipelines.insert(0, task.of_pipeline("diffusers, eager", source, on_gpu))
    pipelines.append(task.of_pipeline("Optimum", _optimum(engines_dir, task.ours.provider), on_gpu))
    return [*pipelines, task.of_engines()]


def _optimum(engines_dir: Path, provider: str) -> Any:
    import onnxruntime
    from optimum.onnxruntime import ORTDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_threads()
    options.log_severity_level = 3
    name = "CPUExecutionProvider" if provider == "cpu" else "CUDAExecutionProvider"
    return ORTDiffusionPipeline.from_pretrained(str(engines_dir), provider=name, session_options=options)


def _compare(images: list[np.ndarray], contenders: list[_Contender], allowed: float) -> dict[str, float]:
    differences = {
        contender.name: float(np.abs(batch - images[0]).max())
        for contender, batch in zip(contenders, images, strict=True)
    }
    for name, difference in differences.items():
        if not difference <= allowed:  # NaN too
            raise ParityError(
                f"{name} samples other images than diffusers: they differ by {difference:.3g}, allowed is "
                f"{allowed:g}; rebuild the engines with --force"
            )
    return differences


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Silence the deprecation warnings of diffusers and Optimum about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _device(provider: str) -> str:
    import torch

    if provider != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"the CPU ({platform.machine()})"


@click.command(cls=OneLineErrors)
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images per batch.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=2.0, show_default=True, help="Guidance scale.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds that count.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(engines: Path, batch: int, steps: int, guidance: float, runs: int, out: Path | None) -> None:
    """Time the sampling of ENGINES beside diffusers and Optimum."""
    measured = measure(engines, batch=batch, steps=steps, guidance=guidance, runs=runs)
    click.echo(measured.as_text())
    if out:
        write_json(out, asdict(measured))


if __name__ == "__main__":
    main()
