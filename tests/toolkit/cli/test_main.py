"""The command line's frame: help, one-line errors, exit codes, and one JSON object on stdout."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from synthkit import cli
from synthkit.cli import COMMANDS, main, options
from synthkit.config import setting
from synthkit.errors import DataError
from synthkit.one_line import EXTRAS

Install = Callable[[Callable[..., Any]], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a function in the place of the command `verify`."""

    def put(function: Callable[..., Any]) -> None:
        made = options.command("verify")(function)
        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: made)

    monkeypatch.setattr(cli, "_set_up_messages", lambda verbose, quiet: None)
    return put


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def raising(error: BaseException) -> Callable[[Path], options.Output]:
    def function(workspace: Path) -> options.Output:
        """Fail."""
        raise error

    return function


def test_help_lists_every_command_in_order() -> None:
    result = call("--help")
    assert result.exit_code == 0
    places = [result.stdout.index(f"  {name} ") for name in COMMANDS]
    assert places == sorted(places)


def test_version() -> None:
    assert call("--version").stdout == f"synthkit, version {cli.synthkit.__version__}\n"


def test_an_unknown_command_is_wrong_usage_and_offers_the_nearest() -> None:
    result = call("adpat")
    assert result.exit_code == 2
    assert "no command 'adpat'; did you mean adapt" in result.stderr


def test_wrong_usage_exits_with_2(install: Install) -> None:
    install(raising(DataError("not reached")))
    assert call("verify", "--nonsense").exit_code == 2
    assert call("--workspace", __file__, "verify").exit_code == 2


def test_verbose_and_quiet_exclude_each_other() -> None:
    result = call("-v", "-q", "doctor")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: --verbose and --quiet exclude each other; give one of them\n"


def test_an_error_is_one_line_and_exit_code_1(install: Install) -> None:
    install(raising(DataError("no photo in few_shots;\n  put some there")))
    result = call("verify", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no photo in few_shots; put some there\n"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "name a folder that can be written with --workspace"),
        (errno.EACCES, "change its permissions"),
        (errno.EPERM, "change its permissions"),
        (errno.ENOTDIR, "a file stands where a folder is needed"),
        (errno.ENAMETOOLONG, "shorter path"),
        (errno.EIO, "check it"),
    ],
)
def test_trouble_with_the_disk_is_one_line(install: Install, code: int, advice: str) -> None:
    install(raising(OSError(code, os.strerror(code), "/some/where")))
    result = call("verify")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot write or read /some/where: ")
    assert advice in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "bug"), ValueError("bug"), ModuleNotFoundError("bug", name="x")]
)
def test_a_bug_keeps_its_traceback(install: Install, error: Exception) -> None:
    install(raising(error))
    assert call("verify").exception is error


@pytest.mark.parametrize(("module", "extra"), [("torch.nn", "train"), ("onnxruntime", "cpu"), ("ray", "ray")])
def test_a_package_of_an_extra_that_is_absent_is_one_line(install: Install, module: str, extra: str) -> None:
    install(raising(ModuleNotFoundError(f"No module named {module!r}", name=module)))
    result = call("verify")
    assert result.exit_code == 1
    assert result.stderr.endswith(f"is not installed; install it with: pip install 'synthkit[{extra}]'\n")


def test_every_extra_that_is_offered_exists() -> None:
    text = Path(cli.__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8")
    offered = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert all(f"\n{extra} = " in offered for extra in EXTRAS.values())


def test_a_failed_verdict_prints_its_answer_and_exits_with_1(install: Install) -> None:
    def function(workspace: Path) -> options.Output:
        """Fail a check."""
        return options.Output({"ok": False, "failures": ["é"]}, "no", ok=False)

    install(function)
    result = call("verify", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, {"ok": False, "failures": ["é"]})
    assert call("verify").stdout == "no\n"


NOISY = """
import os, subprocess, sys
from synthkit import cli
from synthkit.cli import options
def function(workspace):
    print("a library prints")
    os.write(1, b"a native library prints\\n")
    subprocess.run(["echo", "a child prints"], check=True)
    return options.Output({"answer": 42}, "forty-two")
cli.LazyGroup.get_command = lambda *args: options.command("verify")(function)
cli.main()
"""


def test_json_is_the_only_thing_on_stdout() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISY, "verify", "--json"], capture_output=True, text=True, check=True
    )
    assert done.stdout == '{"answer": 42}\n'
    for who in ("a library", "a native library", "a child"):
        assert f"{who} prints\n" in done.stderr


