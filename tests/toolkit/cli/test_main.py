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

import pytest
from click.testing import CliRunner, Result

from synthkit import cli
from synthkit.cli import COMMANDS, main, options
from synthkit.config import gather, setting
from synthkit.errors import DataError
from synthkit.one_line import EXTRAS
from synthkit.recipes.settings import SECTIONS
from tests.project_files import ROOT

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
    advice = f"is not installed; install it with: pip install 'synthkit-edge[{extra}]'\n"
    assert result.stderr.endswith(advice)


def test_every_extra_that_is_offered_exists() -> None:
    text = ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8")
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


ODD = """
import os, sys
from synthkit import cli
from synthkit.cli import options
from synthkit.errors import DataError
name = os.fsdecode(b"Gr\\xfcn  \\x1b[31m")
def function(workspace):
    if "fail" in str(workspace):
        raise DataError(f"no folder {name}\\nat all")
    return options.Output({"path": name}, f"{name} €")
cli.LazyGroup.get_command = lambda *args: options.command("verify")(function)
cli.main()
"""


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1:strict"])
def test_names_in_any_bytes_on_consoles_of_any_encoding(encoding: str) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        command = [sys.executable, "-c", ODD, *words]
        return subprocess.run(command, capture_output=True, env=environment, check=False)

    done = run("verify", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8")) == {"path": "Gr\udcfcn  \x1b[31m"}
    assert run("verify").returncode == 0
    failed = run("--workspace", "fail", "verify")
    assert failed.returncode == 1 and failed.stderr.count(b"\n") == 1, failed.stderr
    assert failed.stderr.decode(errors="replace") == "error: no folder Gr\\udcfcn  \\x1b[31m at all\n"


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


def test_the_workspace_may_stand_after_the_command_too(install: Install, tmp_path: Path) -> None:
    install(lambda workspace: options.Output({"workspace": workspace}, ""))
    for words in (
        ["verify", "--json", "--workspace", "mine"],
        ["--workspace", "other", "verify", "--workspace", "mine", "--json"],
    ):
        assert json.loads(call(*words).stdout) == {"workspace": "mine"}
    assert json.loads(call("verify", "--json").stdout) == {"workspace": "synthkit-work"}


@pytest.fixture
def kitchen(monkeypatch: pytest.MonkeyPatch, install: Install) -> Callable[..., dict[str, Any]]:
    """Calls a command of two sections, and returns their settings."""

    @dataclasses.dataclass(frozen=True)
    class Cook:
        """`cook`: a meal."""

        minutes: int = setting(10, "how long", minimum=1)
        stir: bool = setting(False, "whether to stir")
        pot_size: int | None = setting(None, "which pot; chosen: by the number of guests")
        seed: int = setting(0, "seed of the salt")

    @dataclasses.dataclass(frozen=True)
    class Taste:
        """`taste`: a spoonful."""

        minutes: int = setting(1, "how long", minimum=1)
        seed: int = setting(0, "seed of the mood")

    for name, kind in (("cook", Cook), ("taste", Taste)):
        monkeypatch.setitem(options.SECTIONS, name, kind)

    @options.setting_flags("cook.minutes", "cook.stir", "cook.pot_size", "cook.seed+taste.seed")
    @options.recipe_options
    def function(workspace: Path, **recipe: Any) -> options.Output:
        """Cook."""
        given = options.given(recipe)
        settings = {"cook": given.over("cook", Cook()), "taste": given.over("taste", Taste())}
        return options.Output({name: dataclasses.asdict(one) for name, one in settings.items()}, "")

    install(function)

    def settings(*words: str) -> dict[str, Any]:
        done = call("verify", *words, "--json")
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    return settings


def test_flags_overrule_set_and_set_overrules_the_recipe(
    kitchen: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[cook]\nminutes = 3\npot_size = 2\n[taste]\nseed = 4\n[train]\nepochs = 2\n")
    config = ["--config", str(recipe)]
    every = kitchen(*config, "--stir", "--pot-size", "5", "--set", "taste.minutes=7")
    assert every["cook"] == {"minutes": 3, "stir": True, "pot_size": 5, "seed": 0}
    assert every["taste"] == {"minutes": 7, "seed": 4}
    every = kitchen(*config, "--set", "cook.minutes=8", "--set", "cook.pot_size=9", "--minutes", "10")
    assert (every["cook"]["minutes"], every["cook"]["pot_size"]) == (10, 9), "the default counts as given"
    every = kitchen(*config, "--seed", "0")
    assert every["cook"]["seed"] == every["taste"]["seed"] == 0, "one flag for both, and zero is a seed"


def test_the_help_of_flags_tells_their_defaults(kitchen: Callable[..., dict[str, Any]]) -> None:
    help_text = call("verify", "--help").output
    assert "--stir / --no-stir" in help_text
    assert help_text.count("--seed") == 1
    assert "[default: 10]" in help_text and "[default: by the number of guests]" in help_text


def test_every_wrong_setting_is_told_in_one_line(
    kitchen: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[cook]\nminute = 3\n[tast]\nseed = 4\n")
    wrong = ["--set", "cook.stir=1", "--set", "seed=3", "--minutes", "0"]
    done = call("verify", "--config", str(recipe), *wrong)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1, done.stderr
    for part in (
        "[cook] unknown key 'minute'; did you mean minutes",
        "unknown section [tast]; did you mean taste",
        "--set [cook] stir = 1: must be bool",
        "--set 'seed=3': write it as SECTION.NAME=VALUE",
        "[cook] minutes = 0: must be at least 1",
    ):
        assert part in done.stderr


def test_the_printed_settings_are_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(call("settings").stdout)
    read = gather(SECTIONS, recipe)
    for section, kind in SECTIONS.items():
        assert read.over(section, kind()) == kind(), section
    assert call("settings", "train").stdout.startswith("# `train`")
    assert json.loads(call("settings", "train", "--json").stdout)["train"]["epochs"] == 12
    assert call("settings", "trian").exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_on_two_screens(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"], terminal_width=100).stdout
    assert shown.count("\n") <= 50, shown


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


def test_help_lists_a_command_s_own_options_first() -> None:
    shown = CliRunner().invoke(main, ["adapt", "--help"]).stdout
    places = [shown.index(f"  {flag} ") for flag in ("--real-dir", "--weights", "--config", "--json")]
    assert places == sorted(places)
