"""Whatever is killed, a whole bundle lies under the name, or the next command puts one there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from synthkit.engines.bundle import versions as bundle_versions
from synthkit.engines.bundle.versions import (
    find_again,
    install,
    lock,
    next_version,
    previous_of,
    rollback,
    version_of,
    work_folder,
)
from synthkit.errors import BundleError, WorkspaceError


def write_version(folder: Path, version: int) -> None:
    """Stands for a bundle: two files that belong together, bundle.json last."""
    (folder / "model.onnx").write_text(f"model {version}")
    (folder / "bundle.json").write_text(json.dumps({"version": version}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle = tmp_path / "site" / "bundle"
    bundle.mkdir(parents=True)
    write_version(bundle, 1)
    return bundle


def write_next(folder: Path) -> None:
    with work_folder(folder) as work:
        write_version(work, next_version(folder))
        install(folder, work)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.name != ".bundle.lock")


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By one system call, and as on a file system that has none."""
    if request.param == "renames":
        monkeypatch.setattr(bundle_versions, "_exchange_at_once", lambda *_: False)
    return str(request.param)


def test_the_old_version_stays_beside_the_new_one(folder: Path, way: str) -> None:
    write_next(folder)
    assert (version_of(folder), version_of(previous_of(folder))) == (2, 1)
    write_next(folder)
    assert (version_of(folder), version_of(previous_of(folder))) == (3, 2)
    assert visible(folder) == ["bundle", "bundle.previous"]
    assert not folder.is_symlink()


def test_rollback_goes_back_and_forth(folder: Path, way: str) -> None:
    with pytest.raises(BundleError, match="no version to go back to"):
        rollback(folder)
    write_next(folder)
    assert rollback(folder) == (2, 1) and version_of(folder) == 1
    assert rollback(folder) == (1, 2) and version_of(folder) == 2
    rollback(folder)
    assert next_version(folder) == 3  # above both, so that a number never means two things
    assert visible(folder) == ["bundle", "bundle.previous"]


def test_what_fails_while_being_written_leaves_nothing(folder: Path) -> None:
    with pytest.raises(RuntimeError), work_folder(folder) as work:
        write_version(work, 2)
        raise RuntimeError
    assert visible(folder) == ["bundle"] and version_of(folder) == 1


def test_one_run_at_a_time(folder: Path) -> None:
    with lock(folder), pytest.raises(WorkspaceError, match="another run is updating"):
        write_next(folder)
    assert version_of(folder) == 1


def test_a_link_to_a_bundle_stays_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    write_next(link)
    assert link.is_symlink() and version_of(link) == 2 and version_of(folder) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_named(folder: Path) -> None:
    folder.parent.chmod(0o555)
    try:
        with pytest.raises(WorkspaceError, match="cannot write beside"):
            write_next(folder)
    finally:
        folder.parent.chmod(0o755)


def test_an_unwritable_place_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WorkspaceError, match=r"cannot write beside .*Permission denied"):
        write_next(folder)


KILL_EVERYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
from synthkit.engines.bundle import versions

folder, way, job = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if way == "renames":
    versions._exchange_at_once = lambda *_: False

def write_version(folder, number):
    (folder / "model.onnx").write_text(f"model {number}")
    (folder / "bundle.json").write_text(json.dumps({"version": number}))

def write_next():
    with versions.work_folder(folder) as work:
        write_version(work, versions.next_version(folder))
        versions.install(folder, work)

def killed_at(step):
    left = [step]
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "ctypes.dlsym"):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    write_next() if job == "install" else versions.rollback(folder)
    os._exit(0)

def whole(one):
    number = versions.version_of(one)
    return number is not None and (one / "model.onnx").read_text() == f"model {number}"

step, seen = 0, []
while True:
    step += 1
    shutil.rmtree(folder.parent)
    folder.mkdir(parents=True)
    write_version(folder, 1)
    write_next()
    write_next()  # 3 with 2 beside it
    child = os.fork()
    if child == 0:
        killed_at(step)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    if way == "exchange":
        assert whole(folder), f"step {step}: no whole bundle at its path"
    versions.find_again(folder)
    assert whole(folder), f"step {step}: not found again"
    seen.append(versions.version_of(folder))
    write_next()
    assert whole(folder) and whole(versions.previous_of(folder)), f"step {step}: the next run"
    assert versions.version_of(folder) > max(3, versions.version_of(versions.previous_of(folder)))
    left = {path.name for path in folder.parent.iterdir()}
    assert left == {"bundle", "bundle.previous", ".bundle.lock"}, left
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("job", ["install", "rollback"])
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_before_every_single_step(folder: Path, way: str, job: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, folder, way, job],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen) == ({3, 4} if job == "install" else {3, 2})  # kills fell on both sides of the change


def test_find_again_does_nothing_to_a_bundle_that_is_there(folder: Path) -> None:
    work = folder.with_name(".bundle.next")
    work.mkdir()
    find_again(folder)
    assert work.exists()  # it may be another run's
    find_again(folder.with_name("absent"))
    assert not folder.with_name("absent").exists()
