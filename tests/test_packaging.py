"""The wheel and the source archive hold exactly what they should."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import synthkit
from tests.project_files import ROOT, mapping, modules, tracked_files

DATA = {
    "synthkit": ["py.typed"],
    "synthkit.models": ["glyphs-32/**/*"],
    "synthkit.recipes": ["configs/*.toml", "serving/*.html", "diagnostics/*.html"],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Wheel (made from the source archive), source archive, and what the build said."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    for path in tracked_files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"],
        cwd=copy, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    (wheel,), (archive,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    return wheel, archive, said


def inside(path: Path) -> str:
    """Where a source file lies in the wheel."""
    for package, folder in sorted(mapping().items(), key=lambda item: -len(str(item[1]))):
        if folder in path.parents:
            return (Path(*package.split(".")) / path.relative_to(folder)).as_posix()
    raise AssertionError(f"{path} lies in no package")


def data_files() -> set[Path]:
    return {
        path
        for package, patterns in DATA.items()
        for pattern in patterns
        for path in mapping()[package].glob(pattern)
        if path.is_file() and path in tracked_files()
    }


def test_the_wheel_holds_every_source_and_nothing_else(built: tuple[Path, Path, str]) -> None:
    wheel, _, _ = built
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    info = f"synthkit_edge-{synthkit.__version__}.dist-info"
    expected = {inside(path) for path in {*modules().values(), *data_files()}}
    expected |= {
        f"{info}/{name}"
        for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }
    assert held == expected


def test_no_data_file_is_forgotten() -> None:
    folders = set(mapping().values())
    others = {
        path
        for path in tracked_files()
        if folders & set(path.parents) and path.suffix != ".py" and not path.name.startswith(".")
    }
    assert others == data_files(), "package-data of pyproject.toml and DATA of this test do not name these"


def test_the_build_has_nothing_to_complain_about(built: tuple[Path, Path, str]) -> None:
    _, _, said = built
    assert not re.search(r"(?i)warning|would be ignored|deprecat", said), said


def test_the_wheel_alone_runs(built: tuple[Path, Path, str], tmp_path: Path) -> None:
    wheel, _, _ = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        entry = archive.read(f"synthkit_edge-{synthkit.__version__}.dist-info/entry_points.txt").decode()
    assert entry.split() == ["[console_scripts]", "synthkit", "=", "synthkit.cli:main"]
    code = "import sys, synthkit.cli; print(synthkit.cli.__file__); synthkit.cli.main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        str(tmp_path / "synthkit" / "cli" / "__init__.py"),
        f"synthkit, version {synthkit.__version__}",
    ]


def test_the_source_archive_is_complete(built: tuple[Path, Path, str]) -> None:
    _, archive, _ = built
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in {*modules().values(), *data_files()}}
    assert needed | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
