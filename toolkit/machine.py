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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "missing"]

_GIB = 2**30
_MEMORY_TABLE = Path("/proc/meminfo")
_JETSON_RELEASE = Path("/etc/nv_tegra_release")
_LOW_MEMORY, _LOW_DISK = 1 * _GIB, 2 * _GIB
_DISTRIBUTIONS = {"PIL": "pillow"}  # of modules that have another name


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table.

    Attributes:
        name: the thing that was checked.
        status: "ok", "warn" (there, but not as it should be) or "missing".
        value: the result.
        advice: what to do about it; empty when nothing is to be done.
    """

    name: str
    status: Status
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Reply:
    """The answer of a process of its own: data, or the last line of its error."""

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
    return Reply(error=(done.stderr.strip().splitlines() or ["failed without a message"])[-1])


def machine_checks(workspace: Path) -> list[Check]:
    """Python, system, memory, disk and GPU.

    Args:
        workspace: folder whose disk counts; it need not exist.
    """
    return [
        Check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        system_check(),
        memory_check(),
        disk_check(workspace),
        gpu_check(),
    ]


def system_check(release: Path = _JETSON_RELEASE) -> Check:
    """System, processors and, on a Jetson, its L4T release.

    Args:
        release: the file that a Jetson's system carries.
    """
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} processors"
    value = f"{platform.system()} {platform.release()} on {platform.machine()}, {cores}"
    if release.is_file():
        text = release.read_text(encoding="utf-8")
        version = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
        value += f", Jetson (L4T {version[1]}.{version[2]})" if version else ", Jetson"
    return Check("system", "ok", value)


def memory_check(meminfo: Path = _MEMORY_TABLE) -> Check:
    """Memory that programs can still get.

    Args:
        meminfo: Linux' table of it.
    """
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
    except OSError:
        available = None
    if available is None:
        return Check("memory", "warn", "not known")
    free = int(available[1]) * 1024
    advice = "close other programs; training needs about 2 GiB" if free < _LOW_MEMORY else ""
    return Check("memory", "warn" if advice else "ok", f"{free / _GIB:.1f} GiB available", advice)


def disk_check(workspace: Path) -> Check:
    """Free space on the workspace's disk, and whether it can be written.

    Args:
        workspace: folder that need not exist.
    """
    existing = next(path for path in (workspace.absolute(), *workspace.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("disk", "warn", f"{existing} cannot be written", "name another folder with --workspace")
    free = shutil.disk_usage(existing).free
    advice = "free some space or name another folder with --workspace" if free < _LOW_DISK else ""
    return Check("disk", "warn" if advice else "ok", f"{free / _GIB:.1f} GiB free for {workspace}", advice)


def gpu_check() -> Check:
    """Graphics processors and driver, as the vendor's own tool reports them."""
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


def base_check(modules: Sequence[str] = ("click", "numpy", "PIL", "tqdm")) -> Check:
    """Import everything that every command needs.

    Args:
        modules: import names.
    """
    working, broken = [], []
    for name in modules:
        # A broken package may raise anything.
        try:
            importlib.import_module(name)
            working.append(f"{name} {installed(_DISTRIBUTIONS.get(name, name)) or '?'}")
        except Exception as error:
            broken.append(f"{name} ({' '.join(str(error).split())})")
    if broken:
        return Check("base", "missing", f"does not import: {', '.join(broken)}", "pip install synthkit-edge")
    return Check("base", "ok", ", ".join(working))


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, None where it is not installed.

    Args:
        distribution: name as pip knows it.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
