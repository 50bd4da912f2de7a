"""Stage folders: skipped, redone, resumed, replaced in one step, and never lost."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthkit import artifacts
from synthkit.artifacts import (
    MANIFEST,
    FunctionStage,
    Key,
    StageResult,
    digest,
    fingerprint,
    plan_stages,
    read_manifest,
    run_stage,
    run_stages,
    stage_state,
    workspace_lock,
    write_bytes,
)
from synthkit.config import setting
from synthkit.errors import ConfigError, WorkspaceError

Produce = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class CookSettings:
    seed: int = setting(0, "seed")
    helpers: int = setting(1, "people in the kitchen", in_key=False)


def never(folder: Path) -> Mapping[str, Any]:
    raise AssertionError("the work was done again")


def cook(out: Path, produce: Produce = never, **changes: Any) -> FunctionStage:
    settings = changes.get("settings", CookSettings())
    key = Key(changes.get("inputs", {"photos": "abc"}), {"cook": settings}, changes.get("resolved", {}))
    return FunctionStage("cook", out, key, produce)


def cooked(text: str = "soup") -> Produce:
    def produce(folder: Path) -> Mapping[str, Any]:
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / "dish.txt").write_text(text)
        return {"taste": 1.0}

    return produce


def run(out: Path, produce: Produce = never, force: bool = False, **changes: Any) -> StageResult:
    return run_stage(cook(out, produce, **changes), force=force)


def test_a_finished_folder_tells_how_it_was_made(tmp_path: Path) -> None:
    result = run(tmp_path / "out", cooked())
    assert not result.skipped
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in result.out.iterdir()) == ["deep", MANIFEST]
    manifest = read_manifest(result.out)
    assert manifest == result.manifest
    assert manifest.metrics == {"taste": 1.0}
    assert manifest.outputs["deep/dish.txt"]["bytes"] == 4
    assert manifest.versions["synthkit"] == artifacts.synthkit.__version__


def test_unchanged_is_skipped_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = run(tmp_path / "out", cooked())
    with caplog.at_level("INFO", logger="synthkit"):
        second = run(tmp_path / "out")
    assert second.skipped
    assert second.manifest == first.manifest
    assert "cook: skipped, nothing changed" in caplog.text


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"inputs": {"photos": "new"}}, "changed: photos"),
        ({"settings": CookSettings(seed=1)}, "changed: cook.seed"),
        ({"resolved": {"extra": 2}}, "changed: extra"),
        ({"inputs": {}}, "changed: photos"),
    ],
)
def test_a_change_of_any_input_redoes(tmp_path: Path, changes: dict[str, Any], state: str) -> None:
    run(tmp_path / "out", cooked("old"))
    assert stage_state(cook(tmp_path / "out", **changes)) == state
    assert not run(tmp_path / "out", cooked("new"), **changes).skipped
    assert (tmp_path / "out/deep/dish.txt").read_text() == "new"


def test_another_version_of_the_stage_redoes_and_one_of_synthkit_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "out", cooked())
    monkeypatch.setattr("synthkit.__version__", "99")
    assert stage_state(cook(tmp_path / "out")) == "unchanged"
    monkeypatch.setattr(FunctionStage, "version", 2)
    assert stage_state(cook(tmp_path / "out")) == "changed: the stage's version, 1 before"


def test_a_setting_that_changes_no_result_redoes_nothing_and_is_recorded(tmp_path: Path) -> None:
    done = run(tmp_path / "out", cooked(), settings=CookSettings(helpers=3))
    assert done.manifest.settings == {"cook": {"seed": 0, "helpers": 3}}
    assert run(tmp_path / "out", settings=CookSettings(helpers=7)).skipped


def test_stages_in_a_row_are_checked_first_and_planned_with_force(tmp_path: Path) -> None:
    made: list[str] = []

    def produce(folder: Path) -> Mapping[str, Any]:
        made.append(folder.name)
        return {}

    stages = [replace(cook(tmp_path / name, produce), name=name) for name in ("soup", "roast", "cake")]
    assert plan_stages(stages) == {"soup": "absent", "roast": "follows", "cake": "follows"}
    walk = run_stages(stages)
    assert next(walk).manifest.stage == "soup" and made == [".soup.partial"], "each when it is asked for"
    assert [one.skipped for one in walk] == [False, False]
    assert plan_stages(stages) == dict.fromkeys(("soup", "roast", "cake"), "unchanged")
    assert plan_stages(stages, force=["roast"]) == {"soup": "unchanged", "roast": "forced", "cake": "follows"}
    assert [one.skipped for one in run_stages(stages, force=["roast"])] == [True, False, True]

    class Refusing(FunctionStage):
        def check(self, *, fetch: bool) -> None:
            raise ConfigError(f"no cake, {fetch}")

    late = [cook(tmp_path / "new", produce), Refusing("cake", tmp_path / "cake", Key({}), produce)]
    for walk_or_plan in (lambda: list(run_stages(late)), lambda: plan_stages(late)):
        with pytest.raises(ConfigError, match="no cake"):
            walk_or_plan()
    assert not (tmp_path / "new").exists(), "refused before the first stage ran"


def test_previous_is_what_a_stage_may_take_over(tmp_path: Path) -> None:
    seen: list[Path | None] = []

    class Recorded(FunctionStage):
        def run(self, work: Path, previous: Path | None) -> Mapping[str, Any]:
            seen.append(previous)
            return {}

    for seed, force in ((0, False), (1, False), (1, True)):
        key = Key({}, {"cook": CookSettings(seed)})
        run_stage(Recorded("cook", tmp_path / "out", key, never), force=force)
    assert seen == [None, tmp_path / "out", None]


def test_a_file_is_not_read_twice_unless_it_was_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    reads: list[Path] = []
    read = artifacts._read_sha256
    monkeypatch.setattr(artifacts, "_read_sha256", lambda one: reads.append(one) or read(one))
    young = [artifacts.file_sha256(path) for _ in range(2)]
    assert len(reads) == 2, "a young file may be written again within a tick of the clock"
    os.utime(path, (1, 1))
    old = [artifacts.file_sha256(path) for _ in range(3)]
    assert len(reads) == 3 and len({*young, *old}) == 1
    path.write_bytes(b"two")
    os.utime(path, (2, 2))
    assert artifacts.file_sha256(path) == hashlib.sha256(b"two").hexdigest()


def test_force_redoes(tmp_path: Path) -> None:
    run(tmp_path / "out", cooked("old"))
    assert not run(tmp_path / "out", cooked("new"), force=True).skipped
    assert (tmp_path / "out/deep/dish.txt").read_text() == "new"


def test_younger_files_of_the_same_content_are_no_change(tmp_path: Path) -> None:
    out = run(tmp_path / "out", cooked()).out
    for path in (out / MANIFEST, out / "deep/dish.txt"):  # as a copy leaves them
        os.utime(path)
    assert run(out, cooked()).skipped


@pytest.mark.parametrize("harm", ["remove", "grow", "edit", "add", "manifest"])
def test_tampering_is_noticed(tmp_path: Path, harm: str) -> None:
    out = run(tmp_path / "out", cooked()).out
    if harm == "remove":
        (out / "deep/dish.txt").unlink()
    elif harm == "manifest":
        (out / MANIFEST).write_text('{"key": ')
    elif harm == "edit":
        (out / "deep/dish.txt").write_text("stew")  # as long as "soup"
    else:
        (out / "deep" / ("dish.txt" if harm == "grow" else "more.txt")).write_text("stew and bread")
    assert stage_state(cook(out)) == (
        "absent" if harm == "manifest" else "changed: files of the folder itself"
    )
    assert not run(out, cooked()).skipped
    assert sorted(path.name for path in (out / "deep").iterdir()) == ["dish.txt"]


def interrupted(folder: Path) -> Mapping[str, Any]:
    (folder / "half.txt").write_text("half")
    raise KeyboardInterrupt


def test_interrupted_work_is_taken_up(tmp_path: Path) -> None:
    def second(folder: Path) -> Mapping[str, Any]:
        assert (folder / "half.txt").read_text() == "half"
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupted)
    assert not (tmp_path / "out").exists()
    assert stage_state(cook(tmp_path / "out")) == "interrupted"
    run(tmp_path / "out", second)
    assert (tmp_path / "out/half.txt").exists()


@pytest.mark.parametrize("changes", [{"force": True}, {"settings": CookSettings(seed=1)}])
def test_interrupted_work_of_other_inputs_is_not(tmp_path: Path, changes: dict[str, Any]) -> None:
    def second(folder: Path) -> Mapping[str, Any]:
        assert not (folder / "half.txt").exists()
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupted)
    run(tmp_path / "out", second, **changes)


def test_a_full_disk_leaves_the_old_folder_whole_and_the_work_done(tmp_path: Path) -> None:
    def full(folder: Path) -> Mapping[str, Any]:
        (folder / "half.txt").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    run(tmp_path / "out", cooked("old"))
    with pytest.raises(OSError, match="No space"):
        run(tmp_path / "out", full, settings=CookSettings(seed=1))
    assert run(tmp_path / "out").skipped
    assert (tmp_path / ".out.partial/half.txt").exists()


KILLED = """
import os, pathlib, signal, sys
from synthkit import artifacts
out, where = pathlib.Path(sys.argv[1]), sys.argv[2]
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
def produce(folder):
    (folder / "dish.txt").write_text("new")
    if where == "produce": die()
    return {}
