"""Writes the pages that follow from the code: reference/cli.md and reference/settings.md.

python docs/generate_reference.py           write them
python docs/generate_reference.py --check   end with 1 where they are stale
"""

import sys
from pathlib import Path

import click

from synthkit.cli import COMMANDS, main
from synthkit.config import as_recipe
from synthkit.recipes.settings import SECTIONS

FOLDER = Path(__file__).resolve().parent / "reference"
WIDTH = 110

CLI = """# Commands

Written by `docs/generate_reference.py` from the code; do not edit.

Every command takes `--json`, which prints exactly one object on stdout, and `--workspace`, before the command
or after it. Stages take `--force` and `--dry-run`. Settings without an option of their own are reached by
`--set SECTION.NAME=VALUE` and `--config`; see [settings](settings.md). Exit codes: [errors](errors.md).
"""

SETTINGS = """# Settings

Written by `docs/generate_reference.py` from the code; do not edit.

`synthkit settings` prints the same, whole or one section. Its output is a valid recipe:

```
synthkit settings train > recipe.toml
synthkit train --real-dir ./few_shots --config recipe.toml --set train.epochs=30
```

A section belongs to the command of its name. `filter` belongs to `generate`. `adapt` takes all sections,
since it runs every stage. Each value below is the default; a line that begins with `# name =` shows a setting
whose default is chosen by what comes after `default:`.
"""


def help_of(name: str) -> str:
    """The text of a command's --help; of the program's where the name is empty."""
    how = {**main.context_settings, "terminal_width": WIDTH}
    top = click.Context(main, info_name="synthkit", **how)
    if not name:
        return main.get_help(top)
    command = main.get_command(top, name)
    assert command
    return command.get_help(click.Context(command, parent=top, info_name=name, **how))


def fenced(text: str, language: str = "text") -> str:
    """A fenced block."""
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return f"```{language}\n{lines}\n```\n"


def pages() -> dict[Path, str]:
    """File -> what it must hold."""
    cli = [CLI, fenced(help_of(""))]
    cli += [f"## {name}\n{fenced(help_of(name))}" for name in COMMANDS]
    settings = [SETTINGS]
    settings += [f"## {name}\n{fenced(as_recipe({name: kind}), 'toml')}" for name, kind in SECTIONS.items()]
    return {FOLDER / "cli.md": "\n".join(cli), FOLDER / "settings.md": "\n".join(settings)}


def stale() -> list[str]:
    """Names of the pages that differ from the code."""
    return [
        path.name
        for path, text in pages().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def run(arguments: list[str]) -> int:
    """Write the pages, or check them."""
    if arguments == ["--check"]:
        for name in (old := stale()):
            print(f"{name} is stale; run: python docs/generate_reference.py", file=sys.stderr)
        return int(bool(old))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
