"""`make` sets the environment up once, takes up an interrupted setup, and notices changed requirements."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.project_files import ROOT

# Stands for an interpreter: makes an environment whose python is itself and writes down what it is asked.
STUB = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  "-m venv"*)
    for last; do :; done
    [ -e "$FAIL_VENV" ] && { mkdir -p "$last"; touch "$last/pyvenv.cfg"; exit 1; }
    mkdir -p "$last/bin" "$last/lib/python3.11/site-packages"
    touch "$last/pyvenv.cfg"
    cp "$0" "$last/bin/python" ;;
  "-m pip install"*) [ ! -e "$FAIL_PIP" ] ;;
esac
"""


class Checkout:
    """A copy of the files that make reads, with a stub for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        self.stub = folder / "stub"
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)

    def make(self, *arguments: str, ok: bool = True) -> list[str]:
        """What the stub was asked to do."""
        log = self.folder / "log"
        log.write_text("")
        places = {"LOG": "log", "FAIL_PIP": "fail-pip", "FAIL_VENV": "fail-venv"}
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "VENV"))
        }
        environment |= {key: str(self.folder / name) for key, name in places.items()}
        done = subprocess.run(
            ["make", f"PYTHON={self.stub}", *arguments],
            cwd=self.folder, capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        asked = [
            line for line in log.read_text().splitlines() if not line.startswith(("-c import", "-m pip --v"))
        ]
        return [" ".join(line.split()[:3]).removesuffix(" --clear") for line in asked]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    return Checkout(tmp_path)


def test_set_up_once_and_again_when_requirements_change(checkout: Checkout) -> None:
    assert checkout.make("test") == ["-m venv", "-m pip install", "-m pytest"]
    assert checkout.make("test") == ["-m pytest"]
    with (checkout.folder / "constraints.txt").open("a") as stream:
        stream.write("example==1\n")
    assert checkout.make("test") == ["-m pip install", "-m pytest"]
    assert len(list((checkout.folder / ".venv").glob(".ready-*"))) == 1


def test_an_interrupted_install_is_taken_up(checkout: Checkout) -> None:
    (checkout.folder / "fail-pip").touch()
    assert checkout.make("test", ok=False) == ["-m venv", "-m pip install"]
    half = checkout.folder / ".venv/lib/python3.11/site-packages/half-1.0.dist-info"
    whole = half.with_name("whole-1.0.dist-info")
    for package in (half, whole):
        package.mkdir()
    (whole / "INSTALLER").write_text("pip\n")
    (checkout.folder / "fail-pip").unlink()
    assert checkout.make("test") == ["-m pip install", "-m pytest"]
    assert (half.exists(), whole.exists()) == (False, True)


def test_an_interrupted_venv_is_begun_anew(checkout: Checkout) -> None:
    (checkout.folder / "fail-venv").touch()
    assert checkout.make("test", ok=False) == ["-m venv"]
    (checkout.folder / "fail-venv").unlink()
    assert checkout.make("test") == ["-m venv", "-m pip install", "-m pytest"]


def test_a_folder_that_is_no_environment_is_left_alone(checkout: Checkout) -> None:
    (checkout.folder / "photos").mkdir()
    (checkout.folder / "photos/one.jpg").touch()
    assert checkout.make("test", "VENV=photos", ok=False) == []
    assert (checkout.folder / "photos/one.jpg").exists()


def test_help_needs_nothing(checkout: Checkout) -> None:
    assert checkout.make() == []
    assert not (checkout.folder / ".venv").exists()
