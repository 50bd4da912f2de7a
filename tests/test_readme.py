"""README keeps its word: its commands and flags exist, and its tree names the files that there are.

Commands are read from inline code and from fenced blocks, where a line begins with `synthkit`, `$ synthkit`
or `.venv/bin/synthkit`. The tree is the fenced block that has a line beginning with `toolkit/`: one file or
folder per line, deeper ones indented, then two spaces and the phrase.
"""

import re
import shlex
from pathlib import Path

import click
import pytest

from synthkit.cli import COMMANDS, main
from tests.project_files import ROOT, mapping, modules

ENTRY = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[\w.][\w./*-]*)(?: {2,}(?P<phrase>\S.*))?$")
CALL = re.compile(r"^(?:\$ )?(?:\S*/)?synthkit(?: +|$)(?P<rest>.*)$")
ENDS_A_COMMAND = {"|", ">", ">>", "&&", "||", ";"}


def readme() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.strip(), "README.md is empty"
    return text


def blocks(text: str) -> list[str]:
    return [match[1] for match in re.finditer(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def spans(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(match[1].split()) for match in re.finditer(r"`([^`]+)`", prose)]


def calls(text: str) -> list[list[str]]:
    """The words after `synthkit` of every command line."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [CALL.match(line.strip()) for line in lines + spans(text)]
    return [words(match["rest"]) for match in found if match]


def words(rest: str) -> list[str]:
    split = shlex.split(rest, comments=True)
    end = next((place for place, word in enumerate(split) if word in ENDS_A_COMMAND), len(split))
    return split[:end]


def flags(command: click.Command) -> set[str]:
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return known | {"--help", "-h"}


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found
    return found


def call_problems(call: list[str]) -> list[str]:
    """What a command line of the README gets wrong."""
    name = next((word for word in call if word in COMMANDS), None)
    own = call[: call.index(name)] if name else call
    unknown = [word for word in own if word.startswith("-") and word not in flags(main)]
    taken = {place + 1 for place, word in enumerate(own) if word == "--workspace"}
    unknown += [word for place, word in enumerate(own) if not word.startswith("-") and place not in taken]
    if name:
        given = [
            word.partition("=")[0] for word in call[call.index(name) + 1 :] if re.match(r"--?[a-zA-Z]", word)
        ]
        unknown += [word for word in given if word not in flags(command(name))]
    return [f"synthkit {' '.join(call)}: {word}" for word in unknown]


def test_every_command_line_exists() -> None:
    found = calls(readme())
    assert found
    assert not [problem for call in found for problem in call_problems(call)]


def test_every_flag_in_the_prose_exists() -> None:
    known = flags(main).union(*(flags(command(name)) for name in COMMANDS))
    named = [span.split()[0].partition("=")[0] for span in spans(readme()) if re.match(r"--[a-z]", span)]
    assert not set(named) - known


def test_every_command_appears() -> None:
    mentioned = {word for call in calls(readme()) for word in call} | set(spans(readme()))
    assert not set(COMMANDS) - mentioned


def tree(text: str) -> dict[str, str]:
    """Path -> phrase of the README's tree."""
    block = next((one for one in blocks(text) if re.search(r"^toolkit/", one, re.MULTILINE)), None)
    assert block, "README.md has no fenced block with a line that begins with toolkit/"
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        entry = ENTRY.match(line)
        if not entry:
            assert not line.strip(), f"this line of the tree is no `name  phrase`: {line!r}"
            continue
        depth = len(entry["indent"])
        above = [(column, name) for column, name in above if column < depth]
        path = "".join(name for _, name in above) + entry["name"]
        found[path] = entry["phrase"] or ""
        if path.endswith("/"):
            above.append((depth, entry["name"]))
    return found


def test_everything_in_the_tree_exists() -> None:
    assert not [path for path in tree(readme()) if not any(ROOT.glob(path))]


def test_every_module_has_a_phrase_in_the_tree() -> None:
    phrases = tree(readme())
    files = {path.relative_to(ROOT).as_posix() for path in modules().values() if path.name != "__init__.py"}
    folders = {f"{path.relative_to(ROOT).as_posix()}/" for path in mapping().values()}
    assert not sorted(path for path in files | folders if not phrases.get(path))


def test_every_linked_file_exists() -> None:
    linked = re.findall(r"\]\((?!https?://|#)([^)#]+)", readme())
    assert not [path for path in linked if not (ROOT / path).exists()]


SAMPLE = """
Use `synthkit doctor --json`, then `--force`.
```
$ synthkit --workspace w doctor --json | jq .ok
.venv/bin/synthkit doctor \\
    --jsn
synthkit docter
```
```text
toolkit/          the core
  errors.py       one error tree
  cli/            commands
    doctor.py     what runs
setup.py          the mapping
```
"""


def test_the_reader_of_the_readme() -> None:
    assert [problem for call in calls(SAMPLE) for problem in call_problems(call)] == [
        "synthkit doctor --jsn: --jsn",
        "synthkit docter: docter",
    ]
    assert tree(SAMPLE) == {
        "toolkit/": "the core",
        "toolkit/errors.py": "one error tree",
        "toolkit/cli/": "commands",
        "toolkit/cli/doctor.py": "what runs",
        "setup.py": "the mapping",
    }


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_make_targets_of_the_readme_exist(target: str) -> None:
    named = {
        match[1] for match in re.finditer(r"\bmake ([a-z]+)\b", "\n".join(blocks(readme()) + spans(readme())))
    }
    known = set(re.findall(r"^([a-z]+):", Path(ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert target in named
    assert named <= known
