"""The settings of one TensorRT build, decided without TensorRT.

A `BuildPlan` is plain frozen data: names of flags, never their numbers, which differ between versions. It is
hashed into the cache key, printed by `--dry-run`, and carried out by `synthkit.engines.tensorrt.build`.

Half precision by version:

    8.5, 8.6   weak typing    BuilderFlag.FP16, the graph may be of either precision
    10.x       strong typing  no precision flag (TensorRT refuses one): the graph alone decides
    11.x       strong typing  the only kind there is; the precision flags are gone

The precision therefore always lies in the ONNX graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from synthkit.engines.runtime.component_spec import BatchRange, EngineSpec, Geometry, component_specs
from synthkit.errors import EngineError

OLDEST = (8, 5)
"""First version with named tensors and execute_async_v3, which the sessions use."""

PLANNED = ("unet", "vae_decoder", "vae_encoder")
"""The networks that become plans. A text encoder stays in ONNX Runtime: it runs once per prompt, and a style
token adds rows to its table, which must not rebuild an engine."""

HARDWARE = {"this-gpu": "NONE", "same-capability": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}
"""Option's value -> member of HardwareCompatibilityLevel."""

_TRTEXEC_HARDWARE = {"SAME_COMPUTE_CAPABILITY": "sameComputeCapability", "AMPERE_PLUS": "ampere+"}


@dataclass(frozen=True)
class BuildOptions:
    """A user's choices for a build.

    Attributes:
        workspace: scratch memory that a layer may use, MiB; None: all of the GPU's.
        level: builder optimisation level, 0 (fast build) to 5 (fast engine); TensorRT's own default is 3.
        hardware: a key of `HARDWARE`.
        version_compatible: later versions of TensorRT can load the plan, at some cost in speed.
        refit: weights can be exchanged without a rebuild, at some cost in speed.
    """

    workspace: int | None = None
    level: int = 3
    hardware: str = "this-gpu"
    version_compatible: bool = False
    refit: bool = False


@dataclass(frozen=True)
class Profile:
    """Shapes of one input: smallest, usual (the one that TensorRT tunes for) and largest."""

    name: str
    minimum: tuple[int, ...]
    usual: tuple[int, ...]
    maximum: tuple[int, ...]


@dataclass(frozen=True)
class BuildPlan:
    """All that determines an engine beside its ONNX file and the machine.

    Attributes:
        component: the network's name.
        precision: "fp32" or "fp16", of the graph and so of the engine.
        network_flag: member of NetworkDefinitionCreationFlag that is set.
        flags: members of BuilderFlag that are set.
        profiles: one for every input with a batch axis.
        workspace: limit of the WORKSPACE memory pool, bytes; None: TensorRT's own.
        level: builder_optimization_level; None where TensorRT has none.
        hardware: member of HardwareCompatibilityLevel; None: left alone.
    """

    component: str
    precision: str
    network_flag: str
    flags: tuple[str, ...]
    profiles: tuple[Profile, ...]
    workspace: int | None
    level: int | None
    hardware: str | None

    @property
    def portable(self) -> bool:
        """True if the plan is meant for other GPUs or versions as well."""
        return self.hardware is not None or "VERSION_COMPATIBLE" in self.flags


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a TensorRT version such as "10.3.0" or "11.4.0.106".

    Raises:
        EngineError: the version is older than `OLDEST`, or is no version.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise EngineError(f"the installed TensorRT calls its version {version!r}; reinstall it")
    number = int(found[1]), int(found[2])
    if number < OLDEST:
        raise EngineError(
            f"TensorRT {version} is older than {OLDEST[0]}.{OLDEST[1]} (JetPack 5.1); "
            "update it, or use --backend onnxruntime"
        )
    return number


def default_opset(version: str) -> int:
    """ONNX opset to export for a TensorRT version: the newest that its parser reads without gaps.

    Opset 17 brings LayerNormalization whole, which sums in fp32 inside a half precision graph; the parser of
    8.5 does not know it.
    """
    return 17 if release(version) >= (8, 6) else 16


def planned_specs(geometry: Geometry) -> list[EngineSpec]:
    """Networks of a pipeline that become plans."""
    return [spec for spec in component_specs(geometry) if spec.component in PLANNED]


