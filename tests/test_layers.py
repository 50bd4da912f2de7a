"""Imports run downward only, heavy packages stay where they belong, and nothing imports in a circle."""

import ast
import functools
import graphlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.project_files import NEEDS_TRAIN, ROOT, mapping, may_need_train, modules

# From the bottom up. Names of one level do not know each other; a package's own modules do.
LEVELS = [
    {"synthkit"},
    {"synthkit.errors"},
    {"synthkit.config", "synthkit.machine", "synthkit.one_line", "synthkit.probes", "synthkit.progress"},
    {"synthkit.artifacts"},
    {"synthkit.standalone"},
    {"synthkit.data", "synthkit.metrics"},
    {"synthkit.models"},
    {"synthkit.diffusion", "synthkit.learning"},
    {"synthkit.calibration", "synthkit.engines"},
    {"synthkit.recipes"},
    {"synthkit.cli"},
    {"synthkit.__main__"},
]
PACKAGES = tuple(
    f"synthkit.{name}"
    for name in "data metrics models diffusion learning calibration engines recipes cli".split()
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
BARE = {"toolkit", "engines", "calibration", "recipes"}
HEAVY = set(
    "torch torchvision timm diffusers transformers tokenizers huggingface_hub optimum onnx onnxscript "
    "safetensors accelerate sklearn scipy jinja2 matplotlib onnxruntime ray".split()
)
NEVER_AT_THE_TOP = {"tensorrt"}


@dataclass(frozen=True)
class Import:
    name: str
    package: str  # where the name comes from; for `import name`, the name itself
    line: int
    at_top: bool
    relative: bool


def unit(module: str) -> str:
    """The name that stands in the table of levels."""
    return next((name for name in PACKAGES if module == name or module.startswith(f"{name}.")), module)


def imports(path: Path, known: set[str]) -> list[Import]:
    """Every import of a file; of `from package import name`, the module `package.name` where there is one."""
    return [
        item if item.name in known else replace(item, name=item.package)
        for item in imports_of(path.read_text(encoding="utf-8"))
    ]


@functools.cache
def imports_of(source: str) -> list[Import]:
    return list(_imports(ast.parse(source), at_top=True))


def _imports(node: ast.AST, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, alias.name, child.lineno, at_top, False)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                package = child.module or ""
                yield Import(f"{package}.{alias.name}", package, child.lineno, at_top, child.level > 0)
        else:
            yield from _imports(child, at_top and not inside and not typing_only)


def problems(root: Path) -> list[str]:
    sources = modules(root)
    found = []
    for module, path in sources.items():
        if unit(module) not in LEVEL:
            found.append(f"{module} has no level: give it one in LEVELS of tests/test_layers.py")
            continue
        for item in imports(path, set(sources)):
            problem = import_problem(module, item)
            if problem:
                found.append(f"{path.relative_to(root)}:{item.line}: {problem}")
    return found


def import_problem(module: str, item: Import) -> str:
    """What is wrong with one import; empty when nothing is."""
    top = item.name.partition(".")[0]
    if item.relative:
        return "relative import: write it as synthkit.…"
    if top in BARE:
        return f"import of the bare folder {top}: write it as synthkit.…"
    if item.at_top and top in NEVER_AT_THE_TOP:
        return f"{top} may only be imported inside a function"
    if item.at_top and top in HEAVY and not may_need_train(module):
        return (
            f"{top} at the top level of {module}: import it inside a function, "
            "or list the module in tests/project_files.py"
        )
    facade = module == "synthkit" and not item.at_top  # offers the public API without importing it
    return level_problem(module, item.name) if top == "synthkit" and not facade else ""


def level_problem(module: str, target: str) -> str:
    here, there = unit(module), unit(target)
    if there not in LEVEL:
        return f"{target} is no module that has a level"
    if here == there or LEVEL[there] < LEVEL[here]:
        return ""
    arrow = "upward" if LEVEL[there] > LEVEL[here] else "sideways"
    return f"{arrow} import: {here} must not know {there}"


def cycle(root: Path) -> list[str]:
    """Modules that import each other in a circle at their top level; empty when none do."""
    sources = modules(root)
    graph = {
        module: {item.name for item in imports(path, set(sources)) if item.at_top and item.name in sources}
        - {module}
        for module, path in sources.items()
    }
    # `import a.b` runs a first; an __init__ that imports its own parts is no circle for them
    for module in graph:
        graph[module] = {name for name in graph[module] if not module.startswith(f"{name}.")}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_import_runs_downward() -> None:
    assert not problems(ROOT), "\n".join(problems(ROOT))


def test_no_import_cycles() -> None:
    assert cycle(ROOT) == []


def test_every_name_of_the_table_is_a_module_or_will_be() -> None:
    assert set(PACKAGES) <= set(LEVEL)
    assert len(LEVEL) == sum(len(names) for names in LEVELS), "a name has two levels"
    assert {unit(name) for name in modules()} <= set(LEVEL)
    assert set(modules()) >= NEEDS_TRAIN


@pytest.mark.parametrize("command", ["predict", "evaluate", "verify", "bench", "serve", "doctor"])
def test_a_device_command_never_reaches_torch(command: str) -> None:
    sources = modules()
    assert f"synthkit.cli.{command}" in sources
    waiting = [item.name for item in imports(sources[f"synthkit.cli.{command}"], set(sources))]
    reached: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in sources and module not in reached:
            reached.add(module)
            waiting += [item.name for item in imports(sources[module], set(sources)) if item.at_top]
    assert not [module for module in reached if may_need_train(module)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "setup.py", tmp_path)
    for folder in mapping().values():
        for path in folder.glob("*.py"):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("toolkit/errors.py", "import synthkit.artifacts", "upward import: synthkit.errors must not know"),
        ("engines/runtime/tensor_spec.py", "from synthkit import cli", "must not know synthkit.cli"),
        ("toolkit/config.py", "from synthkit.machine import ask", "sideways import"),
        ("engines/__init__.py", "def f():\n    from synthkit.calibration import head", "sideways import"),
        ("toolkit/errors.py", "from . import config", "relative import"),
        ("toolkit/errors.py", "from engines import spec", "bare folder engines"),
        ("engines/__init__.py", "import tensorrt", "inside a function"),
        ("toolkit/errors.py", "import torch.nn", "torch at the top level of synthkit.errors"),
        ("toolkit/surprise.py", "", "synthkit.surprise has no level: give it one in LEVELS"),
    ],
)
def test_a_planted_mistake_is_found(copy: Path, path: str, line: str, message: str) -> None:
    before = problems(copy)
    with (copy / path).open("a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    added = set(problems(copy)) - set(before)
    assert any(message in problem for problem in added), added


def test_a_heavy_import_inside_a_function_is_allowed(copy: Path) -> None:
    before = problems(copy)
    with (copy / "toolkit/errors.py").open("a", encoding="utf-8") as stream:
        stream.write("\ndef f():\n    import torch, tensorrt\n")
    assert problems(copy) == before


def test_a_planted_cycle_is_found(copy: Path) -> None:
    (copy / "engines/one.py").write_text("from synthkit.engines import two\n")
    (copy / "engines/two.py").write_text("from synthkit.engines.one import x\n")
    assert {"synthkit.engines.one", "synthkit.engines.two"} <= set(cycle(copy))
