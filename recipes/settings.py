"""The settings of every stage: defaults, help texts and ranges, for recipe files and flags alike.

A field that changes a stage's result is part of that stage's key (see `synthkit.artifacts`); one with
`in_key=False` is not, or counts there in another form: a model by its content, a backend as what was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from synthkit.config import setting


@dataclass(frozen=True)
class EngineSettings:
    """`build-engines`: which diffusion model becomes engines, and how."""

    model: str = setting("glyphs-32", "bundled model, local diffusers folder or hub id", in_key=False)
    backend: Literal["auto", "tensorrt", "onnxruntime"] = setting(
        "auto", "runtime of the engines", in_key=False
    )
    precision: Literal["auto", "fp32", "fp16"] = setting(
        "auto", "precision of the networks; auto: fp16 for TensorRT, otherwise fp32", in_key=False
    )
    vae_precision: Literal["auto", "fp32", "fp16"] = setting(
        "auto", "precision of the VAE; auto: the same, but fp32 where it would overflow, as in SDXL"
    )
    batch: str = setting("1:32:128", "smallest, usual and largest batch, MIN:OPT:MAX in images", in_key=False)
    size: int | None = setting(None, "image size in pixels; chosen: the model's own", minimum=8, in_key=False)
    opset: int | None = setting(None, "ONNX opset; chosen: what the runtime reads best", minimum=14)
    trt_workspace: int | None = setting(
        None, "TensorRT: scratch memory of a layer in MiB", minimum=1, in_key=False
    )
    trt_level: int = setting(
        3, "TensorRT: optimisation, 0 (quick to build) to 5 (fast)", minimum=0, in_key=False
    )
    trt_hardware: Literal["this-gpu", "same-capability", "ampere+"] = setting(
        "this-gpu", "TensorRT: GPUs that can load the plans", in_key=False
    )
    trt_version_compatible: bool = setting(False, "TensorRT: later versions can load the plans", in_key=False)
    trt_refit: bool = setting(False, "TensorRT: weights can be exchanged without a rebuild", in_key=False)
    low_memory: bool = setting(False, "TensorRT: build each network in a process of its own", in_key=False)
    cache_dir: str | None = setting(
        None, "folder of TensorRT's timing cache; chosen: ~/.cache/synthkit", in_key=False
    )


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
    clusters: int = setting(1, "tokens; photos that look alike share one", minimum=1)
    control: bool = setting(False, "untrained vectors instead, to compare with")
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate over the steps")
    accumulate: int = setting(1, "batches per training step", minimum=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "number type of the networks, on a GPU")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where to train; auto: the GPU that torch finds", in_key=False
    )
    early_stop: int = setting(
        0, "stop after so many checkpoints without a lower loss on held-out photos; 0: never", minimum=0
    )
    preview_every: int = setting(0, "steps between two sheets of images in previews/; 0: none", minimum=0)
    a1111: bool = setting(False, "write the tokens also in a1111/, as A1111 and kohya read them")


@dataclass(frozen=True)
class GenerateSettings:
    """`generate`: synthetic images of every class."""

    per_class: int = setting(200, "images of each class", minimum=1)
    steps: int | str = setting(15, "denoising steps, or LOW:HIGH, sampled per image", minimum=1)
    guidance: float | str = setting(
        2.0, "guidance scale, or LOW:HIGH, sampled per image; 1 or less: none", minimum=0
    )
    template: tuple[str, ...] = setting(
        (), "sentence of prompts, with {words}, {token}, {context}; several: one per image"
    )
    context: tuple[str, ...] = setting((), "phrase that ends a prompt; several: one per image")
    negative: str = setting("", "negative prompt, which guidance leads away from")
    plain_share: float = setting(0.0, "share of images generated without the style, 0 to 1", minimum=0)
    init: Literal["noise", "real"] = setting("noise", "what an image starts from; real: a photo of its class")
    strength: float = setting(0.75, "of init = real: 1 leaves nothing of the photo, 0 all of it", minimum=0)
    batch_size: int = setting(100, "images per batch", minimum=1, in_key=False)
    ray: str | None = setting(
        None, "generate on a Ray cluster: its address, or local; chosen: in this process", in_key=False
    )
    ray_workers: int | None = setting(
        None, "Ray: processes that generate; chosen: one per GPU or node", minimum=1, in_key=False
    )
    seed: int = setting(0, "run seed; image i of class c comes from (seed, c, i)", minimum=0)


@dataclass(frozen=True)
class FilterSettings:
    """`generate` and `adapt`: which images are rejected and resampled."""

    filter: str = setting("none", "comma-separated: blank, saturated, class, duplicate, leak")
    filter_quantile: float = setting(
        0.05, "share of your photos that a filter's threshold would reject, 0 to 1", minimum=0
    )
    classifier: str | None = setting(
        None, "reference classifier: folder of a student or of CLIP; chosen: none", in_key=False
    )
    retries: int = setting(3, "times that a rejected image is resampled before it is dropped", minimum=0)


@dataclass(frozen=True)
class TrainSettings:
    """`train`: a student from synthetic images and photos, by one of several training methods."""

    student: str = setting("resnet10t", "timm model name")
    pretrained: bool = setting(False, "start from timm's hub weights")
    weights: str | None = setting(None, "start from a local weights file or timm folder", in_key=False)
    image_size: int | None = setting(
        None, "student input in pixels; chosen: from weights or images", minimum=16
    )
    epochs: int = setting(12, "epochs over the synthetic images", minimum=1)
    real_steps: int = setting(100, "gradient steps over the real images", minimum=0)
    lr: float = setting(0.002, "peak learning rate", minimum=0)
    batch_size: int = setting(64, "images per gradient step", minimum=2)
    mixup: float = setting(0.2, "Mixup alpha, where the method has Mixup; 0: off", minimum=0)
    seed: int = setting(0, "seed of initial weights, order and augmentation", minimum=0)
    method: Literal[
        "vanilla",
        "vanilla-matched",
        "vanilla-mixup",
        "synthetic",
        "mixed",
        "joint",
        "mixed-auxbn",
        "bridged",
        "bridged++",
    ] = setting("bridged++", "how to train on photos and synthetic images")
    real_share: float | None = setting(
        None, "mixed, joint: share of photos in a batch; chosen: mixed: of all images, others: 0.5", minimum=0
    )
    real_weight: float = setting(0.8, "joint: weight of the photos' loss", minimum=0)
    held_out: int = setting(
        0, "photos of each class that choose the checkpoint and are not learned; 0: the last one", minimum=0
    )
    opt: Literal["adamw", "sgd", "adam", "nadamw", "lion", "rmsprop"] = setting("adamw", "timm's optimiser")
    schedule: Literal["one-cycle", "cosine", "step"] = setting(
        "one-cycle", "course of the learning rate; cosine, step: timm's"
    )
    layer_decay: float = setting(
        1.0, "share of the next layer group's learning rate that a group gets", minimum=0
    )
    ema: float = setting(0.0, "decay of the moving average of weights that is kept; 0: off", minimum=0)
    augment: str = setting("default", "default, none, or timm's, such as rand-m9-mstd0.5")
    amp: bool = setting(False, "forward passes in bfloat16")
    accumulate: int = setting(1, "parts of a batch that go through the student one by one", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "where to train; auto: the GPU that torch finds", in_key=False
    )


@dataclass(frozen=True)
class AdaptSettings:
    """`adapt`: the last layers on the real photos."""

    strategy: Literal["auto", "unchanged", "last-1", "last-2", "last-4", "full"] = setting(
        "auto", "layer groups that learn the photos, counted from the head; auto: by cross-validation"
    )
    head: Literal["auto", "keep", "new", "means"] = setting(
        "auto",
        "initial head: kept, new (every logit zero) or from class means; auto: kept, but means where new "
        "classes have one photo, and random for the strategy full, as in bridged transfer++",
    )
    adapt_steps: int | None = setting(
        None, "gradient steps over the last layer groups; chosen: 60, or 120 for new classes", minimum=1
    )
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
    "filter": FilterSettings,
    "train": TrainSettings,
    "adapt": AdaptSettings,
    "export": ExportSettings,
}