def decide_plan(
    spec: EngineSpec, batch: BatchRange, precision: str, options: BuildOptions, version: str
) -> BuildPlan:
    """Decide the plan of one network.

    Args:
        spec: the network's inputs; a string in a shape stands for the batch.
        batch: in images. Guidance runs every image twice through the UNet in one batch, and guidance of 1 or
            less once: the UNet's profile goes from the smallest batch to twice the largest.
        precision: of the ONNX graph.
        options: the user's choices.
        version: of TensorRT.

    Raises:
        EngineError: the version is too old for TensorRT sessions or for an option.
    """
    number = release(version)
    strong = number >= (10, 0)
    _check_options(options, number, version)
    flags = [] if strong or precision == "fp32" else ["FP16"]
    flags += ["VERSION_COMPATIBLE"] if options.version_compatible else []
    flags += ["REFIT"] if options.refit else []
    return BuildPlan(
        component=spec.component,
        precision=precision,
        network_flag="STRONGLY_TYPED" if strong else "EXPLICIT_BATCH",
        flags=tuple(flags),
        profiles=_profiles(spec, batch),
        workspace=options.workspace * 2**20 if options.workspace else None,
        level=options.level if number >= (8, 6) else None,
        hardware=None if options.hardware == "this-gpu" else HARDWARE[options.hardware],
    )


def _check_options(options: BuildOptions, number: tuple[int, int], version: str) -> None:
    """Refuse options that this version of TensorRT does not have."""
    if number < (8, 6) and (options.hardware != "this-gpu" or options.version_compatible):
        raise EngineError(
            f"TensorRT {version} builds for its own version and GPU only; "
            "leave out build-engines.trt_hardware and trt_version_compatible"
        )
    if options.level > 5:
        raise EngineError(f"trt_level = {options.level}: TensorRT's builder has the levels 0 to 5")


def _profiles(spec: EngineSpec, batch: BatchRange) -> tuple[Profile, ...]:
    doubled = 2 if spec.component == "unet" else 1
    sizes = (batch.minimum, batch.usual * doubled, batch.maximum * doubled)
    return tuple(
        Profile(tensor.name, *(_with_batch(tensor.shape, size) for size in sizes))
        for tensor in spec.inputs
        if any(isinstance(side, str) for side in tensor.shape)
    )


def _with_batch(shape: tuple[int | str, ...], size: int) -> tuple[int, ...]:
    return tuple(size if isinstance(side, str) else side for side in shape)


def trtexec_line(plan: BuildPlan, major: int) -> str:
    """Command that builds the same plan with NVIDIA's trtexec.

    Args:
        plan: of the network.
        major: TensorRT's major version. 8 takes a flag for the precision, 10 one for strong typing, 11 none.
    """
    words = ["trtexec", f"--onnx={plan.component}/model.onnx", f"--saveEngine={plan.component}/model.plan"]
    if major == 10:
        words.append("--stronglyTyped")
    elif major < 10 and plan.precision == "fp16":
        words.append("--fp16")
    for option in ("minimum", "usual", "maximum"):
        shapes = ",".join(
            f"{profile.name}:{'x'.join(map(str, getattr(profile, option)))}" for profile in plan.profiles
        )
        words.append(f"--{_TRTEXEC_SHAPES[option]}={shapes}")
    if plan.workspace:
        words.append(f"--memPoolSize=workspace:{plan.workspace // 2**20}")
    if plan.level is not None:
        words.append(f"--builderOptimizationLevel={plan.level}")
    if plan.hardware:
        words.append(f"--hardwareCompatibilityLevel={_TRTEXEC_HARDWARE[plan.hardware]}")
    words += [_TRTEXEC_FLAGS[flag] for flag in plan.flags if flag in _TRTEXEC_FLAGS]
    return " ".join([*words, "--skipInference"])


_TRTEXEC_SHAPES = {"minimum": "minShapes", "usual": "optShapes", "maximum": "maxShapes"}
_TRTEXEC_FLAGS = {"VERSION_COMPATIBLE": "--versionCompatible", "REFIT": "--refit"}


def describe(plan: BuildPlan) -> str:
    """Describe a plan in one line: network, precision, batch range, flags and limits."""
    rows = [f"{one.minimum[0]}:{one.usual[0]}:{one.maximum[0]}" for one in plan.profiles[:1]]
    flags = ", ".join([plan.network_flag, *plan.flags])
    limit = f", workspace {plan.workspace // 2**20} MiB" if plan.workspace else ""
    level = "" if plan.level is None else f", level {plan.level}"
    reach = f", {plan.hardware}" if plan.hardware else ""
    return f"{plan.component}: {plan.precision}, rows {rows[0]}, {flags}{level}{limit}{reach}"
