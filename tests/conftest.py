"""What tests share: one tiny pipeline, exported once per session."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_models import tiny_pipeline, write_token

# Tiny networks are slower on several threads than on one, by far where other work shares the processors. Set
# before torch is first imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """No workers where only files or single tests are named; otherwise pytest-xdist counts the cores."""
    named = [config.invocation_params.dir / name.partition("::")[0] for name in config.args]
    return 0 if all(path.is_file() for path in named) else None


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A command sets how much is told (`--quiet`); the next test must not depend on it."""
    names = ("", "synthkit")
    before = [(logging.getLogger(name).level, logging.getLogger(name).handlers[:]) for name in names]
    yield
    for name, (level, handlers) in zip(names, before, strict=True):
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder by its name, which the first worker that asks makes for all; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    shared.mkdir(exist_ok=True)

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_model(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A diffusers folder with random weights, v-prediction and a DDIM scheduler, as glyphs-32 has."""
    return made_once("tiny-v", lambda folder: tiny_pipeline(folder, "v_prediction"))


@pytest.fixture(scope="session")
def tiny_epsilon_model(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The same networks with noise prediction and a PNDM scheduler, as Stable Diffusion 1.5 has."""
    return made_once("tiny-epsilon", lambda folder: tiny_pipeline(folder, "epsilon"))


@pytest.fixture(scope="session")
def tiny_engines(tiny_model: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The engines of `tiny_model`; tests that change files copy the folder first."""
    from synthkit.recipes.settings import EngineSettings
    from tests.stages import build_engines

    settings = EngineSettings(model=str(tiny_model))
    return made_once("tiny-v-engines", lambda folder: build_engines(settings, folder))


@pytest.fixture(scope="session")
def tiny_epsilon_engines(
    tiny_engines: Path, tiny_epsilon_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The engines of `tiny_epsilon_model`, whose networks are the same."""
    out = tmp_path_factory.mktemp("engines") / "tiny-epsilon"
    shutil.copytree(tiny_engines, out, ignore=shutil.ignore_patterns("scheduler"))
    shutil.copytree(tiny_epsilon_model / "scheduler", out / "scheduler")
    return out


@pytest.fixture(scope="session")
def tiny_style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A style token `<tiny>` with two random vectors."""
    return write_token(tmp_path_factory.mktemp("style") / "learned_embeds.safetensors")
