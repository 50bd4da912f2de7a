"""A stage and its output folder: hash the inputs, work under a temporary name, rename when whole.

    few_shots/ ──fingerprint──► key ──► is `style/manifest.json` of that key?  yes: skip
                                        is `.style.partial/` of that key?      yes: resume in it
                                        otherwise: start in an empty `.style.partial/`
    run(work folder) ──► manifest.json written last ──► folder renamed to `style/`

A folder under its final name is therefore always whole, and a killed run loses nothing that `Stage.run` can
take up again. This module knows no particular stage.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

import synthkit
from synthkit.config import keyed
from synthkit.errors import WorkspaceError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_KEY_FILE = ".key.json"  # lies in a partial folder and says which inputs it was begun with
_REPORTED = (
    "numpy pillow torch torchvision timm diffusers transformers optimum-onnx onnx "
    "onnxruntime onnxruntime-gpu tensorrt"
).split()


@dataclass(frozen=True)
class Key:
    """Everything that decides a stage's result: no path, no time, not the package's version.

    Attributes:
        inputs: name -> fingerprint of everything that the stage reads.
        settings: recipe section -> its settings dataclass; fields that change no result do not count.
        resolved: JSON data of what was decided from them and from the machine, such as the backend.
    """

    inputs: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if both := self.inputs.keys() & self.resolved.keys():
            raise ValueError(f"an input and something resolved share the name {', '.join(sorted(both))}")

    def values(self) -> dict[str, Any]:
        """Name -> JSON data of everything that counts; a setting's name is "section.name"."""
        settings = {
            f"{section}.{name}": value
            for section, values in self.settings.items()
            for name, value in keyed(values).items()
        }
        return dict(json.loads(json.dumps({**self.inputs, **settings, **self.resolved}, default=str)))


class Stage(Protocol):
    """One step of the work: it reads folders and writes one folder.

    Attributes:
        version: raised whenever the same key would give another result; a part of the key.
    """

    version: ClassVar[int]

    @property
    def name(self) -> str:
        """The command's name."""

    @property
    def out(self) -> Path:
        """The folder to write."""

    def check(self, *, fetch: bool) -> None:
        """Refuse what cannot be used, before the stages before it have run: it reads nothing of theirs.

        Args:
            fetch: whether a hub model may be fetched to look at it.
        """

    def key(self) -> Key:
        """What decides the result; called when the stages before it have run."""

    def run(self, work: Path, previous: Path | None) -> Mapping[str, Any]:
        """Write every file of the stage.

        Args:
            work: folder to write into, which may hold what an interrupted run of the same key has written.
            previous: finished folder of an earlier run, to take over what is still right; None where there is
                none, or where everything is to be made anew.

        Returns:
            the stage's metrics, as JSON data.
        """


