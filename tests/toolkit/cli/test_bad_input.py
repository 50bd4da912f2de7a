"""Bad input through the real command line: one line that helps, exit code 1, and nothing lost."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from synthkit.artifacts import workspace_lock
from synthkit.cli import main
from synthkit.diffusion import style_token as style
from synthkit.errors import WorkspaceError
from synthkit.recipes.generation import sampler
from tests.stages import given
from tests.tiny_students import colour_folders

COLOURS = ("blue", "green", "red")
QUICK = [
    *"--per-class 4 --student test_resnet --strategy last-1".split(),
    *given(
        *"learn-style.steps=3 learn-style.init_word=the learn-style.batch_size=4 generate.steps=2".split(),
        *"train.epochs=1 train.real_steps=2 train.batch_size=6 adapt.adapt_steps=2".split(),
    ),
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return colour_folders(tmp_path / "few_shots", COLOURS, each=2)


@pytest.fixture
def workspace(tmp_path: Path, tiny_engines: Path) -> Path:
    shutil.copytree(tiny_engines, tmp_path / "w" / "engines")
    return tmp_path / "w"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but what marks a begun run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", ".key.json")
    }


def call(workspace: Path, *words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["--quiet", "--workspace", str(workspace), *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def refusal(workspace: Path, *words: str | Path) -> str:
    """The one line of a refused command, which changed nothing in the workspace."""
    before = snapshot(workspace)
    code, out, text = call(workspace, *words)
    assert (code, out) == (1, ""), text
    assert text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text
    assert snapshot(workspace) == before
    return text


def adapt(photos: Path, *words: str | Path) -> list[str | Path]:
    return ["adapt", "--real-dir", photos, *QUICK, *words]


COMMANDS = ["adapt", "learn-style", "generate", "train"]


@pytest.mark.parametrize("command", COMMANDS)
def test_folders_that_are_no_photos(workspace: Path, tmp_path: Path, command: str) -> None:
    def said(folder: Path) -> str:
        return refusal(workspace, command, "--real-dir", folder)

    assert "no folder" in said(tmp_path / "absent") and "one folder of images per class" in said(
        tmp_path / "absent"
    )
    (tmp_path / "empty").mkdir()
    assert "is empty; put the images of each class" in said(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    assert "is a file; give a folder" in said(tmp_path / "file")
    one = colour_folders(tmp_path / "one", ["red"], each=1)
    assert "one class only, 'red'" in said(one)
    (one / "blue").mkdir()
    assert "no usable image in class 'blue'" in said(one)


def spoil(photos: Path) -> None:
    """A truncated JPEG, a text that calls itself one, and nothing at all."""
    from PIL import Image

    with Image.open(photos / "red" / "0.png") as image:
        image.save(photos / "red" / "cut.jpg")
    whole = (photos / "red" / "cut.jpg").read_bytes()
    (photos / "red" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "blue" / "text.jpg").write_text("no image")
    (photos / "green" / "nothing.png").touch()


@pytest.mark.parametrize("command", COMMANDS)
def test_all_bad_files_are_listed_at_once(workspace: Path, photos: Path, command: str) -> None:
    spoil(photos)
    text = refusal(workspace, command, "--real-dir", photos)
    assert "3 file(s) cannot be used" in text and "--skip-bad" in text
    assert all(name in text for name in ("cut.jpg", "text.jpg", "nothing.png"))


def test_bad_files_can_be_left_out(workspace: Path, photos: Path) -> None:
    spoil(photos)
    for command in ("learn-style", "generate", "train", "adapt"):
        code, _, text = call(workspace, command, "--real-dir", photos, "--skip-bad", "--dry-run")
        assert code == 0, text


def test_a_test_folder_that_cannot_measure_is_refused(workspace: Path, photos: Path, tmp_path: Path) -> None:
    test = colour_folders(tmp_path / "test", COLOURS, each=2, seed=5)
    shutil.copy(photos / "red" / "1.png", test / "blue" / "the same again.png")
    text = refusal(workspace, *adapt(photos, "--test-dir", test))
    assert "shares 1 image(s)" in text and "the same again.png" in text
    text = refusal(workspace, *adapt(photos, "--test-dir", tmp_path / "absent"))
    assert "no folder" in text
    pink = colour_folders(tmp_path / "pink", ["blue", "reed"], each=1, seed=6)
    assert "class that is not known: 'reed'" in refusal(workspace, *adapt(photos, "--test-dir", pink))


def test_unknown_names_offer_the_nearest(workspace: Path, photos: Path, tmp_path: Path) -> None:
    base = ["adapt", "--real-dir", photos]
    no_synth = [*base, "--no-synth"]
    assert "did you mean resnet10t" in refusal(workspace, *no_synth, "--student", "resnet10")
    text = refusal(workspace, *no_synth, "--set", "adapt.strategy=last2")
    assert "strategy = 'last2': must be one of auto, unchanged, last-1, last-2" in text
    assert "no weights" in refusal(workspace, *no_synth, "--weights", tmp_path / "absent")
    text = refusal(workspace, *base, "--model", "glyphs32x")
    assert "no generator 'glyphs32x'" in text and "--model" in text
    text = refusal(workspace, *base, "--model", tmp_path)
    assert "is not a diffusers folder" in text
    assert "no file" in refusal(workspace, *base, "--config", tmp_path / "absent.toml")
    text = refusal(workspace, *base, "--set", "train.epochs=0", "--no-synth")
    assert "epochs = 0: must be at least 1" in text


def test_a_name_that_is_nearly_a_bundled_model(
    workspace: Path, photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthkit.models.generator.bundled_models", lambda: {"glyphs-32": tiny_model})
    assert "did you mean glyphs-32" in refusal(
        workspace, "adapt", "--real-dir", photos, "--model", "glyphs32"
    )


@pytest.mark.slow
def test_a_hub_model_without_network_names_the_local_folder(tmp_path: Path, photos: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    words = ["--workspace", tmp_path / "w", "adapt", "--real-dir", photos, "--model", "someone/some-model"]
    done = subprocess.run(
        [sys.executable, "-m", "synthkit", *map(str, words)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot fetch 'someone/some-model'") and done.stderr.count("\n") == 1
    assert "--model DIR" in done.stderr


def test_a_class_that_the_model_cannot_draw_names_both_ways_out(
    photos: Path, workspace: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "limited"
    shutil.copytree(tiny_model, model)
    (model / "classes.toml").write_text('blue = "digit one"\ngreen = "digit two"\n')
    text = refusal(workspace, "adapt", "--real-dir", photos, "--model", model)
    assert "does not know 'red'" in text and "--model" in text and "--no-synth" in text


def test_a_style_cannot_be_learned_without_engines(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    for command in ("learn-style", "generate"):
        assert "`synthkit build-engines`" in refusal(tmp_path / "w", command, "--real-dir", photos)


HOLD = """
import sys, time
from pathlib import Path
from synthkit.artifacts import workspace_lock
from tests.stages import given
with workspace_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_workspace_that_another_run_uses_is_refused(workspace: Path, photos: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(workspace)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for command in ("adapt", "learn-style", "train"):
            assert "another run is using the workspace" in refusal(workspace, command, "--real-dir", photos)
        with pytest.raises(WorkspaceError), workspace_lock(workspace):
            pass
    finally:
        other.kill()
        other.communicate()
    with workspace_lock(workspace), (workspace / ".lock").open() as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_workspace_that_cannot_be_written_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    text = refusal(tmp_path / "file" / "w", *adapt(photos, "--no-synth"))
    assert "cannot write the workspace" in text and "--workspace" in text


def test_a_read_only_workspace_is_refused(
    workspace: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Path.open

    def read_only(self: Path, *arguments: Any, **others: Any) -> Any:
        if self.is_relative_to(workspace):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return usual(self, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", read_only)
        code, out, text = call(workspace, *adapt(photos, "--no-synth"))
    assert (code, out) == (1, "") and text.startswith("error: cannot write") and "--workspace" in text


def drawn(workspace: Path) -> dict[str, bytes]:
    found = snapshot(workspace / "synthetic")
    return {name: content for name, content in found.items() if name != "manifest.json"}


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    workspace: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "--real-dir", photos, "--per-class", "4", "--steps", "2", "--batch-size", "4"]
    written: list[str] = []
    real = sampler.write_bytes

    def full_after_six(path: Path, content: bytes) -> None:
        if len(written) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path.name)
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "write_bytes", full_after_six)
        code, out, text = call(workspace, *words)
    assert (code, out) == (1, "") and text.count("\n") == 1
    assert "No space left on device" in text and "free some space" in text
    assert not (workspace / "synthetic").exists()
    code, out, text = call(workspace, *words)
    assert code == 0 and "6 images generated, 6 already there" in out, text
    other = tmp_path / "undisturbed"
    shutil.copytree(workspace / "engines", other / "engines")
    assert call(other, *words)[0] == 0 and drawn(other) == drawn(workspace)


@pytest.mark.slow
def test_a_killed_learn_style_goes_on(workspace: Path, photos: Path, tmp_path: Path) -> None:
    words = ["learn-style", "--real-dir", photos, "--steps", "30"]
    words += given("learn-style.init_word=the", "learn-style.batch_size=2")
    words += given("learn-style.checkpoint_every=3", "learn-style.vectors=2")
    arguments = ["--quiet", "--workspace", workspace, *words]
    child = subprocess.Popen([sys.executable, "-m", "synthkit", *map(str, arguments)])
    checkpoint = workspace / ".style.partial" / ".inversion.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (workspace / "style").exists()

    assert call(workspace, *words)[0] == 0
    other = tmp_path / "undisturbed"
    shutil.copytree(workspace / "engines", other / "engines")
    assert call(other, *words)[0] == 0
    one, two = (place / "style" for place in (workspace, other))
    token = style.load(one / "learned_embeds.safetensors")
    assert token.vectors.tobytes() == style.load(two / "learned_embeds.safetensors").vectors.tobytes()
    assert (one / "losses.json").read_bytes() == (two / "losses.json").read_bytes()
