"""Plan files: their keys, their names, and which of them this machine may load.

    unet/<gpu>_<tensorrt>_<key12>.plan        the engine, as TensorRT serialises it
    unet/<gpu>_<tensorrt>_<key12>.plan.json   the whole key, the plan's SHA-256 and how it was verified

TensorRT has no call that says whether a plan fits: a wrong one ends in None, or in a crash. So the sidecar is
compared with this machine first. This module knows no TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synthkit.artifacts import digest, file_sha256, write_bytes, write_json
from synthkit.engines.runtime.session import existing_engine
from synthkit.engines.tensorrt.build_plan import BuildPlan, release
from synthkit.errors import EngineError

SCHEMA = 1
"""Raised whenever what `BuildPlan` means changes, so that older plans are built anew."""

REBUILD = "rebuild it with `synthkit build-engines --backend tensorrt --force`"


@dataclass(frozen=True)
class Machine:
    """GPU, TensorRT and platform that a plan is bound to.

    Attributes:
        gpu: the GPU's name; tactics are timed on it.
        capability: its compute capability, for example "8.7".
        tensorrt: the whole version with its build number.
        system: operating system, for example "Linux".
        architecture: processor, for example "aarch64".
    """

    gpu: str
    capability: str
    tensorrt: str
    system: str
    architecture: str

    @property
    def label(self) -> str:
        """Its name in file names."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.gpu.lower()).strip('-')}_{self.tensorrt}"


def this_machine(tensorrt_version: str) -> Machine:
    """Describe the machine that this process runs on.

    Raises:
        EngineError: torch is absent or sees no GPU; the sessions hold their buffers in it.
    """
    try:
        import torch
    except ImportError:
        raise EngineError(
            "TensorRT engines keep their buffers in torch, which is not installed; install a torch with CUDA"
        ) from None
    if not torch.cuda.is_available():
        raise EngineError(
            f"torch {torch.__version__} sees no GPU; install a torch built for this machine's CUDA, "
            "or use --backend onnxruntime"
        )
    major, minor = torch.cuda.get_device_capability()
    return Machine(
        torch.cuda.get_device_name(),
        f"{major}.{minor}",
        tensorrt_version,
        platform.system(),
        platform.machine(),
    )


def network_digest(folder: Path) -> str:
    """Digest of a network: its ONNX file and whatever weights lie beside it, by content and file name.

    Raises:
        EngineError: there is no ONNX file.
    """
    existing_engine(folder / "model.onnx")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not _is_other(path))
    return digest({path.name: file_sha256(path) for path in files})


def _is_other(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix in (".plan", ".json")


def plan_key(network: str, plan: BuildPlan, machine: Machine) -> dict[str, Any]:
    """Everything that an engine depends on, as JSON data: no path and no time.

    Args:
        network: `network_digest` of the ONNX file, which holds weights, opset and precision.
        plan: batch range, size, flags, level and limits.
        machine: that builds it.
    """
    key = {"schema": SCHEMA, "network": network, "plan": asdict(plan), "machine": asdict(machine)}
    plain: dict[str, Any] = json.loads(json.dumps(key))  # tuples become lists, as a sidecar has them
    return plain


def plan_path(folder: Path, key: Mapping[str, Any]) -> Path:
    """Path of a key's plan in its network's folder."""
    return folder / f"{Machine(**key['machine']).label}_{digest(key)[:12]}.plan"


def write_plan(folder: Path, key: Mapping[str, Any], content: bytes, facts: Mapping[str, Any]) -> Path:
    """Write a plan and its sidecar, the sidecar last: a plan without one is no plan.

    Args:
        folder: the network's folder.
        key: of `plan_key`.
        content: the serialised engine.
        facts: measurements of the build.
    """
    path = plan_path(folder, key)
    write_bytes(path, content)
    seal = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_json(sidecar_path(path), {"key": key, **seal, **facts})
    return path


def sidecar_path(plan: Path) -> Path:
    """The JSON file beside a plan."""
    return plan.with_name(f"{plan.name}.json")


def read_sidecar(plan: Path) -> dict[str, Any]:
    """Read the sidecar of a plan.

    Raises:
        EngineError: the sidecar is missing or broken.
    """
    try:
        sidecar = json.loads(sidecar_path(plan).read_text(encoding="utf-8"))
        Machine(**sidecar["key"]["machine"])
        if sidecar["key"]["schema"] != SCHEMA or not isinstance(sidecar["sha256"], str):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError):
        raise EngineError(f"the sidecar {sidecar_path(plan)} is missing or broken; {REBUILD}") from None
    return dict(sidecar)


def read_plan(plan: Path) -> bytes:
    """Read a plan and verify its SHA-256.

    Raises:
        EngineError: the file is missing, or not as it was written.
    """
    sidecar = read_sidecar(plan)
    try:
        content = plan.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read the plan {plan}: {error.strerror}; {REBUILD}") from None
    if hashlib.sha256(content).hexdigest() != sidecar["sha256"]:
        raise EngineError(f"the plan {plan} is not as it was built (its SHA-256 differs); {REBUILD}")
    return content


def find_plans(folder: Path) -> list[Path]:
    """The plans in a network's folder, by name."""
    return sorted(folder.glob("*.plan"))


def fitting_plan(folder: Path, machine: Machine) -> Path:
    """The plan of a network that this machine may load.

    Raises:
        EngineError: there is none; says for the first of them what does not fit.
    """
    plans = find_plans(folder)
    if not plans:
        raise EngineError(f"no TensorRT plan in {folder}; {REBUILD.replace('rebuild', 'build')}")
    network = network_digest(folder)
    problems = [misfit(read_sidecar(plan)["key"], network, machine) for plan in plans]
    if all(problems):
        raise EngineError(f"the plan {plans[0]} does not fit: {problems[0]}; {REBUILD}")
    return plans[problems.index("")]


def misfit(key: Mapping[str, Any], network: str, machine: Machine) -> str:
    """Compare a plan's key with this machine; return what does not fit, empty if all does.

    Args:
        key: from the sidecar.
        network: digest of the ONNX file beside the plan.
        machine: that would load it.
    """
    built = Machine(**key["machine"])
    if key["network"] != network:
        return "it was built of another model.onnx"
    if (built.system, built.architecture) != (machine.system, machine.architecture):
        return (
            f"it was built on {built.system} {built.architecture}, "
            f"this is {machine.system} {machine.architecture}"
        )
    if not _gpu_fits(key["plan"]["hardware"], built, machine):
        return (
            f"it was built for {built.gpu} (compute capability {built.capability}), "
            f"this is {machine.gpu} ({machine.capability})"
        )
    if not _version_fits("VERSION_COMPATIBLE" in key["plan"]["flags"], built.tensorrt, machine.tensorrt):
        return f"it was built by TensorRT {built.tensorrt}, here is {machine.tensorrt}"
    return ""


def _gpu_fits(hardware: str | None, built: Machine, machine: Machine) -> bool:
    if hardware == "AMPERE_PLUS":
        return int(machine.capability.partition(".")[0]) >= 8
    if hardware == "SAME_COMPUTE_CAPABILITY":
        return built.capability == machine.capability
    return (built.gpu, built.capability) == (machine.gpu, machine.capability)


def _version_fits(compatible: bool, built: str, here: str) -> bool:
    """Without version compatibility all four numbers must agree; with it, a newer version may load the plan:
    of the same major version, or of the next one that there was (8 to 10, 10 to 11)."""
    if not compatible:
        return built == here
    before, now = release(built), release(here)
    return before <= now and (before[0], now[0]) in {(8, 8), (8, 10), (10, 10), (10, 11), (11, 11)}
