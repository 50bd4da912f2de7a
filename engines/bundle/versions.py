"""A bundle's versions on a device: the present one under its name, the one before it beside it.

    bundle/             the present version, a plain folder
    bundle.previous/    the version before, a plain folder as well
    .bundle.next/       a version being written
    .bundle.swap/       exists for an instant, and only where folders cannot be exchanged (see below)

A new version is written and verified beside the old one, then the two folders exchange their names in one
system call (Linux: renameat2 with RENAME_EXCHANGE), so that whoever looks at `bundle/` sees the old or the
new version, whole, at every moment, whatever is killed. A link would do that as well, but a bundle is a
folder that people copy. File systems without that call (FAT, some network and overlay file systems) get three
renames; a kill between them leaves both versions whole beside the name, and the next command puts one back
(`find_again`).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from synthkit import artifacts
from synthkit.engines.bundle.format import FACTS
from synthkit.errors import BundleError, WorkspaceError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from <linux/fs.h> and <fcntl.h>


def previous_of(folder: Path) -> Path:
    """Where the version before a bundle lies."""
    real = folder.resolve()
    return real.with_name(f"{real.name}.previous")


def _hidden(folder: Path, suffix: str) -> Path:
    real = folder.resolve()
    return real.with_name(f".{real.name}.{suffix}")


def version_of(folder: Path) -> int | None:
    """A bundle's version; None where bundle.json, which is written last, cannot be read."""
    try:
        return int(json.loads((folder / FACTS).read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def next_version(folder: Path) -> int:
    """A number above every version that is kept."""
    return 1 + max(version_of(one) or 0 for one in (folder, previous_of(folder)))


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside a bundle for its next version; it is removed unless `install` took it.

    Raises:
        WorkspaceError: another run holds the bundle, or nothing can be written beside it.
    """
    work = _hidden(folder, "next")
    with lock(folder):
        settle(folder)
        try:
            work.mkdir()
        except OSError as error:
            raise WorkspaceError(_unwritable(folder, error)) from None
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def install(folder: Path, work: Path) -> None:
    """Make the version in the work folder the present one, and the present one the previous one."""
    for path in (
        *work.rglob("*"),
        work,
    ):  # a device may lose its power, which a rename alone does not survive
        _flush(path)
    _exchange(work, folder)
    _keep_as_previous(folder, work)
    _flush(folder.resolve().parent)


def rollback(folder: Path) -> tuple[int, int]:
    """Exchange a bundle and the version before it; a second time goes forward again.

    Returns:
        The version that was there and the one that is there now.

    Raises:
        BundleError: there is no version before it.
    """
    find_again(folder)
    if not folder.is_dir():
        raise BundleError(f"no bundle {folder}; name the folder that `synthkit update` was given")
    with lock(folder):
        settle(folder)
        now, before = version_of(folder), version_of(previous_of(folder))
        if now is None or before is None:
            raise BundleError(
                f"{folder} has no version to go back to: {previous_of(folder)} holds no bundle; "
                "`synthkit update` keeps one when it writes another"
            )
        _exchange(previous_of(folder), folder)
        _flush(folder.resolve().parent)
    return now, before


def find_again(folder: Path) -> None:
    """Put a bundle back that a killed run has left under another name; for commands that only read."""
    if not folder.exists() and _hidden(folder, "swap").exists():
        with lock(folder):
            settle(folder)


def settle(folder: Path) -> None:
    """Finish or undo what a killed run has left half done; nothing to do in all other cases.

    The caller holds the lock.
    """
    swap, work = _hidden(folder, "swap"), _hidden(folder, "next")
    if swap.exists() and not folder.exists():
        swap.rename(folder.resolve())
    elif swap.exists():
        _keep_as_previous(folder, swap)
    if (version_of(work) or 0) > 0 and (version_of(work) or 0) < (version_of(folder) or 0):
        _keep_as_previous(folder, work)  # killed after the exchange: this is the old version
    shutil.rmtree(work, ignore_errors=True)


def _keep_as_previous(folder: Path, old: Path) -> None:
    previous = previous_of(folder)
    if previous.exists():
        shutil.rmtree(previous)
    old.rename(previous)


def _exchange(first: Path, folder: Path) -> None:
    """Let two folders exchange their names."""
    second = folder.resolve()
    try:
        if not _exchange_at_once(first, second):
            swap = _hidden(folder, "swap")
            second.rename(swap)
            first.rename(second)
            swap.rename(first)
    except OSError as error:
        raise WorkspaceError(_unwritable(folder, error)) from None


def _exchange_at_once(first: Path, second: Path) -> bool:
    """Exchange by one system call; false where this system or file system has none."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # not Linux, or a C library from before 2018
        return False
    names = os.fsencode(first), os.fsencode(second)
    failed = call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(failed == 0)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a bundle for one run that changes it.

    Raises:
        WorkspaceError: another run holds it, or nothing can be written beside it.
    """
    try:
        stream = _hidden(folder, "lock").open("a+")
    except OSError as error:
        raise WorkspaceError(_unwritable(folder, error)) from None
    with stream:
        try:
            artifacts.lock(stream)
        except BlockingIOError:
            raise WorkspaceError(f"another run is updating {folder}; wait for it") from None
        yield


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"cannot write beside {folder}, where its next version is made: {error.strerror}; "
        "change the permissions of the folder around it, or copy the bundle to another place"
    )
