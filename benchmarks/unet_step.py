"""`bench --engines --unet-step`: one call of the UNet, beside diffusers and bare ONNX Runtime.

For models that are too large to draw whole batches with. The contenders come one after the other, so that one
alone is in memory; the first call of each warms up and does not count. What they answer is compared.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import versions
from synthkit.engines.diffusion.engines_folder import base_model, existing_engines
from synthkit.engines.diffusion.export import quiet
from synthkit.engines.diffusion.parity import TOLERANCE, call_unet, random_feeds, source_unet
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.engines.runtime.component_spec import component_specs, read_geometry
from synthkit.engines.runtime.session import open_session, settled_provider, usable_threads
from synthkit.errors import ConfigError, ParityError
from synthkit.models import resolve_model

_MATRIX = 2048  # side: 17 GFLOP in a product, and larger than the caches

Step = Callable[[], np.ndarray]
"""One call of the UNet with guidance applied: float32 [images, channels, side, side]."""


@dataclass(frozen=True)
class UnetTask:
    """What every contender computes.

    Attributes:
        latents: float32 [images, channels, side, side].
        timestep: of all of them.
        texts: the UNet's further inputs: a row per image, or two under guidance, unconditional ones first.
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
        spec = next(one for one in component_specs(geometry) if one.component == "unet")
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
        """What guidance makes of the plain UNet's output."""
        if self.guidance <= 1:
            return output
        without, within = np.split(output, 2)
        return np.asarray(without + np.float32(self.guidance) * (within - without))

    def part(self, rows: np.ndarray) -> UnetTask:
        """Some of the images alone."""
        both = np.concatenate([rows + start for start in range(0, self.rows, len(self.latents))])
        texts = {name: value[both] for name, value in self.texts.items()}
        return UnetTask(self.latents[rows], self.timestep, texts, self.guidance)


def bench_unet_step(
    engines_dir: Path, *, batch: int = 1, guidance: float = 2.0, runs: int = 3
) -> dict[str, Any]:
    """Time of one UNet step of every contender, on random inputs.

    Args:
        engines_dir: what `build_engines` wrote.
        batch: images; guidance doubles them.
        guidance: guidance scale.
        runs: calls that count.

    Returns:
        JSON data: `gflop` of the plain UNet, `matmul_gflops` that this machine reaches, and `rows`, one per
        contender, with `unet_step_ms`, `of_peak`, `speedup` of synthkit over it and `max_difference` from
        diffusers as a part of the largest value.

    Raises:
        ConfigError: a number is too small.
        EngineError: the engines cannot be used.
        ModelError: the model that they were made of is gone.
        ParityError: a contender computes something else.
    """
    if min(batch, runs) < 1:
        raise ConfigError(f"batch = {batch} and runs = {runs} must both be 1 or more")
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
        taken = {name: _measure(make, runs) for name, make in steps.items()}
    allowed = _tolerance(path, guidance)
    return {
        "engines": engines_dir.name,
        "provider": provider,
        "batch": batch,
        "unet_rows": task.rows,
        "latents": list(task.latents.shape[1:]),
        "guidance": guidance,
        "runs": runs,
        "threads": usable_threads(),
        "versions": versions(),
        "tolerance": allowed,
        "gflop": round(gflop, 1),
        "matmul_gflops": (peak := round(matmul_gflops(usable_threads()), 1)),
        "rows": _rows(taken, gflop / peak, allowed),
    }


def as_text(result: dict[str, Any]) -> str:
    """The result as a table."""
    head = (
        f"one UNet step of {result['batch']} images at guidance {result['guidance']:g} (batch "
        f"{result['unet_rows']} of {'x'.join(map(str, result['latents']))}, {result['gflop']:.0f} GFLOP), "
        f"{result['threads']} threads; medians of {result['runs']}"
    )
    peak = f"of peak: the plain UNet's work against a matrix product's {result['matmul_gflops']:.0f} GFLOP/s"
    lines = [head, peak, "", f"{'':22}{'UNet step':>12}{'of peak':>10}{'synthkit is':>13}"]
    for row in result["rows"]:
        lines.append(
            f"{row['name']:22}{row['unet_step_ms']:>9.1f} ms{row['of_peak']:>10.0%}{row['speedup']:>11.2f} x"
        )
    return "\n".join(lines)


def matmul_gflops(threads: int, rounds: int = 5) -> float:
    """GFLOP/s of torch in the product of two float32 matrices, the best of some rounds.

    Args:
        threads: that compute.
        rounds: how often it is tried.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = torch.rand(_MATRIX, _MATRIX), torch.rand(_MATRIX, _MATRIX)
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * _MATRIX**3 / min(seconds[1:]) / 1e9


def _measure(make: Callable[[], Step], runs: int) -> tuple[np.ndarray, list[float]]:
    """The output, and seconds of every call; the network is gone after that."""
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
    taken: dict[str, tuple[np.ndarray, list[float]]], at_peak: float, allowed: float
) -> list[dict[str, Any]]:
    medians = {name: statistics.median(seconds) for name, (_, seconds) in taken.items()}
    wanted, rows = next(iter(taken.values()))[0], []
    for name, (output, seconds) in taken.items():
        found = float(np.abs(output - wanted).max() / np.abs(wanted).max())
        if not found <= allowed:  # NaN too
            raise ParityError(
                f"{name} computes something else than diffusers: it differs by {found:.3g} of the largest "
                f"value, allowed is {allowed:.3g}; rebuild the engines with --force"
            )
        rows.append(
            {
                "name": name,
                "unet_step_ms": round(1000 * medians[name], 3),
                "of_peak": round(at_peak / medians[name], 4),
                "speedup": round(medians[name] / medians["synthkit"], 3),
                "seconds": [round(one, 4) for one in seconds],
                "max_difference": found,
            }
        )
    return rows


def _tolerance(path: Path, guidance: float) -> float:
    """Parity's, as guidance enlarges it: (1 - g) a + g b is off by up to (2g - 1) times what a and b are."""
    from synthkit.engines.tensorrt.precision_proof import graph_weights, main_precision

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
    feeds = {one.name: plain[one.name].astype(one.dtype, copy=False) for one in session.inputs}
    return lambda: task.guided(session.run(feeds)["out_sample"].astype(np.float32, copy=False))


def _synthkit(task: UnetTask, engines_dir: Path) -> Step:
    """As the sampling loop calls it: a part of the batch per core where the UNet is small."""
    import torch

    pipeline = EnginePipeline.open(engines_dir)
    denoiser, images = pipeline.prepare(task.guidance), len(task.latents)
    parts = [task.part(rows) for rows in np.array_split(np.arange(images), min(images, pipeline.workers))]
    bound = [
        (denoiser.bind(part.texts, part.latents.shape, part.guidance), torch.from_numpy(part.latents))
        for part in parts
    ]
    pool = ThreadPoolExecutor(len(parts))

    def step() -> np.ndarray:
        answers = pool.map(lambda pair: pair[0](pair[1], task.timestep).cpu().numpy(), bound)
        return np.concatenate(list(answers))

    return step
