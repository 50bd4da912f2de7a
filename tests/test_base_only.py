"""With the base dependencies alone, everything imports that a device needs, and all help works."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from synthkit.cli import COMMANDS
from synthkit.one_line import EXTRAS
from tests.project_files import NEEDS_TRAIN, link_tree, may_need_train, modules

BASE = ["click", "numpy", "pillow", "tqdm", *(["tomli"] if sys.version_info < (3, 11) else [])]

IMPORT_ALL = """
import importlib, json, sys
absent = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent[name] = error.name
print(json.dumps(absent))
"""

ALL_HELP = """
import contextlib, io, json, sys
from synthkit.cli import COMMANDS, main
pages = {}
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as page:
        try:
            main([name, "--help"])
        except SystemExit as end:
            assert end.code == 0, name
        except Exception as error:
            page = io.StringIO(repr(error))
    pages[name] = page.getvalue()
print(json.dumps(pages))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the base dependencies and synthkit, all as links."""
    home = tmp_path_factory.mktemp("base-only")
    venv.create(home, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    for name in BASE:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    link_tree(site)
    return home / "bin" / "python"


def ask(python: Path, *arguments: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-W", "error", *arguments],
        capture_output=True, text=True, check=False, env=environment, cwd=python.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_submodule_imports_but_those_that_train(python: Path) -> None:
    absent = ask(python, "-c", IMPORT_ALL, json.dumps(list(modules())))
    wrong = {
        module: name
        for module, name in absent.items()
        if not may_need_train(module) or EXTRAS.get(name.partition(".")[0]) != "train"
    }
    assert not wrong, "these modules import a package that the base does not bring (import it in a function)"
    needless = NEEDS_TRAIN & set(modules()) - set(absent)
    assert not needless, "these import without any extra: take them off NEEDS_TRAIN in tests/project_files.py"


def test_the_help_of_every_command_works(python: Path) -> None:
    pages = ask(python, "-c", ALL_HELP)
    assert set(pages) == set(COMMANDS)
    assert not {name: page for name, page in pages.items() if not page.startswith("Usage: ")}
    for name, page in pages.items():
        assert "--json" in page, name


def test_the_doctor_works(python: Path) -> None:
    answer = ask(python, "-m", "synthkit", "doctor", "--json")
    checks = {check["name"]: check for check in answer["checks"]}
    assert answer["ok"] is True
    assert [checks[name]["status"] for name in ("base", "onnxruntime", "train", "tensorrt")] == [
        "ok",
        "missing",
        "missing",
        "missing",
    ]
