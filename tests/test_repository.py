"""Style, types and hygiene of every tracked file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import synthkit
from tests.project_files import ROOT, link_tree, mapping, python_files, tracked_files

MAX_BYTES = 8 * 2**20
# Put together from halves, so that this file does not hold what it forbids.
FORBIDDEN = re.compile(
    r"(?<![\w.])/(wo"
    + r"rk|ro"
    + r"ot)/|\.\./sha"
    + r"red\b|py"
    + r"pi\.org|python"
    + r"hosted\.org|download\.py"
    + r"torch\.org"
)
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}


def test_ruff() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--output-format=concise",
            *map(str, python_files()),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_mypy(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "-p",
            "synthkit",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--cache-dir",
            str(ROOT / ".mypy_cache" / "link-tree"),
        ],
        cwd=link_tree(tmp_path / "types"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_of_python_files_is_mapped_and_the_reverse() -> None:
    folders = mapping()
    for package, folder in folders.items():
        assert (folder / "__init__.py").is_file(), f"{package}: {folder} has no __init__.py"
    tops = {ROOT / folder.relative_to(ROOT).parts[0] for folder in folders.values()}
    holding = {path.parent for path in python_files() if any(top in path.parents for top in tops)}
    missing = sorted(str(folder.relative_to(ROOT)) for folder in holding - set(folders.values()))
    assert not missing, f"setup.py does not map {missing}"


def test_changelog_has_this_version_first() -> None:
    headings = re.findall(
        r"^## \[(\S+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[0] == synthkit.__version__


def test_no_machine_path_and_no_registry_host() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in FORBIDDEN.finditer(text)]
    assert not found


def test_no_large_files() -> None:
    assert not [path for path in tracked_files() if path.stat().st_size > MAX_BYTES]


def unsafe(source: str) -> list[str]:
    """Constructs that run code from a file, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            found += [f"{node.lineno}: import {name}" for name in names & UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNSAFE_MODULES:
            found.append(f"{node.lineno}: from {node.module}")
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {text}" for text in _unsafe_call(node)]
    return found


def _unsafe_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    if called in {"eval", "exec", "torch.load", "yaml.load"}:
        yield called
    for keyword in node.keywords:
        is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in {"trust_remote_code", "allow_pickle"} and not is_false:
            yield f"{keyword.arg}={ast.unparse(keyword.value)}"


def test_loading_a_file_never_runs_code_from_it() -> None:
    assert not [
        f"{path.relative_to(ROOT)}:{text}"
        for path in python_files()
        for text in unsafe(path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "f(trust_remote_code=flag)",
    ],
)
def test_the_check_finds_what_runs_code(source: str) -> None:
    assert unsafe(source)
    assert not unsafe("model.eval()\nnp.load(path, allow_pickle=False)")
