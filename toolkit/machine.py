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
_LOW_MEMORY, _LOW_DISK = 1 * _GIB, 2 * _GIB
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
        memory_check(Path("/proc/meminfo")),
        disk_check(workspace),
    ]


def memory_check(meminfo: Path) -> Check:
    """Memory that programs can still get.

    Args:
        meminfo: Linux' table of it.
    """
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
    except OSError:
        found = None
    if not found:
        return Check("memory", "warn", "not known")
    free = int(found[1]) * 1024
    advice = "close other programs; training needs about 2 GiB" if free < _LOW_MEMORY else ""
    return Check("memory", "warn" if advice else "ok", f"{free / _GIB:.1f} GiB available", advice)


def disk_check(workspace: Path) -> Check:
    """Room on the workspace's disk and whether it can be written.

    Args:
        workspace: folder that need not exist.
    """
    existing = next(path for path in (workspace.absolute(), *workspace.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    value = f"{free / _GIB:.1f} GiB free for {workspace}"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("disk", "warn", f"{existing} cannot be written", "name another folder with --workspace")
    if free < _LOW_DISK:
        return Check("disk", "warn", value, "free some space or name another folder with --workspace")
    return Check("disk", "ok", value)


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
        return Check("base", "missing", f"does not import: {', '.join(broken)}", "pip install synthkit")
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


def hub_check(environment: Mapping[str, str]) -> Check:
    """Whether the model hub may be asked; the network itself is never touched.

    Args:
        environment: the process's variables.
    """
    if environment.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return Check("hub", "ok", "off (HF_HUB_OFFLINE is set): local folders and the hub's cache only")
    return Check("hub", "ok", "not asked; used only when a hub id is given")
