"""What tests share: one tiny pipeline, exported once per session."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
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
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights, v-prediction and a DDIM scheduler, as glyphs-32 has."""
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny-v", "v_prediction")


@pytest.fixture(scope="session")
def tiny_epsilon_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks with noise prediction and a PNDM scheduler, as Stable Diffusion 1.5 has."""
    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny-epsilon", "epsilon")


@pytest.fixture(scope="session")
def tiny_engines(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engines of `tiny_model`; tests that change files copy the folder first."""
    from synthkit.recipes.settings import EngineSettings
    from tests.stages import build_engines

    out = tmp_path_factory.mktemp("engines") / "tiny-v"
    return build_engines(EngineSettings(model=str(tiny_model)), out).out


@pytest.fixture(scope="session")
def tiny_epsilon_engines(tiny_engines: Path, tiny_epsilon_model: Path) -> Path:
    """The engines of `tiny_epsilon_model`, whose networks are the same."""
    out = tiny_engines.with_name("tiny-epsilon")
    shutil.copytree(tiny_engines, out, ignore=shutil.ignore_patterns("scheduler"))
    shutil.copytree(tiny_epsilon_model / "scheduler", out / "scheduler")
    return out


@pytest.fixture(scope="session")
def tiny_style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A style token `<tiny>` with two random vectors."""
    return write_token(tmp_path_factory.mktemp("style") / "learned_embeds.safetensors")
