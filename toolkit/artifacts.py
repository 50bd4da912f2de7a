"""A stage's output folder: hash the inputs, work under a temporary name, rename when whole.

    few_shots/ ──fingerprint──► key ──► is `style/manifest.json` of that key?  yes: skip
                                        is `.style.partial/` of that key?      yes: resume in it
                                        otherwise: start in an empty `.style.partial/`
    produce(work folder) ──► manifest.json written last ──► folder renamed to `style/`

A folder under its final name is therefore always whole, and a killed run loses nothing that `produce` can
take up again. This module knows no particular stage.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import synthkit
from synthkit.errors import WorkspaceError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SYNTHETIC = "synthetic"  # subfolder of what `train` writes: the student before it saw a real photo
_KEY_FILE = ".key.json"  # lies in a partial folder and says which inputs it was begun with
_REPORTED = (
    "numpy pillow torch torchvision timm diffusers transformers optimum-onnx onnx "
    "onnxruntime onnxruntime-gpu tensorrt"
).split()


@dataclass(frozen=True)
class Request:
    """What a stage is asked to make.

    Attributes:
        stage: the command's name.
        out: the folder to write.
        inputs: name -> fingerprint of everything that the stage reads.
        config: JSON data of every setting that changes the result.
    """

    stage: str
    out: Path
    inputs: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Digest of stage, inputs, settings and synthkit's version; no path and no time."""
        return digest([self.stage, dict(self.inputs), dict(self.config), synthkit.__version__])

    @property
    def partial(self) -> Path:
        """Where the stage works until it is done."""
        return _beside(self.out, "partial")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a finished stage folder.

    Attributes:
        stage: the command's name.
        key: digest of inputs and settings.
        inputs: name -> fingerprint.
        config: the settings, the seed among them.
        versions: package -> version that made it.
        metrics: what the stage measured.
        outputs: relative path -> {"sha256", "bytes"} of every file.
        seconds: working time of the run that finished it.
    """

    stage: str
    key: str
    inputs: dict[str, str]
    config: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class StageResult:
    """A finished stage: its folder, its manifest and whether the work had been done before."""

    out: Path
    manifest: Manifest
    skipped: bool = field(default=False)


def _beside(out: Path, suffix: str) -> Path:
    real = out.resolve()  # a link to a larger disk stays a link, and "." has a name
    return real.with_name(f".{real.name}.{suffix}")


def digest(data: Any) -> str:
    """SHA-256 of JSON data, independent of key order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as stream:
        state = hashlib.sha256()  # Python 3.10 has no file_digest
        while block := stream.read(1 << 20):
            state.update(block)
        return state.hexdigest()


def fingerprint(path: Path) -> str:
    """Digest of the content of a file or folder: relative names and bytes, no times, no absolute path.

    A stage folder that still matches its manifest is not read again.
    """
    if not path.is_dir():
        return file_sha256(path)
    manifest = read_manifest(path)
    if manifest and is_intact(path, manifest):
        return digest({name: entry["sha256"] for name, entry in manifest.outputs.items()})
    return digest({name: entry["sha256"] for name, entry in list_outputs(path).items()})


def list_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> {"sha256", "bytes"} of every file but the manifest and hidden ones."""
    return {
        str(path.relative_to(folder)): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in _files(folder)
    }


def _files(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):  # a class folder may be a link
        here = Path(root).resolve()
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not here.is_relative_to(Path(root, name).resolve())
        ]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path != folder / MANIFEST and path.is_file())


def is_intact(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder holds just the files of its manifest, by name, size and, where touched, by content.

    A file as old as the manifest is taken for what it was: to read all images and weights again at every run
    would take longer than many a stage. In a copy of the folder all files may be younger, and are read.
    """
    present = {str(path.relative_to(folder)): path for path in _files(folder)}
    if present.keys() != manifest.outputs.keys():
        return False
    written = (folder / MANIFEST).stat().st_mtime_ns
    return all(
        (found := path.stat()).st_size == manifest.outputs[name]["bytes"]
        and (found.st_mtime_ns < written or file_sha256(path) == manifest.outputs[name]["sha256"])
        for name, path in present.items()
    )


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None where there is none that can be read."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def stage_state(request: Request) -> str:
    """One phrase: "unchanged", "interrupted", "absent" or "changed: <what>"."""
    manifest = read_manifest(request.out)
    if manifest and manifest.key == request.key:
        return "unchanged" if is_intact(request.out, manifest) else "changed: files of the folder itself"
    if _partial_key(request) == request.key:
        return "interrupted"
    return f"changed: {', '.join(_differences(manifest, request))}" if manifest else "absent"


