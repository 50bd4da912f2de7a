"""`bench --engines`: drawing speed beside diffusers and Optimum, in one run on the same model.

Every contender draws the same batch from the same latents, in turns, so that whatever else the machine does
falls on all of them; the first round warms up and does not count. What they draw is compared before anything
is timed.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import versions
from synthkit.engines.diffusion.engines_folder import base_model, existing_engines
from synthkit.engines.diffusion.export import quiet
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.engines.runtime.session import usable_threads
from synthkit.errors import ConfigError, ParityError
from synthkit.models import INDEX, resolve_model

PROMPT = "A digit seven photo"
TOLERANCE = {"float32": 5e-3, "float16": 0.1}
"""Largest difference of a pixel, 0 to 1, by the type of the UNet's weights. Ours are rounded to 8 bits, 2e-3
of the range; fp32 sums in another order add 1e-5, fp16 roundings of all steps some hundredths."""

Draw = Callable[[], np.ndarray]
"""Draws the batch once: float [n, height, width, 3], 0 to 1."""


class _Clock:
    """Stands for a UNet and adds up the time in its calls; everything else of it passes through."""

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

            torch.cuda.synchronize()  # calls return before the GPU has computed
        self.seconds += time.perf_counter() - started
        return output


@dataclass
class _Contender:
    """Who draws, its UNet's clock, and seconds per round: in all, and in the UNet.

    `at_once` cores draw a part each; the UNet's time is then their mean.
    """

    name: str
    draw: Draw
    clock: _Clock
    at_once: int = 1
    seconds: list[float] = field(default_factory=list)
    unet_seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        """One round."""
        self.clock.seconds = 0.0
        started = time.perf_counter()
        self.draw()
        self.seconds.append(time.perf_counter() - started)
        self.unet_seconds.append(self.clock.seconds / self.at_once)

    def row(self, last: _Contender, batch: int, steps: int, difference: float) -> dict[str, Any]:
        """The figures, as medians; `last` is who the speedup is of."""
        whole, unet = statistics.median(self.seconds), statistics.median(self.unet_seconds)
        return {
            "name": self.name,
            "images_per_second": round(batch / whole, 3),
            "unet_step_ms": round(1000 * unet / steps, 3),
            "share_outside_unet": round(1 - unet / whole, 4),
            "speedup": round(whole / statistics.median(last.seconds), 3),
            "seconds": [round(one, 4) for one in self.seconds],
            "max_difference": difference,
        }


def bench_engines(
    engines_dir: Path, *, batch: int = 64, steps: int = 20, guidance: float = 2.0, runs: int = 3
) -> dict[str, Any]:
    """Images per second, UNet step time and the share of time outside the UNet, of every contender.

    Args:
        engines_dir: what `build_engines` wrote.
        batch: images per batch.
        steps: denoising steps.
        guidance: guidance scale.
        runs: rounds that count.

    Returns:
        JSON data: `rows`, one per contender, with `images_per_second`, `unet_step_ms`, `share_outside_unet`,
        `max_difference` of a pixel from diffusers, and `speedup` of synthkit over it.

    Raises:
        ConfigError: a number is too small.
        EngineError: the engines cannot be used.
        ModelError: the model that they were made of is gone.
        ParityError: a contender draws something else.
    """
    if min(batch, steps, runs) < 1:
        raise ConfigError(f"batch = {batch}, steps = {steps} and runs = {runs} must all be 1 or more")
    model_dir = resolve_model(base_model(existing_engines(engines_dir)), download=False)
    with quiet(), _chatter():
        ours = EnginePipeline.open(engines_dir)
        task = _Task(ours, batch, steps, guidance)
        contenders = _contenders(task, model_dir, engines_dir)
        differences = _compare([one.draw() for one in contenders], contenders, task.tolerance)
        for _ in range(runs):
            for contender in contenders:
                contender.time()
    return {
        "engines": engines_dir.name,
        "model": json.loads((engines_dir / INDEX).read_text(encoding="utf-8")).get("_class_name"),
        "provider": ours.provider,
        "batch": batch,
        "steps": steps,
        "guidance": guidance,
        "runs": runs,
        "threads": usable_threads(),
        "device": _device(ours.provider),
        "versions": versions(),
        "tolerance": task.tolerance,
        "rows": [one.row(contenders[-1], batch, steps, differences[one.name]) for one in contenders],
    }


def as_text(result: dict[str, Any]) -> str:
    """The result as a table."""
    head = (
        f"{result['batch']} images at once, {result['steps']} steps, guidance {result['guidance']:g}, on "
        f"{result['device']} with {result['threads']} threads; medians of {result['runs']} rounds in turns"
    )
    lines = [head, "", f"{'':22}{'images/s':>10}{'UNet step':>12}{'outside UNet':>14}{'synthkit is':>13}"]
    for row in result["rows"]:
        lines.append(
            f"{row['name']:22}{row['images_per_second']:>10.2f}{row['unet_step_ms']:>9.1f} ms"
            f"{row['share_outside_unet']:>13.1%}{row['speedup']:>11.2f} x"
        )
    return "\n".join(lines)


@dataclass
class _Task:
    """What every contender draws."""

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

        def draw() -> np.ndarray:
            images: np.ndarray = pipeline(
                self.prompts,
                latents=noise.to(pipeline.device, kind),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in self.seeds],
                output_type="np",
            ).images
            return images

        return _Contender(name, draw, clock)

    def of_engines(self) -> _Contender:
        """Drawing as `generate` does: the embedding of a class is made once."""
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

        def draw() -> np.ndarray:
            drawn = self.ours.draw(texts, self.seeds, self.steps, self.guidance)
            return drawn.astype(np.float32) / 255

        return _Contender("synthkit", draw, clock, self.ours.workers)


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
    found = []
    if on_gpu:
        compiled = diffusers.DiffusionPipeline.from_pipe(source)
        compiled.unet = torch.compile(source.unet)
        found.append(task.of_pipeline("diffusers, compiled", compiled, on_gpu))
    found.insert(0, task.of_pipeline("diffusers, eager", source, on_gpu))
    found.append(task.of_pipeline("Optimum", _optimum(engines_dir, task.ours.provider), on_gpu))
    return [*found, task.of_engines()]


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
        one.name: float(np.abs(drawn - images[0]).max())
        for one, drawn in zip(contenders, images, strict=True)
    }
    for name, found in differences.items():
        if not found <= allowed:  # NaN too
            raise ParityError(
                f"{name} draws other images than diffusers: they differ by {found:.3g}, allowed is "
                f"{allowed:g}; rebuild the engines with --force"
            )
    return differences


@contextlib.contextmanager
def _chatter() -> Iterator[None]:
    """Without what diffusers and Optimum say of each other's deprecated ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _device(provider: str) -> str:
    import torch

    if provider != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"the CPU ({platform.machine()})"
