"""Advice can be followed: an option that a message names is an option of a command."""

from __future__ import annotations

import ast
import dataclasses
import re

import click

from synthkit.cli import COMMANDS, main
from synthkit.recipes.settings import SECTIONS
from tests.project_files import ROOT, modules

#: Modules that write the command lines of other programs.
OTHER_PROGRAMS = {
    "synthkit.engines.bundle.build_script": {"--fp16", "--int8", "--onnx"},
    "synthkit.engines.bundle.targets": {"--rm", "--model-repository", "--labels", "--shapes"},
    "synthkit.engines.tensorrt.build_plan": {"--onnx", "--fp16", "--refit"},
    "synthkit.machine": {"--query-gpu", "--format"},
    "synthkit.recipes.generation.ray_sampler": {"--address", "--head"},
    "synthkit.cli.serve": {"--data-binary"},
}


def texts(module: str) -> list[tuple[int, str]]:
    """Line and content of every text of a module, docstrings among them."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def options() -> set[str]:
    commands = [main, *(main.get_command(click.Context(main), name) for name in COMMANDS)]
    return {"--help"} | {
        flag
        for command in commands
        if command
        for option in command.params
        for flag in (*option.opts, *option.secondary_opts)
    }


def named_options(text: str) -> set[str]:
    # Not a camelCase option of trtexec, a CSS variable, or a flag that is put together from parts.
    return set(re.findall(r"(?<![\w(-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", text))


def test_every_option_that_a_message_names_exists() -> None:
    known = options()
    unknown = [
        f"{modules()[module].relative_to(ROOT)}:{line}: {flag}"
        for module in modules()
        if "glyphs32" not in module
        for line, text in texts(module)
        for flag in named_options(text) - known - OTHER_PROGRAMS.get(module, set())
    ]
    assert not unknown, "\n".join(unknown)


def test_every_setting_that_a_message_names_exists() -> None:
    names = {
        f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)
    }
    pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(SECTIONS)})\.[a-z][a-z0-9_]*(?=[ =,;:.)`]|$)")
    unknown = [
        f"{modules()[module].relative_to(ROOT)}:{line}: {name}"
        for module in modules()
        if module.startswith(("synthkit.cli", "synthkit.recipes", "synthkit.engines", "synthkit.calibration"))
        for line, text in texts(module)
        for name in pattern.findall(text)
        if name not in names and not re.search(r"\.(json|py|toml|md|onnx|png|md)$", name)
    ]
    assert not unknown, "\n".join(unknown)


def test_the_reader_of_messages() -> None:
    assert named_options("give --real-dir DIR, or leave --no-synth out") == {
        "--real-dir",
        "--no-synth",
    }
    assert named_options("var(--c1) --saveEngine=x") == set()