def _differences(manifest: Manifest, request: Request) -> list[str]:
    before = {**manifest.inputs, **manifest.config}
    now = json.loads(json.dumps({**request.inputs, **request.config}, default=str))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return changed or ["synthkit's version"]


def _partial_key(request: Request) -> str | None:
    try:
        return str(json.loads((request.partial / _KEY_FILE).read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError):
        return None


def run_stage(
    request: Request, produce: Callable[[Path], Mapping[str, Any]], *, force: bool = False
) -> StageResult:
    """Make a stage's folder, or find it made.

    Args:
        request: what is asked for.
        produce: writes every file into the folder it is given, which holds what an interrupted run with the
            same key had written, and returns the stage's metrics.
        force: redo the stage even when nothing changed.

    Raises:
        WorkspaceError: the output folder holds files that are no stage's.
    """
    manifest = read_manifest(request.out)
    if manifest and not force and stage_state(request) == "unchanged":
        log.info("%s: skipped, nothing changed since %s was written", request.stage, request.out)
        return StageResult(request.out, manifest, skipped=True)
    _refuse_foreign(request.out)
    _prepare(request, force)
    started = time.perf_counter()
    metrics = dict(produce(request.partial))
    manifest = Manifest(
        request.stage,
        request.key,
        dict(request.inputs),
        dict(request.config),
        versions(),
        metrics,
        list_outputs(request.partial),
        round(time.perf_counter() - started, 3),
    )
    write_json(request.partial / MANIFEST, asdict(manifest))
    _replace(request.partial, request.out.resolve())
    return StageResult(request.out, manifest)


def _refuse_foreign(out: Path) -> None:
    """Replacing a folder deletes what it held, so it must be one that a stage has written."""
    if out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir())):
        return
    if out.exists():
        raise WorkspaceError(
            f"{out} exists and is not a folder that synthkit wrote (it has no {MANIFEST}); "
            "name another, or remove it first"
        )


def _prepare(request: Request, force: bool) -> None:
    begun = request.partial.exists()
    if begun and (force or _partial_key(request) != request.key):
        shutil.rmtree(request.partial)
    request.partial.mkdir(parents=True, exist_ok=True)
    write_json(request.partial / _KEY_FILE, {"key": request.key})


def _replace(new: Path, out: Path) -> None:
    old = _beside(out, "old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    (out / _KEY_FILE).unlink()  # until here a killed run still finds its partial folder by the key
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON data atomically: a reader sees the old file or the whole new one."""
    write_bytes(path, (json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def versions() -> dict[str, str]:
    """Package -> installed version of synthkit and of the libraries that shape its results."""
    found = {"synthkit": synthkit.__version__}
    for package in _REPORTED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def workspace_lock(workspace: Path) -> Iterator[None]:
    """Hold a workspace for one run.

    Raises:
        WorkspaceError: another process holds it, or it cannot be written.
    """
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        stream = (workspace / ".lock").open("a+")
    except OSError as error:
        raise WorkspaceError(
            f"cannot write the workspace {workspace}: {error.strerror}; name another with --workspace"
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkspaceError(
                f"another run is using the workspace {workspace}; wait for it "
                "or name another with --workspace"
            ) from None
        yield
