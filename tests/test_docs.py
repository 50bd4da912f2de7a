"""The pages keep their word: what README and docs/ name exists, and what follows from the code is up to date.

Command lines are read from inline code and from fenced blocks, where a line begins with `synthkit`,
`$ synthkit` or `.venv/bin/synthkit`. The tree of architecture.md is the fenced block that has a line
beginning with `toolkit/`: one file or folder per line, deeper ones indented, then two spaces and the phrase.
"""

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import synthkit
from synthkit.cli import COMMANDS, main
from synthkit.config import gather, read_toml
from synthkit.errors import ConfigError, SynthkitError
from synthkit.recipes.settings import SECTIONS
from tests.project_files import ROOT, mapping, modules

DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))

ENTRY = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[\w.][\w./*-]*)(?: {2,}(?P<phrase>\S.*))?$")
CALL = re.compile(r"^(?:\$ )?(?:\S*/)?synthkit(?: +|$)(?P<rest>.*)$")
MODULE = re.compile(r"^(?:\$ )?(?:\S*/)?python3? -m (?P<module>(?:synthkit|benchmarks)[\w.]*)(?P<rest>.*)$")
ENDS_A_COMMAND = {"|", ">", ">>", "&&", "||", ";"}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=named)


def text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    assert text.strip(), f"{path} is empty"
    return text


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks; with a language, only its own."""
    fences = re.finditer(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [match[2] for match in fences if not language or match[1].strip() == language]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    return [" ".join(match[1].split()) for match in re.finditer(r"`([^`]+)`", prose(text))]


def lines(text: str) -> list[str]:
    """What may be a command line: lines of fenced blocks, joined after a backslash, and inline code."""
    joined = [line.strip() for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    return joined + spans(text)


def calls(text: str) -> list[list[str]]:
    """The words after `synthkit` of every command line."""
    matches = [CALL.match(line) for line in lines(text)]
    return [words(match["rest"]) for match in matches if match]


def words(rest: str) -> list[str]:
    split = shlex.split(rest, comments=True)
    end = next((place for place, word in enumerate(split) if word in ENDS_A_COMMAND), len(split))
    return split[:end]


def flags(command: click.Command) -> set[str]:
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return known | {"--help", "-h"}


def command(name: str) -> click.Command:
    loaded = main.get_command(click.Context(main), name)
    assert loaded
    return loaded


def call_problems(call: list[str]) -> list[str]:
    """What a command line gets wrong."""
    name = next((word for word in call if word in COMMANDS), None)
    own = call[: call.index(name)] if name else call
    unknown = [word for word in own if word.startswith("-") and word not in flags(main)]
    taken = {place + 1 for place, word in enumerate(own) if word == "--workspace"}
    unknown += [word for place, word in enumerate(own) if not word.startswith("-") and place not in taken]
    if name:
        rest = call[call.index(name) + 1 :]
        given = [word.partition("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)]
        unknown += [word for word in given if word not in flags(command(name))]
        unknown += setting_problems(rest)
    return [f"synthkit {' '.join(call)}: {word}" for word in unknown]


def setting_problems(rest: list[str]) -> list[str]:
    """What is wrong with the settings that a command line gives by --set."""
    assignments = [after for word, after in itertools.pairwise(rest) if word == "--set"]
    try:
        gather(SECTIONS, None, [text for text in assignments if text != "SECTION.NAME=VALUE"])
    except ConfigError as error:
        return [str(error)]
    return []


@every_page
def test_every_command_line_exists(page: Path) -> None:
    assert not [problem for call in calls(text_of(page)) for problem in call_problems(call)]


@every_page
def test_every_command_line_of_a_block_is_understood(page: Path) -> None:
    """Choices, numbers and required options too; nothing is run."""
    problems = []
    shown = [block for block in blocks(text_of(page)) if not block.startswith("Usage: synthkit [OPTIONS]")]
    top = click.Context(main, obj=Path("work"), **main.context_settings)
    for call in calls("\n".join(f"```\n{block}```\n" for block in shown)):
        name = next((word for word in call if word in COMMANDS), None)
        if name and "--help" not in call:
            try:
                command(name).make_context(name, call[call.index(name) + 1 :], parent=top)
            except (click.UsageError, SynthkitError) as error:
                problems.append(f"synthkit {' '.join(call)}: {error}")
    assert not problems


@every_page
def test_every_option_and_setting_in_the_prose_exists(page: Path) -> None:
    known = flags(main).union(*(flags(command(name)) for name in COMMANDS))
    known |= {flag for path in PROGRAMS for flag in re.findall(r"--[a-z][\w-]*", text_of(path))}
    problems = []
    for span in spans(text_of(page)):
        if re.match(r"--[a-z]", span):
            problems += [] if (flag := span.split()[0].partition("=")[0]) in known else [flag]
            problems += setting_problems(shlex.split(span))
        if match := re.match(r"(?P<section>[a-z-]+)\.(?P<name>\w+)(?: ?= ?(?P<value>.+))?$", span):
            section, name, value = match["section"], match["name"], match["value"]
            if section in SECTIONS and name not in ("py", "md", "json", "toml", "onnx"):
                settings = SECTIONS[section].__dataclass_fields__  # type: ignore[attr-defined]
                problems += [] if name in settings else [span]
                problems += setting_problems(["--set", f"{section}.{name}={value}"]) if value else []
    assert not problems


@every_page
def test_every_program_exists_and_knows_its_options(page: Path) -> None:
    problems = []
    for match in filter(None, (MODULE.match(line) for line in lines(text_of(page)))):
        if importlib.util.find_spec(match["module"]) is None:
            problems.append(match["module"])
            continue
        source = source_of(match["module"])
        given = [word for word in words(match["rest"]) if word.startswith("--")]
        problems += [f"{match['module']}: {flag}" for flag in given if flag not in source]
    assert not problems


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    path = Path(spec.origin)
    return text_of(path.with_name("__main__.py") if path.name == "__init__.py" else path)


@every_page
def test_every_recipe_is_usable(page: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    for block in blocks(text_of(page), "toml"):
        recipe.write_text(block, encoding="utf-8")
        if any(isinstance(value, dict) for value in read_toml(recipe).values()):  # else a classes.toml
            gather(SECTIONS, recipe)


@every_page
def test_python_examples_use_what_the_package_has(page: Path) -> None:
    for block in blocks(text_of(page), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("synthkit"):
                assert hasattr(resolved(ast.unparse(node.value)), node.attr), ast.unparse(node)


@every_page
def test_every_name_of_the_package_in_the_prose_exists(page: Path) -> None:
    matches = [re.match(r"synthkit((?:\.\w+)+)(?:$|\()", span) for span in spans(text_of(page))]
    for match in filter(None, matches):
        assert resolved(f"synthkit{match[1]}") is not None


def resolved(name: str) -> object:
    value: object = synthkit
    for part in name.split(".")[1:]:
        if not hasattr(value, part):
            importlib.import_module(f"{getattr(value, '__name__', '')}.{part}")
        value = getattr(value, part)
    return value


@every_page
def test_every_linked_file_and_image_exists(page: Path) -> None:
    assert not [link for link in links(page) if not (page.parent / link.partition("#")[0]).exists()]


def links(page: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(page))):
        if not re.match(r"https?://|#", link):
            yield link


@every_page
def test_every_file_of_the_checkout_that_is_named_exists(page: Path) -> None:
    tops = "toolkit|engines|calibration|recipes|benchmarks|tests|docs"
    paths = [
        span for span in spans(text_of(page)) if re.fullmatch(rf"(?:{tops})/[\w./+-]+\.(?:py|toml|md)", span)
    ]
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_command_appears_outside_the_generated_reference() -> None:
    written = [text_of(page) for page in PAGES if named(page) != "docs/reference/cli.md"]
    mentioned = {word for text in written for call in calls(text) for word in call}
    mentioned |= {span for text in written for span in spans(text)}
    assert not set(COMMANDS) - mentioned


def test_the_make_targets_exist() -> None:
    makefile = text_of(ROOT / "Makefile")
    known = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for page in PAGES:
        assert set(targets(page)) <= known, page
    assert {"demo", "test"} <= set(targets(ROOT / "README.md"))


def targets(page: Path) -> Iterator[str]:
    for line in lines(text_of(page)):
        if match := re.match(r"make ([a-z]+)", line):
            yield match[1]


def test_readme_is_read_in_two_minutes() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) < 200


def generator() -> object:
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_pages_are_up_to_date() -> None:
    stale = generator().stale()  # type: ignore[attr-defined]
    assert not stale, "run: python docs/generate_reference.py"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs comes with the extra dev")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run(
        [*build, str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = (tmp_path / "site" / "results" / "digits.html").read_text(encoding="utf-8")
    assert "../checkout/benchmarks/results/digits.json" in results
    assert (tmp_path / "site" / "checkout" / "benchmarks" / "results" / "digits.json").is_file()


def tree(text: str) -> dict[str, str]:
    """Path -> phrase of the tree."""
    block = next((block for block in blocks(text) if re.search(r"^toolkit/", block, re.MULTILINE)), None)
    assert block, "no fenced block has a line that begins with toolkit/"
    phrases: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        entry = ENTRY.match(line)
        if not entry:
            assert not line.strip(), f"this line of the tree is no `name  phrase`: {line!r}"
            continue
        depth = len(entry["indent"])
        above = [(column, name) for column, name in above if column < depth]
        path = "".join(name for _, name in above) + entry["name"]
        phrases[path] = entry["phrase"] or ""
        if path.endswith("/"):
            above.append((depth, entry["name"]))
    return phrases


def architecture() -> dict[str, str]:
    return tree(text_of(DOCS / "explanation" / "architecture.md"))


def test_everything_in_the_tree_exists() -> None:
    assert not [path for path in architecture() if not any(ROOT.glob(path))]


def test_every_module_has_a_phrase_in_the_tree() -> None:
    phrases = architecture()
    paths = [*modules().values(), *PROGRAMS]
    files = {named(path) for path in paths if path.name != "__init__.py"}
    folders = {f"{named(path)}/" for path in mapping().values()}
    assert not sorted(path for path in files | folders if not phrases.get(path))


def test_the_reader_of_the_pages() -> None:
    assert [problem for call in calls(SAMPLE) for problem in call_problems(call)] == [
        "synthkit doctor --jsn: --jsn",
        "synthkit docter: docter",
        "synthkit train --set train.epoch=3: --set [train] unknown key 'epoch'; did you mean epochs?",
    ]
    assert tree(SAMPLE) == {
        "toolkit/": "the core",
        "toolkit/errors.py": "one error tree",
        "toolkit/cli/": "commands",
        "toolkit/cli/doctor.py": "what runs",
        "setup.py": "the mapping",
    }


SAMPLE = """
Use `synthkit doctor --json`, then `--force`.
```
$ synthkit --workspace w doctor --json | jq .ok
.venv/bin/synthkit doctor \\
    --jsn
synthkit docter
synthkit train --set train.epochs=3
synthkit train --set train.epoch=3
```
```text
toolkit/          the core
  errors.py       one error tree
  cli/            commands
    doctor.py     what runs
setup.py          the mapping
```
"""