def test_the_workspace_reaches_the_command(install: Install, tmp_path: Path) -> None:
    install(lambda workspace: options.Output({"workspace": workspace}, ""))
    result = call("--workspace", str(tmp_path / "mine"), "verify", "--json")
    assert json.loads(result.stdout) == {"workspace": str(tmp_path / "mine")}


@pytest.fixture
def kitchen(monkeypatch: pytest.MonkeyPatch) -> tuple[click.Command, dict[str, Any]]:
    """A command of two stages that share names, and what it was last called with."""

    @dataclasses.dataclass(frozen=True)
    class Cook:
        minutes: int = setting(10, "how long", minimum=1)
        stir: bool = setting(False, "whether to stir")
        pot_size: int | None = setting(None, "which pot")
        seed: int = setting(0, "of the salt")

    @dataclasses.dataclass(frozen=True)
    class Taste:
        minutes: int = setting(1, "how long", minimum=1)
        seed: int = setting(0, "of the mood")

    for name, kind in (("learn-cook", Cook), ("taste", Taste)):
        monkeypatch.setitem(options.SECTIONS, name, kind)
    seen: dict[str, Any] = {}

    @click.command()
    @options.settings_options("learn-cook", "taste")
    @click.option("--config", type=click.Path(path_type=Path))
    def cook(config: Path | None, **given: Any) -> None:
        gathered = options.gather_settings(config, given, "learn-cook", "taste")
        seen.update({name: dataclasses.asdict(gathered[name]) for name in ("learn-cook", "taste")})

    return cook, seen


def test_settings_become_flags(kitchen: tuple[click.Command, dict[str, Any]], tmp_path: Path) -> None:
    cook, seen = kitchen
    recipe = tmp_path / "r.toml"
    recipe.write_text("[learn-cook]\nminutes = 3\npot_size = 2\n[taste]\nseed = 4\n[train]\nepochs = 2\n")
    done = CliRunner().invoke(
        cook, ["--config", str(recipe), "--stir", "--pot-size", "5", "--taste-minutes", "7"]
    )
    assert done.exit_code == 0, done.output
    assert seen["learn-cook"] == {"minutes": 3, "stir": True, "pot_size": 5, "seed": 0}
    assert seen["taste"] == {"minutes": 7, "seed": 4}
    CliRunner().invoke(cook, ["--cook-minutes", "8", "--seed", "9"])
    assert (seen["learn-cook"]["minutes"], seen["taste"]["minutes"]) == (8, 1)
    assert seen["learn-cook"]["seed"] == seen["taste"]["seed"] == 9, "one seed for all"


def test_the_help_of_flags_tells_their_defaults(kitchen: tuple[click.Command, dict[str, Any]]) -> None:
    help_text = CliRunner().invoke(kitchen[0], ["--help"]).output
    assert "--stir / --no-stir" in help_text
    assert help_text.count("--seed") == 1
    assert "--cook-minutes" in help_text and "[default: 10]" in help_text
    assert "[default: none]" in help_text


WHOLE_RECIPE = """
[build-engines]
precision = "fp32"
[learn-style]
steps = 7
[generate]
steps = 3
[train]
epochs = 2
[adapt]
layers = "2"
"""


def test_one_recipe_file_serves_every_stage(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(WHOLE_RECIPE)
    for section, name, value in (
        ("learn-style", "steps", 7),
        ("train", "epochs", 2),
        ("adapt", "layers", "2"),
    ):
        assert getattr(options.gather_settings(recipe, {}, section)[section], name) == value
    every = options.gather_settings(recipe, {"style_steps": 5, "layers": "1"}, *options.SECTIONS)
    assert (every["learn-style"].steps, every["generate"].steps, every["adapt"].layers) == (5, 3, "1")


LIGHT = """
import sys
from synthkit.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"numpy", "torch", "PIL", "onnxruntime", "timm", "diffusers", "scipy"} & set(sys.modules)
print(sorted(heavy), file=sys.stderr)
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_help_lists_what_is_the_command_s_own_before_the_settings() -> None:
    shown = CliRunner().invoke(main, ["adapt", "--help"]).stdout
    places = [shown.index(f"  {flag} ") for flag in ("--real-dir", "--dry-run", "--adapt-steps")]
    assert places == sorted(places)