if where == "manifest": artifacts.asdict = die
if where == "swap":
    rename = pathlib.Path.rename
    pathlib.Path.rename = lambda self, to: die() if self.name.endswith(".partial") else rename(self, to)
if where == "end": pathlib.Path.unlink = die
key = artifacts.Key({"photos": "abc"}, {}, {"seed": 1})
artifacts.run_stage(artifacts.FunctionStage("cook", out, key, produce))
"""


@pytest.mark.parametrize("where", ["produce", "manifest", "swap", "end"])
def test_a_killed_run_loses_neither_the_old_folder_nor_its_work(tmp_path: Path, where: str) -> None:
    out = run(tmp_path / "out", cooked("old")).out
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), where], check=False)
    assert killed.returncode == -signal.SIGKILL
    old = tmp_path / ".out.old" if where in ("swap", "end") else out
    assert (old / "deep/dish.txt").read_text() == "old"
    assert read_manifest(old)

    def resumed(folder: Path) -> Mapping[str, Any]:
        assert (folder / "dish.txt").read_text() == "new"
        return {}

    stage = FunctionStage("cook", out, Key({"photos": "abc"}, {}, {"seed": 1}), resumed)
    assert run_stage(stage).skipped == (where == "end")
    assert (out / "dish.txt").read_text() == "new"


def test_a_folder_that_no_stage_wrote_is_never_replaced(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "only-copy.jpg").write_text("precious")
    with pytest.raises(WorkspaceError, match="not a folder that synthkit wrote"):
        run(photos, never, force=True)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(WorkspaceError, match="not a folder"):
        run(tmp_path / "file")
    assert (photos / "only-copy.jpg").read_text() == "precious"


def test_the_current_folder_and_links_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "out").symlink_to("large-disk")
    run(tmp_path / "out", cooked())
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "large-disk/deep/dish.txt").exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    run(Path(), cooked())
    assert (tmp_path / "empty/deep/dish.txt").exists()


def test_the_key_knows_no_path_and_no_time(tmp_path: Path) -> None:
    keys = [run(tmp_path / name, cooked()).manifest.key for name in ("a", "b")]
    other = run_stage(replace(cook(tmp_path / "c", cooked()), name="bake")).manifest.key
    assert keys[0] == keys[1] != other


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), json_data, max_size=5))
def test_a_digest_does_not_depend_on_the_order_of_keys(data: dict[str, Any]) -> None:
    assert digest(data) == digest(dict(reversed(data.items())))
    assert digest(data) == digest(json.loads(json.dumps(data)))
    assert digest(data) != digest([data])


def photos(folder: Path) -> Path:
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"one")
    (folder / "dog").mkdir()
    (folder / "dog" / "2.png").write_bytes(b"two")
    return folder


def test_a_fingerprint_is_of_names_and_content(tmp_path: Path) -> None:
    first, second = photos(tmp_path / "a"), photos(tmp_path / "elsewhere")
    os.utime(second / "cat/1.png", (0, 0))
    (second / ".hidden").write_text("no matter")
    assert fingerprint(first) == fingerprint(second)
    (second / "cat/1.png").rename(second / "cat/3.png")
    assert fingerprint(first) != fingerprint(second)
    (first / "cat/1.png").write_bytes(b"ONE")
    assert fingerprint(first / "cat/1.png") == artifacts.file_sha256(first / "cat/1.png")
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "absent")


def test_a_fingerprint_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    real = photos(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(real / name)
    assert fingerprint(linked) == fingerprint(real)
    before = fingerprint(linked)
    (real / "cat/1.png").write_bytes(b"changed")
    assert fingerprint(linked) != before
    (real / "circle").symlink_to(real)
    assert fingerprint(real) == fingerprint(linked)


def test_a_stage_folder_has_the_same_fingerprint_with_and_without_its_manifest(tmp_path: Path) -> None:
    out = run(tmp_path / "out", cooked()).out
    with_manifest = fingerprint(out)
    (out / MANIFEST).unlink()
    assert fingerprint(out) == with_manifest


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def hold(workspace: Path, held: Any) -> None:
    with workspace_lock(workspace):
        held.set()
        time.sleep(30)


def test_a_workspace_takes_one_run_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "work", held), daemon=True)
    other.start()
    try:
        assert held.wait(20)
        with (
            pytest.raises(WorkspaceError, match=r"another run is using the workspace .*--workspace"),
            workspace_lock(tmp_path / "work"),
        ):
            pass
    finally:
        other.kill()
        other.join()
    with workspace_lock(tmp_path / "work"):  # a killed run holds nothing
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_where_there_are_no_locks_the_work_is_done_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(_stream: Any, _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with workspace_lock(tmp_path / "work"):
        pass
    assert "file system without locks" in caplog.text


def test_a_name_that_is_no_utf8_stays_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"Gr\xfcn \xe2\x82\xac")
    artifacts.write_json(tmp_path / "data.json", {"name": name})
    content = (tmp_path / "data.json").read_text(encoding="utf-8")
    assert "€" in content and json.loads(content) == {"name": name}


def test_a_workspace_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WorkspaceError, match="cannot write the workspace"),
        workspace_lock(tmp_path / "file" / "w"),
    ):
        pass
