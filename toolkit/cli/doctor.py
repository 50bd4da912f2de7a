"""`synthkit doctor`: what this machine can really run."""

from __future__ import annotations

import importlib.util
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from synthkit.cli import options
from synthkit.machine import (
    Check,
    ask,
    base_check,
    gpu_check,
    hub_check,
    installed,
    jetpack_check,
    machine_checks,
    room_check,
)
from synthkit.models.generator import bundled_models

_TRAIN = (
    "torch torchvision timm diffusers transformers optimum optimum-onnx onnx onnxscript safetensors "
    "accelerate scikit-learn jinja2 matplotlib"
).split()
#: Bytes in fp32 of text encoders, UNet and VAE.
_FULL_SIZE = {"SD 1.x": 4.27e9, "SDXL": 13.9e9}
_LISTED_ONLY = "listed but does not load"


@options.command("doctor")
@click.option("--hub", is_flag=True, help="Also ask the model hub whether it can be reached.")
def command(workspace: Path, hub: bool) -> options.Output:
    """Tell what this machine can really run.

    Runtimes and their providers are opened, not only listed; without --hub the network is not touched.
    Ends with 1 only when something that every command needs is broken.

    \b
    Example:
      synthkit doctor
    """
    base = base_check()
    checks = [
        *machine_checks(workspace),
        base,
        *runtime_checks(),
        *train_checks(),
        tensorrt_check(),
        gpu_check(),
        jetpack_check(),
        generator_check(),
        *room_checks(workspace),
        hub_check(os.environ, hub),
    ]
    ok = base.status == "ok"
    return options.Output({"ok": ok, "checks": [asdict(check) for check in checks]}, table(checks), ok)


def table(checks: Sequence[Check]) -> str:
    """The checks as aligned columns, each advice below its check.

    Args:
        checks: what was found.
    """
    width = max(len(check.name) for check in checks)
    margin = " " * (width + len("missing") + 4)
    lines = []
    for check in checks:
        start = f"{check.name:<{width}}  {check.status:<7}  "
        lines += textwrap.wrap(check.value, 110, initial_indent=start, subsequent_indent=margin)
        if check.advice:
            lines += textwrap.wrap(check.advice, 110, initial_indent=f"{margin}-> ", subsequent_indent=margin)
    return "\n".join(lines)


def runtime_checks() -> list[Check]:
    """ONNX Runtime: which package, and every provider that it lists, opened for real."""
    packages = {name: installed(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    present = [f"{name} {version}" for name, version in packages.items() if version]
    if importlib.util.find_spec("onnxruntime") is None:
        advice = "pip install 'synthkit-edge[cpu]', or 'synthkit-edge[gpu]' for an NVIDIA GPU (never both)"
        return [Check("onnxruntime", "missing", "not installed", advice)]
    listed = ask("synthkit.probes:list_providers")
    if listed.error:
        return [Check("onnxruntime", "warn", f"does not import: {listed.error}", "reinstall it")]
    first = Check("onnxruntime", "ok", ", ".join(present) or "installed by other means than pip")
    if len(present) == 2:
        advice = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install the one that you want"
        first = Check("onnxruntime", "warn", f"{first.value}: they overwrite each other's files", advice)
    return [first, *(provider_check(name) for name in listed.data)]


def provider_check(provider: str) -> Check:
    """One provider, opened on a tiny model in a process of its own.

    Args:
        provider: name as onnxruntime lists it.
    """
    opened = ask("synthkit.probes:open_provider", provider)
    name = f"  {provider.removesuffix('ExecutionProvider')}"
    if opened.data:
        return Check(name, "ok", "opens")
    reason = opened.error or "onnxruntime fell back to another provider"
    return Check(name, "warn", f"{_LISTED_ONLY}: {reason}", "install the libraries that the provider needs")


def train_checks() -> list[Check]:
    """The packages of a workstation, whether torch and torchvision fit, and whether torch sees a GPU."""
    versions = {name: installed(name) for name in _TRAIN}
    value = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = [name for name, version in versions.items() if not version]
    if absent:
        found = f"{value}; not installed: {', '.join(absent)}".removeprefix("; ")
        advice = "not needed on a device; on a workstation: pip install 'synthkit-edge[train]'"
        packages = Check("train", "missing", found, advice)
    else:
        packages = Check("train", "ok", value)
    checks = [packages]
    if versions["torch"] and versions["torchvision"]:
        checks.append(torchvision_check(versions["torch"]))
    if versions["torch"]:
        checks.append(cuda_check())
    return checks


def torchvision_check(torch_version: str) -> Check:
    """Whether torch and torchvision come from the same family of builds.

    Args:
        torch_version: the installed torch.
    """
    reply = ask("synthkit.probes:torchvision_operators")
    if not reply.error:
        return Check("torchvision", "ok", f"{reply.data} fits torch {torch_version}")
    if "torchvision::nms" in reply.error:
        value = f"built for another torch than {torch_version} (torchvision::nms does not exist)"
        return Check("torchvision", "warn", value, "install torch and torchvision from the same source")
    return Check("torchvision", "warn", f"does not import: {reply.error}", "reinstall torch and torchvision")


def cuda_check() -> Check:
    """Whether torch computes on a GPU."""
    reply = ask("synthkit.probes:torch_and_cuda")
    if reply.error:
        return Check("torch cuda", "warn", reply.error, "check the driver against torch's CUDA version")
    build = (
        f"torch built for CUDA {reply.data['cuda_build']}" if reply.data["cuda_build"] else "CPU-only torch"
    )
    if not reply.data["devices"]:
        return Check("torch cuda", "missing", f"{build}, no GPU visible", "not needed; training is slower")
    return Check("torch cuda", "ok", f"{build}: {', '.join(reply.data['devices'])}")


def tensorrt_check() -> Check:
    """Whether TensorRT imports and makes a runtime."""
    if importlib.util.find_spec("tensorrt") is None:
        return Check("tensorrt", "missing", "not installed", "not needed; engines then run in ONNX Runtime")
    reply = ask("synthkit.engines.tensorrt.api:probe_tensorrt")
    reason = reply.error or reply.data  # the probe answers why it does not work, or nothing
    if reason:
        advice = "check TensorRT against the driver; until then engines run in ONNX Runtime"
        return Check("tensorrt", "warn", f"installed but does not work: {reason}", advice)
    # A Jetson has it as a system package, of which pip knows nothing.
    version = installed("tensorrt") or ask("synthkit.engines.tensorrt.api:tensorrt_version").data
    return Check("tensorrt", "ok", f"{version}: a runtime starts")


def generator_check() -> Check:
    """Whether the bundled generators are where they should be."""
    found = bundled_models()
    if not found:
        advice = "reinstall synthkit, or train it with: python -m synthkit.recipes.glyphs32"
        return Check("generator", "missing", "no bundled generator", advice)
    return Check("generator", "ok", ", ".join(f"{name} ({path})" for name, path in found.items()))


def room_checks(workspace: Path) -> list[Check]:
    """Disk and memory against what engines of each kind of generator need.

    Args:
        workspace: where they would be written.
    """
    bundled = {
        name: float(sum(file.stat().st_size for file in folder.glob("*/*.safetensors")))
        for name, folder in bundled_models().items()
    }
    return [room_check(name, weights, workspace) for name, weights in {**bundled, **_FULL_SIZE}.items()]
