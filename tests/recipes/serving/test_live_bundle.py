"""A service follows its folder: whole versions take over, broken ones do not, and no request is dropped."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from synthkit.engines.bundle.format import Bundle, read_facts, seal
from synthkit.errors import BundleError
from synthkit.recipes.serving import app as serve
from synthkit.recipes.serving.live_bundle import LiveBundle
from tests.serving import picture, predicted, serving
from tests.tiny_students import tiny_bundle


def next_version(folder: Path, version: int) -> Path:
    """A whole bundle of another student that states another version."""
    made = tiny_bundle(folder, seed=version)
    seal(made, replace(read_facts(made), version=version))
    return made


def swap(new: Path, old: Path) -> None:
    """Put a folder in the place of another with an instant in which there is neither."""
    old.rename(old.with_name("old"))
    new.rename(old)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_new_version_takes_over_without_dropping_a_request(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_REFRESH_SECONDS", 0.05)
    folder = shutil.copytree(good, tmp_path / "bundle")
    new = next_version(tmp_path / "new", 2)
    image = picture(seed=4)
    right = {
        version: {**predicted(bundle, image, tmp_path, 3), "version": version, "precision": "fp32"}
        for version, bundle in ((1, folder), (2, new))
    }
    assert right[1]["top"] != right[2]["top"]
    answers: list[tuple[int, dict[str, object]]] = []
    enough = threading.Event()

    def hammer() -> None:
        while not enough.is_set():
            answers.append(client.predict(image))

    with serving(folder) as client:
        threads = [threading.Thread(target=hammer) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) > 10)
        swap(new, folder)
        until(lambda: answers[-1][1].get("version") == 2)
        enough.set()
        for thread in threads:
            thread.join(30)
        until(lambda: client.ask("GET", "/healthz")[1]["problem"] is None)
    wrong = [one for one in answers if one != (200, right.get(one[1].get("version")))]
    assert not wrong and {answer["version"] for _, answer in answers} == {1, 2}


def test_a_broken_version_never_takes_over(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "bundle")
    live = LiveBundle(folder)
    first = live.current
    new = next_version(tmp_path / "new", 2)
    model = (new / "model.onnx").read_bytes()
    (new / "model.onnx").write_bytes(model[:-1])
    swap(new, folder)
    live.refresh()
    assert live.current is first and "model.onnx was altered" in live.problem
    (folder / "bundle.json").write_text("{")
    live.refresh()
    assert live.current is first and "not a bundle's JSON" in live.problem
    shutil.copy(tmp_path / "old" / "bundle.json", folder)
    live.refresh()
    assert live.current is first and live.problem == "", "bundle.json is that of the one in use again"
    shutil.rmtree(folder)
    live.refresh()
    assert live.current is first and "bundle.json is missing" in live.problem


def test_a_copy_that_becomes_whole_takes_over(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "bundle")
    live = LiveBundle(folder)
    new = next_version(tmp_path / "new", 2)
    names = ["bundle.json", "model.onnx", "golden.npz"]
    assert {path.name for path in new.iterdir()} > set(names)
    for name in names:
        assert live.current.bundle.facts.version == 1
        shutil.copy(new / name, folder)
        live.refresh()
        assert bool(live.problem) == (name != names[-1])
    assert live.current.bundle.facts.version == 2


def test_an_unchanged_folder_is_not_opened_again(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(good, tmp_path / "bundle")
    live = LiveBundle(folder)
    monkeypatch.setattr(Bundle, "open", lambda *arguments: pytest.fail("opened again"))
    live.refresh()
    (folder / "model.plan").write_text("built from build_engine.sh")
    live.refresh()
    assert live.problem == ""


def test_there_must_be_a_bundle_and_its_precision(good: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json is missing"):
        LiveBundle(tmp_path / "absent")
    with pytest.raises(BundleError, match="holds no int8 model"):
        LiveBundle(good, "int8")
