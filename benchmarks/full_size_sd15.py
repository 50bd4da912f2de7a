"""Stable Diffusion 1.5 at full size with random weights: built in fp16 and fp32, and one UNet step timed.

    python -m benchmarks.full_size_sd15 FOLDER

Needs 12 GB of disk and 15 GB of memory. The step is timed in fp32. Every command runs in a process of its
own, as a user would type it; a line of JSON tells what each took.
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

import click

from synthkit.one_line import OneLineErrors


def make(model: Path) -> None:
    """Write the pipeline's folder, from the configs of Stable Diffusion 1.5 and random weights."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from tests.tiny_models import SCHEDULERS, tiny_tokenizer

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
    """Run a module: its command, seconds, CPU seconds, peak memory in GB, and the JSON that it printed."""
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
        **(json.loads(answer) if answer.startswith("{") else {}),
    }


@click.command(cls=OneLineErrors)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp16", "fp32"]),
    default=("fp16", "fp32"),
    show_default=True,
)
@click.option("--make", "only_make", is_flag=True, help="Only write the model, to FOLDER/model.")
def main(folder: Path, precisions: Sequence[str], only_make: bool) -> None:
    """Make the model, build it, and in fp32 time a UNet step of one image of 512 px under guidance."""
    model = folder / "model"
    if only_make:
        make(model)
        return
    lines = [["benchmarks.full_size_sd15", str(folder), "--make"]]
    for precision in precisions:
        build = ["synthkit", "--workspace", str(folder), "build-engines", "--model", str(model)]
        build += ["--precision", precision, "--backend", "onnxruntime", "--json"]
        lines.append([*build, "-o", str(folder / precision)])
    if "fp32" in precisions:
        step = ["benchmarks.unet_step", str(folder / "fp32"), "--profile"]
        lines.append([*step, "--out", str(folder / "unet_step.json")])
    for line in lines:
        click.echo(json.dumps(run(line)))


if __name__ == "__main__":
    main()