@dataclass(frozen=True)
class FunctionStage:
    """A stage made of a key that is at hand and a function, for studies that keep many small results.

    Attributes:
        name: names it in the manifest.
        out: the folder to write.
        decides: what decides the result.
        function: writes into the folder that it is given, and returns the metrics.
    """

    version: ClassVar[int] = 1

    name: str
    out: Path
    decides: Key
    function: Callable[[Path], Mapping[str, Any]]

    def check(self, *, fetch: bool) -> None:
        """Refuse nothing."""

    def key(self) -> Key:
        """What decides the result."""
        return self.decides

    def run(self, work: Path, previous: Path | None) -> Mapping[str, Any]:
        """Call the function."""
        return self.function(work)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a finished stage folder.

    Attributes:
        stage: the command's name.
        version: of the stage.
        key: digest of stage, version, inputs, settings and what was resolved.
        inputs: name -> fingerprint.
        settings: recipe section -> all its settings, the seed among them, as `--config manifest.json` takes.
        resolved: what was decided from the settings and the machine.
        versions: package -> version that made it.
        metrics: what the stage measured.
        outputs: relative path -> {"sha256", "bytes"} of every file.
        seconds: working time of the run that finished it.
    """

    stage: str
    version: int
    key: str
    inputs: dict[str, str]
    settings: dict[str, dict[str, Any]]
    resolved: dict[str, Any]
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


@dataclass(frozen=True)
class _Request:
    """A stage with its key, which is computed once: it may take the reading of many files."""

    stage: Stage
    key: Key

    @property
    def digest(self) -> str:
        return digest([self.stage.name, self.stage.version, self.key.values()])

    @property
    def partial(self) -> Path:
        """Where the stage works until it is done."""
        return _beside(self.stage.out, "partial")


def _beside(out: Path, suffix: str) -> Path:
    real = out.resolve()  # a link to a larger disk stays a link, and "." has a name
    return real.with_name(f".{real.name}.{suffix}")


def digest(data: Any) -> str:
    """SHA-256 of JSON data, independent of key order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content; a file that has not been touched since is not read twice in a process."""
    real = path.resolve()
    about = real.stat()
    if time.time_ns() - about.st_mtime_ns < _SETTLED_NS:
        return _read_sha256(real)
    return _sha256(real, about.st_size, about.st_mtime_ns, about.st_ino)


# A file this young may be written again without its time changing: file systems count in steps.
_SETTLED_NS = 2_000_000_000


@functools.lru_cache(maxsize=100_000)
def _sha256(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    return _read_sha256(path)


def _read_sha256(path: Path) -> str:
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


def stage_state(stage: Stage, *, force: bool = False) -> str:
    """One phrase: "unchanged", "forced", "interrupted", "absent" or "changed: <what>"."""
    state = _state(_Request(stage, stage.key()))
    return "forced" if force and state == "unchanged" else state


def recorded_inputs(workspace: Path) -> set[str]:
    """Fingerprints of everything that the finished stages of a workspace have read."""
    if not workspace.is_dir():
        return set()
    manifests = [read_manifest(folder) for folder in workspace.iterdir() if folder.is_dir()]
    return {value for manifest in manifests if manifest for value in manifest.inputs.values()}


def same_key(stage: Stage, manifest: Manifest) -> bool:
    """Whether a finished folder was made of what the stage would be made of now."""
    return manifest.key == _Request(stage, stage.key()).digest


def _state(request: _Request) -> str:
    out = request.stage.out
    manifest = read_manifest(out)
    if manifest and manifest.key == request.digest:
        return "unchanged" if is_intact(out, manifest) else "changed: files of the folder itself"
    if _partial_key(request) == request.digest:
        return "interrupted"
    return f"changed: {', '.join(_differences(manifest, request))}" if manifest else "absent"


def _differences(manifest: Manifest, request: _Request) -> list[str]:
    settings = {
        f"{section}.{name}": value
        for section, values in manifest.settings.items()
        for name, value in values.items()
    }
    before, now = {**manifest.inputs, **settings, **manifest.resolved}, request.key.values()
    changed = sorted(name for name, value in now.items() if name not in before or before[name] != value)
    gone = sorted(name for name in {*manifest.inputs, *manifest.resolved} if name not in now)
    return [*changed, *gone] or [f"the stage's version, {manifest.version} before"]


def _partial_key(request: _Request) -> str | None:
    try:
        return str(json.loads((request.partial / _KEY_FILE).read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError):
        return None


def run_stage(stage: Stage, *, force: bool = False) -> StageResult:
    """Make a stage's folder, or find it made.

    Args:
        stage: what is asked for.
        force: redo the stage even when nothing changed.

    Raises:
        WorkspaceError: the output folder holds files that are no stage's.
    """
    stage.check(fetch=True)
    request = _Request(stage, stage.key())
    manifest = read_manifest(stage.out)
    if manifest and not force and _state(request) == "unchanged":
        log.info("%s: skipped, nothing changed since %s was written", stage.name, stage.out)
        return StageResult(stage.out, manifest, skipped=True)
    _refuse_foreign(stage.out)
    _prepare(request, force)
    started = time.perf_counter()
    metrics = dict(stage.run(request.partial, stage.out if manifest and not force else None))
    manifest = Manifest(
        stage.name,
        stage.version,
        request.digest,
        dict(request.key.inputs),
        {section: asdict(values) for section, values in request.key.settings.items()},
        dict(request.key.resolved),
        versions(),
        metrics,
        list_outputs(request.partial),
        round(time.perf_counter() - started, 3),
    )
    write_json(request.partial / MANIFEST, asdict(manifest))
    _replace(request.partial, stage.out.resolve())
    return StageResult(stage.out, manifest)


def run_stages(stages: Sequence[Stage], *, force: Collection[str] = ()) -> Iterator[StageResult]:
    """Run stages in order, each when its result is asked for.

    What a late stage would refuse is refused before the hours of the stages before it.

    Args:
        stages: each reads what those before it write.
        force: names of the stages to redo even when nothing changed.
    """
    for stage in stages:
        stage.check(fetch=True)
    for stage in stages:
        result = run_stage(stage, force=stage.name in force)
        if not result.skipped:
            log.info("%s: wrote %s in %.0f s", stage.name, stage.out, result.manifest.seconds)
        yield result


def plan_stages(stages: Sequence[Stage], *, force: Collection[str] = ()) -> dict[str, str]:
    """Name -> state of each stage, without doing anything; "follows" after one that is to run."""
    for stage in stages:
        stage.check(fetch=False)
    plan: dict[str, str] = {}
    for stage in stages:
        waits = any(state != "unchanged" for state in plan.values())
        plan[stage.name] = "follows" if waits else stage_state(stage, force=stage.name in force)
    return plan


def _refuse_foreign(out: Path) -> None:
    """Replacing a folder deletes what it held, so it must be one that a stage has written."""
    if out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir())):
        return
    if out.exists():
        raise WorkspaceError(
            f"{out} exists and is not a folder that synthkit wrote (it has no {MANIFEST}); "
            "name another, or remove it first"
        )


def _prepare(request: _Request, force: bool) -> None:
    begun = request.partial.exists()
    if begun and (force or _partial_key(request) != request.digest):
        shutil.rmtree(request.partial)
    request.partial.mkdir(parents=True, exist_ok=True)
    write_json(request.partial / _KEY_FILE, {"key": request.digest})


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
    write_bytes(path, json_bytes(data, indent=2) + b"\n")


def json_bytes(data: Any, *, indent: int | None = None) -> bytes:
    """JSON data as UTF-8; a name that is no UTF-8 (half a surrogate pair) becomes JSON's own escape."""
    text = json.dumps(data, indent=indent, default=str, ensure_ascii=False)
    return text.encode(errors="backslashreplace")


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


# A file system without locks (some network mounts, FUSE) answers one of these.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


def lock(stream: IO[Any], *, wait: bool = False) -> bool:
    """Take an exclusive lock on an open file; it is given back when the file is closed.

    Args:
        stream: the open file.
        wait: wait for another process that holds the lock.

    Returns:
        False where the file system has no locks: the work is done, and a second run would not be noticed.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is off.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning(
            "%s lies on a file system without locks (%s); do not start a second run there meanwhile",
            *(stream.name, error.strerror),
        )
        return False
    return True


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
            lock(stream)
        except BlockingIOError:
            raise WorkspaceError(
                f"another run is using the workspace {workspace}; wait for it "
                "or name another with --workspace"
            ) from None
        yield
