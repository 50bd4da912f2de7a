"""Facts about the machine that need no heavy package, and a way to ask a heavy one in its own process."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "missing"]

_GIB = 2**30
_MEMORY_TABLE = Path("/proc/meminfo")
_LOW_MEMORY, _LOW_DISK = 1 * _GIB, 2 * _GIB
_LIBRARIES = 0.75 * _GIB  # of memory: torch, diffusers and ONNX Runtime themselves
_PEAK = 3.25  # memory of a build per byte of fp32 weights: 14.5 GB for the 4.27 GB of Stable Diffusion 1.5
_JETPACK_OF_L4T = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer.

    Attributes:
        name: what was looked at.
        status: "ok", "warn" (there, but not as it should be) or "missing".
        value: what was seen.
        advice: what to do about it; empty when nothing is to be done.
    """

    name: str
    status: Status
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Reply:
    """What a process of its own answered: data, or the last line of its error."""

    data: Any = None
    error: str = ""


def ask(target: str, *arguments: str, timeout: float = 120.0) -> Reply:
    """Call "module:function" in a process of its own, which may crash or hang without harm to this one.

    Args:
        target: a function that returns JSON data.
        arguments: its positional arguments.
        timeout: seconds after which the process is ended.
    """
    line = [sys.executable, "-W", "ignore", "-m", "synthkit.probes", target, *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Reply(error=f"no answer within {timeout:.0f} s")
    if done.returncode == 0:
        return Reply(json.loads(done.stdout.splitlines()[-1]))
    if done.returncode < 0:
        return Reply(error=f"crashed with signal {-done.returncode}")
    return Reply(error=(done.stderr.strip().splitlines() or ["failed without a word"])[-1])


def machine_checks(workspace: Path) -> list[Check]:
    """Python, system, processors, memory and disk.

    Args:
        workspace: folder whose disk counts; it need not exist.
    """
    return [
        Check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        Check("system", "ok", f"{platform.system()} {platform.release()} on {platform.machine()}"),
        Check("processors", "ok", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        memory_check(),
        disk_check(workspace),
    ]


def memory_check(meminfo: Path = _MEMORY_TABLE) -> Check:
    """Memory that programs can still get.

    Args:
        meminfo: Linux' table of it.
    """
    free = available_memory(meminfo)
    if free is None:
        return Check("memory", "warn", "not known")
    advice = "close other programs; training needs about 2 GiB" if free < _LOW_MEMORY else ""
    return Check("memory", "warn" if advice else "ok", f"{free / _GIB:.1f} GiB available", advice)


def available_memory(meminfo: Path = _MEMORY_TABLE) -> int | None:
    """Bytes of memory that programs can still get; None where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def disk_check(workspace: Path) -> Check:
    """Room on the workspace's disk and whether it can be written.

    Args:
        workspace: folder that need not exist.
    """
    existing, free = free_disk(workspace)
    value = f"{free / _GIB:.1f} GiB free for {workspace}"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("disk", "warn", f"{existing} cannot be written", "name another folder with --workspace")
    if free < _LOW_DISK:
        return Check("disk", "warn", value, "free some space or name another folder with --workspace")
    return Check("disk", "ok", value)


def free_disk(workspace: Path) -> tuple[Path, int]:
    """The nearest folder that exists, and the bytes that are free on its disk."""
    existing = next(path for path in (workspace.absolute(), *workspace.absolute().parents) if path.exists())
    return existing, shutil.disk_usage(existing).free


def room_check(generator: str, weights: float, workspace: Path, meminfo: Path = _MEMORY_TABLE) -> Check:
    """Whether engines of a generator can be built here.

    The build writes a network, then once more with its sizes fixed. Its memory peaks when networks compute
    for the comparison; one measured model speaks for all.

    Args:
        generator: its name.
        weights: bytes of all its networks in fp32.
        workspace: where the engines would be written.
        meminfo: Linux' table of memory.
    """
    disk, memory = 2 * weights, _PEAK * weights + _LIBRARIES
    (_, disk_free), memory_free = free_disk(workspace), available_memory(meminfo)
    value = f"building engines takes {_size(disk)} of disk and {_size(memory)} of memory"
    advice = []
    if disk_free < disk:
        advice.append(f"{_size(disk - disk_free)} of disk too little: free some, or name another --workspace")
    if memory_free is not None and memory_free < memory:
        lacking = _size(memory - memory_free)
        advice.append(f"{lacking} of memory too little: build on a larger machine and copy the folder")
    return Check(f"  {generator}", "warn" if advice else "ok", value, "; ".join(advice))


def _size(count: float) -> str:
    """Bytes in words."""
    return f"{count / _GIB:.1f} GiB" if count > _GIB / 10 else f"{count / 2**20:.0f} MiB"


def base_check(modules: Sequence[str] = ("click", "numpy", "PIL", "tqdm")) -> Check:
    """Whether everything that the base needs really imports.

    Args:
        modules: import names.
    """
    found, broken = [], []
    for name in modules:
        try:
            importlib.import_module(name)
            found.append(f"{name} {installed(_DISTRIBUTIONS.get(name, name)) or '?'}")
        except Exception as error:  # a broken package may raise anything
            broken.append(f"{name} ({' '.join(str(error).split())})")
    if broken:
        return Check("base", "missing", f"does not import: {', '.join(broken)}", "pip install synthkit-edge")
    return Check("base", "ok", ", ".join(found))


_DISTRIBUTIONS = {"PIL": "pillow"}


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, None where it is not installed.

    Args:
        distribution: name as pip knows it.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_check() -> Check:
    """Graphics processors and driver, as the vendor's own tool tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return Check("gpu", "missing", "no nvidia-smi: no NVIDIA GPU, or its driver is not installed")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("gpu", "warn", f"nvidia-smi does not work: {error}", "reinstall the NVIDIA driver")
    if done.returncode:
        text = " ".join((done.stdout + done.stderr).split())
        return Check("gpu", "warn", f"nvidia-smi fails: {text}", "reinstall the NVIDIA driver")
    return Check("gpu", "ok", "; ".join(done.stdout.strip().splitlines()) or "none listed")


def jetpack_check(release: Path = Path("/etc/nv_tegra_release")) -> Check:
    """JetPack generation of a Jetson.

    Args:
        release: the file that a Jetson's system carries.
    """
    try:
        text = release.read_text(encoding="utf-8")
    except OSError:
        return Check("jetpack", "missing", "not a Jetson")
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    if not found:
        return Check("jetpack", "warn", f"{release} is not understood: {' '.join(text.split())[:80]}")
    generation = _JETPACK_OF_L4T.get(found[1], "of an unknown generation")
    return Check("jetpack", "ok", f"JetPack {generation} (L4T {found[1]}.{found[2]})")


def hub_check(environment: Mapping[str, str], wanted: bool) -> Check:
    """Whether the model hub may be asked and, where that is wanted, whether it answers.

    Args:
        environment: the process's variables.
        wanted: whether the network may be touched.
    """
    if environment.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Check("hub", "ok", "off (HF_HUB_OFFLINE is set): local folders and the hub's cache only")
    if not wanted:
        return Check("hub", "ok", "not asked (--hub asks it); used only when a hub id is given")
    reply = ask("synthkit.probes:hub_answers", timeout=30)
    if reply.error:
        advice = "copy a model's diffusers folder here, and give it with --model DIR"
        return Check("hub", "missing", f"does not answer: {reply.error}", advice)
    return Check("hub", "ok", f"{reply.data} answers")
