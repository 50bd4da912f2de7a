"""What the tests of the project's own files share: where the sources are and which import names they have."""

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Modules that import packages of the extra "train" at their top level; everything else runs without them.
NEEDS_TRAIN = {
    "synthkit.engines.diffusion.denoising_graph",
    "synthkit.engines.student.fp16",
    "synthkit.engines.student.int8",
    "synthkit.engines.student.frozen_layers",
    "synthkit.engines.student.onnx_export",
    "synthkit.engines.runtime.onnx_graph",
    "synthkit.engines.bundle.targets",
    "synthkit.calibration.textual_inversion",
    "synthkit.diffusion.parts",
}
#: Packages and modules of recipes that only a workstation runs.
NEEDS_TRAIN_BELOW = ("synthkit.learning.", "synthkit.recipes.glyphs32")


def may_need_train(module: str) -> bool:
    """Whether a module may import torch and its kin at its top level."""
    return module in NEEDS_TRAIN or module.startswith(NEEDS_TRAIN_BELOW)


def mapping(root: Path = ROOT) -> dict[str, Path]:
    """Package -> folder: the top folders of setup.py and every package below them."""
    for node in ast.parse((root / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS":
            tops = {package: root / folder for package, folder in ast.literal_eval(node.value).items()}
            return {
                ".".join((package, *init.parent.relative_to(folder).parts)): init.parent
                for package, folder in tops.items()
                for init in sorted(folder.rglob("__init__.py"))
            }
    raise AssertionError("setup.py has no FOLDERS")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Import name -> file of every module of the mapped packages."""
    return {
        package if path.stem == "__init__" else f"{package}.{path.stem}": path
        for package, folder in mapping(root).items()
        for path in sorted(folder.glob("*.py"))
    }


def link_tree(target: Path) -> Path:
    """A folder that holds `synthkit/` as links to the sources, for tools that know nothing of the mapping."""
    packages = mapping()
    for package, folder in packages.items():
        here = target.joinpath(*package.split("."))
        here.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name != "__pycache__" and path not in packages.values():
                (here / path.name).symlink_to(path)
    return target


@functools.cache
def tracked_files() -> list[Path]:
    """Every file of the project: what git tracks or would track; without git, what lies in its folders."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        found = [ROOT / name for name in set(listed) if name]
    except (OSError, subprocess.CalledProcessError):
        tops = sorted({path.relative_to(ROOT).parts[0] for path in mapping().values()} | {"tests", ".ci"})
        found = [path for top in tops for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts]
        found += ROOT.iterdir()
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]
