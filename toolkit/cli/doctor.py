"""`synthkit doctor`: runtimes and hardware, opened for real."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synthkit.cli import options
from synthkit.machine import Check, ask, base_check, installed, machine_checks

_TRAIN = (
    "torch torchvision timm diffusers transformers optimum optimum-onnx onnx onnxscript safetensors "
    "accelerate scikit-learn jinja2 matplotlib"
).split()


@dataclass(frozen=True)
class Diagnosis:
    """All checks.

    Attributes:
        ok: False if something that every command needs is broken.
        checks: in the order of the table.
    """

    ok: bool
    checks: list[Check]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


@options.command("doctor")
def command(workspace: Path) -> options.Output:
    """Check what this machine can run.

    Runtimes and their providers are opened, not only listed. The network is not used. Ends with 1 only if
    something that every command needs is broken.

    \b
    Example:
      synthkit doctor
    """
    base = base_check()
    checks = [*machine_checks(workspace), base, *runtime_checks(), *train_checks(), tensorrt_check()]
    diagnosis = Diagnosis(base.status == "ok", checks)
    return options.Output(diagnosis.to_json(), table(checks), diagnosis.ok)


def table(checks: Sequence[Check]) -> str:
    """The checks as aligned columns, each advice below its check."""
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
    advice = "install the libraries that the provider needs"
    return Check(name, "warn", f"listed but does not load: {reason}", advice)


def train_checks() -> list[Check]:
    """The packages of a workstation, whether torchvision fits torch, and whether torch computes on a GPU."""
    versions = {name: installed(name) for name in _TRAIN}
    value = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = [name for name, version in versions.items() if not version]
    if absent:
        value = f"{value}; not installed: {', '.join(absent)}".removeprefix("; ")
        advice = "not needed on a device; on a workstation: pip install 'synthkit-edge[train]'"
        checks = [Check("train", "missing", value, advice)]
    else:
        checks = [Check("train", "ok", value)]
    if versions["torch"] and versions["torchvision"]:
        checks.append(torchvision_check(versions["torch"]))
    if versions["torch"]:
        checks.append(cuda_check())
    return checks


def torchvision_check(torch_version: str) -> Check:
    """Load torchvision's operators into torch.

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
    """Compute on every GPU that torch lists."""
    reply = ask("synthkit.probes:torch_and_cuda")
    if reply.error:
        return Check("torch cuda", "warn", reply.error, "check the driver against torch's CUDA version")
    version, devices = reply.data["cuda_build"], reply.data["devices"]
    build = f"torch built for CUDA {version}" if version else "CPU-only torch"
    if not devices:
        return Check("torch cuda", "missing", f"{build}, no GPU visible", "not needed; training is slower")
    return Check("torch cuda", "ok", f"{build}: {', '.join(devices)}")


def tensorrt_check() -> Check:
    """Import TensorRT and start a runtime."""
    if importlib.util.find_spec("tensorrt") is None:
        return Check("tensorrt", "missing", "not installed", "not needed; engines then run in ONNX Runtime")
    reply = ask("synthkit.engines.tensorrt.api:probe_tensorrt")
    # The probe returns why TensorRT does not work, or nothing.
    reason = reply.error or reply.data
    if reason:
        advice = "check TensorRT against the driver; until then engines run in ONNX Runtime"
        return Check("tensorrt", "warn", f"installed but does not work: {reason}", advice)
    # A Jetson has it as a system package, of which pip knows nothing.
    version = installed("tensorrt") or ask("synthkit.engines.tensorrt.api:tensorrt_version").data
    return Check("tensorrt", "ok", f"{version}: a runtime starts")
