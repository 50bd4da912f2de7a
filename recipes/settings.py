"""The settings of every stage: defaults, help texts and ranges, for recipe files and flags alike.

A field that changes a stage's result is part of that stage's key (see `synthkit.artifacts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from synthkit.config import setting


@dataclass(frozen=True)
class EngineSettings:
    """`build-engines`: which diffusion model becomes engines, and how."""

    model: str = setting("glyphs-32", "bundled model, local diffusers folder or hub id")
    backend: Literal["auto", "tensorrt", "onnxruntime"] = setting("auto", "runtime of the engines")
    precision: Literal["auto", "fp32", "fp16"] = setting(
        "auto", "precision of the networks; auto: fp16 for TensorRT, otherwise fp32"
    )
    vae_precision: Literal["auto", "fp32", "fp16"] = setting(
        "auto", "precision of the VAE; auto: the same, but fp32 where it would overflow, as in SDXL"
    )
    batch: str = setting("1:32:128", "smallest, usual and largest batch, MIN:OPT:MAX in images")
    size: int | None = setting(None, "image size in pixels; chosen: the model's own", minimum=8)
    opset: int | None = setting(None, "ONNX opset; chosen: what the runtime reads best", minimum=14)
    trt_workspace: int | None = setting(None, "TensorRT: scratch memory of a layer in MiB", minimum=1)
    trt_level: int = setting(3, "TensorRT: optimisation, 0 (quick to build) to 5 (fast)", minimum=0)
    trt_hardware: Literal["this-gpu", "same-capability", "ampere+"] = setting(
        "this-gpu", "TensorRT: GPUs that can load the plans"
    )
    trt_version_compatible: bool = setting(False, "TensorRT: later versions can load the plans")
    trt_refit: bool = setting(False, "TensorRT: weights can be exchanged without a rebuild")
    low_memory: bool = setting(False, "TensorRT: build each network in a process of its own")
    cache_dir: str | None = setting(None, "folder of TensorRT's timing cache; chosen: ~/.cache/synthkit")


@dataclass(frozen=True)
class StyleSettings:
    """`learn-style`: dataset style inversion."""

    token: str = setting("<site-style>", "name of the new token")
    vectors: int = setting(1, "vectors of the token", minimum=1)
    init_word: str = setting("photo", "word whose embedding the token starts from")
    steps: int = setting(200, "training steps", minimum=1)
    lr: float = setting(0.02, "learning rate of the embedding", minimum=0)
    batch_size: int = setting(32, "noised latents per step", minimum=1)
    checkpoint_every: int = setting(50, "steps between two checkpoints", minimum=1)
    seed: int = setting(0, "seed of noise, timesteps and order", minimum=0)


@dataclass(frozen=True)
class GenerateSettings:
    """`generate`: synthetic images of every class."""

    per_class: int = setting(200, "images of each class", minimum=1)
    steps: int = setting(15, "denoising steps", minimum=1)
    guidance: float = setting(2.0, "guidance scale; 1 or less: none", minimum=0)
    batch_size: int = setting(100, "images per batch", minimum=1)
    seed: int = setting(0, "run seed; image i of class c is drawn from (seed, c, i)", minimum=0)


@dataclass(frozen=True)
class TrainSettings:
    """`train`: bridged transfer++ (arXiv 2403.19866)."""

    student: str = setting("resnet10t", "timm model name")
    pretrained: bool = setting(False, "start from timm's hub weights")
    weights: str | None = setting(None, "start from a local weights file or timm folder")
    image_size: int | None = setting(
        None, "student input in pixels; chosen: from weights or images", minimum=16
    )
    epochs: int = setting(12, "epochs over the synthetic images", minimum=1)
    real_steps: int = setting(100, "gradient steps over the real images", minimum=0)
    lr: float = setting(0.002, "peak learning rate", minimum=0)
    batch_size: int = setting(64, "images per gradient step", minimum=2)
    mixup: float = setting(0.2, "Mixup alpha of the synthetic stage; 0: off", minimum=0)
    seed: int = setting(0, "seed of initial weights, order and augmentation", minimum=0)


@dataclass(frozen=True)
class AdaptSettings:
    """`adapt`: the last layers on the real photos."""

    layers: Literal["auto", "1", "2", "4"] = setting(
        "auto", "units to adapt: head, + last block, + last stage"
    )
    path: str = setting("auto", "adaptation path; auto: chosen by cross-validation")
    adapt_steps: int = setting(60, "gradient steps at the most", minimum=1)
    adapt_lr: float = setting(0.001, "peak learning rate", minimum=0)
    views: int = setting(8, "augmented views of a photo that the frozen layers see", minimum=1)
    seed: int = setting(0, "seed of folds, order and augmentation", minimum=0)


@dataclass(frozen=True)
class ExportSettings:
    """`export`: precisions of the bundle, and the system that it is for."""

    precision: str = setting("fp32", "comma-separated: fp32, fp16, int8")
    default_precision: Literal["fp32", "fp16", "int8"] = setting(
        "fp32", "precision that runs when none is named"
    )
    target: Literal[
        "generic", "jetpack5", "jetpack6", "jetpack7", "jetson-inference", "deepstream", "triton"
    ] = setting("generic", "system whose files are written too")
    int8_target: Literal["auto", "cpu", "tensorrt"] = setting("auto", "who runs int8; auto: by --target")
    weight_bits: Literal["auto", "7", "8"] = setting(
        "auto", "of int8 for cpu; 8 overflows without VNNI, auto: measured on this machine"
    )
    keep_float: str = setting("auto", "layers int8 leaves in float: auto (the worst), none, or names")
    max_drop: float = setting(1.0, "points of top-1 that a default precision may cost", minimum=0)


#: Recipe-file section -> its settings; the sections are the commands' names.
SECTIONS: dict[str, type] = {
    "build-engines": EngineSettings,
    "learn-style": StyleSettings,
    "generate": GenerateSettings,
    "train": TrainSettings,
    "adapt": AdaptSettings,
    "export": ExportSettings,
}
