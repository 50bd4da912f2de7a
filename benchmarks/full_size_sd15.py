"""A full-size Stable Diffusion 1.5 with random weights: built in fp16 and fp32, and one UNet step timed.

Not part of the test suite: it needs 12 GB of disk, 15 GB of memory and some minutes.

    python -m benchmarks.full_size_sd15 FOLDER [fp16] [fp32]

The step is of fp32. It runs the commands that anyone would type, each in a process of its own, and prints
what each took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny_models import SCHEDULERS, tiny_tokenizer


def make(model: Path) -> None:
    """Write the pipeline's folder, from the configs of Stable Diffusion 1.5 and random weights."""
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
        tokenizer=tiny_tokenizer(model.parent / "vocabulary"),
        unet=unet,
        scheduler=getattr(diffusers, name)(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(model)


def run(line: list[str]) -> dict[str, Any]:
    """A command's answer, with its seconds, its processor's seconds and its peak memory."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *line], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    answer = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(line)} failed")
    return {
        "command": " ".join(line),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
        **(json.loads(answer) if answer else {}),
    }


def main(folder: Path, precisions: Sequence[str]) -> None:
    """Make the model, build it, and in fp32 time a step of the UNet at 512 px and batch 2."""
    model = str(folder / "model")
    here = ["synthkit", "--workspace", str(folder)]
    lines = [["benchmarks.full_size_sd15", "make", model]]
    for precision in precisions:
        out = str(folder / precision)
        build = ["build-engines", "--model", model, "--precision", precision, "-o", out]
        lines.append([*here, *build, "--backend", "onnxruntime", "--json"])
    if "fp32" in precisions:
        bench = ["bench", "--engines", str(folder / "fp32"), "--unet-step", "--profile", "--batch", "1"]
        lines.append([*here, *bench, "--json"])
    for line in lines:
        print(json.dumps(run(line)), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:] or ("fp16", "fp32"))
