"""A full-size Stable Diffusion 1.5 with random weights: exported to fp16, proved, and one step timed.

Not part of the test suite; it needs about 12 GB of memory, 12 GB of disk and some minutes:

    python -m tests.full_size_sd15 FOLDER

Every stage runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_models import SCHEDULERS, tiny_tokenizer

BATCH = 2  # rows of the UNet: one image with guidance
RUNS = 3


def make(folder: Path) -> dict[str, Any]:
    """The pipeline's folder, from the configs of Stable Diffusion 1.5 and random weights."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    blocks = (320, 640, 1280, 1280)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, block_out_channels=blocks, cross_attention_dim=768, attention_head_dim=8
    )
    vae = diffusers.AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
        )
    )
    name, settings = SCHEDULERS["epsilon"]
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tiny_tokenizer(folder / "vocabulary"),
        unet=unet,
        scheduler=getattr(diffusers, name)(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")
    return {"unet_parameters": sum(one.numel() for one in unet.parameters())}


def export(folder: Path, precision: str = "fp16") -> dict[str, Any]:
    """The ONNX folder; every graph passes its checks."""
    from synthkit.engines.export import export_pipeline

    export_pipeline(folder / "model", folder / precision, precision)
    files = (folder / precision).glob("*/model.onnx*")
    return {"gigabytes": round(sum(path.stat().st_size for path in files) / 1e9, 2)}


def export_fp32(folder: Path) -> dict[str, Any]:
    """The same in fp32, for the step on the CPU."""
    return export(folder, "fp32")


def parity(folder: Path) -> dict[str, Any]:
    """Every fp16 engine loads and comes near its source."""
    from synthkit.engines.parity import component_parity

    found = component_parity(folder / "model", folder / "fp16", "fp16")
    return {one.component: [one.max_abs_error, one.tolerance, one.seconds] for one in found}


def step(folder: Path) -> dict[str, Any]:
    """Seconds of one UNet step at 512 px in torch and in ONNX Runtime, as it is and as the loop runs it."""
    import numpy as np
    import torch
    from diffusers import UNet2DConditionModel

    from synthkit.engines.denoiser import open_denoiser
    from synthkit.engines.session import open_session

    random = np.random.default_rng(0)
    sample = random.standard_normal((BATCH // 2, 4, 64, 64), dtype=np.float32)
    texts = random.standard_normal((BATCH, 77, 768), dtype=np.float32)
    doubled, tensors = np.concatenate([sample, sample]), torch.from_numpy(texts)
    path = folder / "fp32" / "unet" / "model.onnx"

    unet = [UNet2DConditionModel.from_pretrained(str(folder / "model" / "unet")).eval()]

    def torch_step() -> np.ndarray:
        with torch.inference_mode():
            without, within = unet[0](torch.from_numpy(doubled), 500.0, tensors).sample.chunk(2)
        return (without + 2 * (within - without)).numpy()

    seconds = {"torch": _median(torch_step)}
    wanted = torch_step()
    unet.clear()  # its memory is needed
    plain = open_session(path)
    feeds = {"sample": doubled, "timestep": np.asarray(500, np.float32), "encoder_hidden_states": texts}
    seconds["onnxruntime"] = _median(lambda: plain.run(feeds))
    plain.close()
    denoiser = open_denoiser(path, "cpu", guided=True)
    bound = denoiser.bind({"encoder_hidden_states": texts}, sample.shape, 2.0)
    seconds["synthkit"] = _median(lambda: bound(torch.from_numpy(sample), 500.0))
    error = np.abs(bound(torch.from_numpy(sample), 500.0).numpy() - wanted).max() / np.abs(wanted).max()
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "speedup": round(seconds["torch"] / seconds["synthkit"], 2),
        "relative_error": float(error),
    }


def _median(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    one.__name__: one for one in (make, export, parity, export_fp32, step)
}


def main(folder: Path, stages: list[str]) -> None:
    """Run stages one after the other; one alone runs in this process and prints its figures."""
    if len(stages) == 1:
        started = time.perf_counter()
        figures = STAGES[stages[0]](folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        seconds = round(time.perf_counter() - started, 1)
        print(json.dumps({"stage": stages[0], "seconds": seconds, "peak_gb": round(peak, 2), **figures}))
        return
    for stage in stages:
        subprocess.run([sys.executable, "-m", "tests.full_size_sd15", str(folder), stage], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(STAGES))
