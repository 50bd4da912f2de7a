"""Settings as frozen dataclasses, filled from a TOML recipe file, from `--set` and from flags.

One definition serves all: a field made by `setting` carries its default and its help text, a recipe file's
section names the fields, and `synthkit.cli.options` makes the flags. What was given is kept apart from
defaults (`Given`), so that an explicit value wins over what a workspace remembers, also where it equals the
default. This module knows no particular setting.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from synthkit.errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = TypeVar("Settings")


def setting(default: Any, help: str, *, minimum: float | None = None, in_key: bool = True) -> Any:
    """Field of a settings dataclass.

    Args:
        default: value when neither a recipe nor the command line gives one.
        help: one phrase for `--help` and `synthkit settings`, with the unit. Where the default is None, what
            takes its place follows "; chosen: ".
        minimum: smallest value that makes sense.
        in_key: whether it changes a stage's result; what does not (a batch size, a device) leaves a finished
            stage valid.
    """
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum, "in_key": in_key})


def keyed(settings: Any) -> dict[str, Any]:
    """Name -> value of the settings that change a result."""
    return {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.metadata.get("in_key", True)
    }


def read_toml(path: Path) -> dict[str, Any]:
    """Content of a TOML file.

    Raises:
        ConfigError: the file is missing, cannot be read, is not UTF-8 text or is not TOML.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return content
    except FileNotFoundError:
        raise ConfigError(f"no file {path}; give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


Sections = Mapping[str, type]
Values = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Given:
    """The settings that a user gave, wherever: what is not here has its default.

    Attributes:
        values: section -> name -> value; also values that equal the default.
    """

    values: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def over(self, section: str, base: Settings) -> Settings:
        """The settings of a section: a base, overruled by what was given."""
        return typing.cast(
            Settings, dataclasses.replace(typing.cast(Any, base), **self.values.get(section, {}))
        )

    def has(self, section: str, name: str) -> bool:
        """Whether a setting was given."""
        return name in self.values.get(section, {})


def gather(
    sections: Sections,
    recipe: Path | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[tuple[str, str], Any] | None = None,
) -> Given:
    """What was given in a recipe file, then by `--set`, then by flags; the later overrules.

    Args:
        sections: section name -> settings dataclass.
        recipe: a TOML file, or the manifest.json of a stage.
        assignments: "section.name=value" each, the value in TOML or as plain text.
        flags: (section, name) -> value; None means "not given".

    Raises:
        ConfigError: names every unknown section, unknown key and unusable value at once.
    """
    problems: list[str] = []
    sources: list[tuple[str, Values]] = []
    if recipe:
        sources.append((f"{recipe}: ", read_recipe(recipe)))
    for text in assignments:
        values, problem = _assignment(text, sections)
        problems += [problem] if problem else []
        sources.append(("--set ", values))
    by_flags: Values = {}
    for (section, name), value in (flags or {}).items():
        if value is not None:
            by_flags.setdefault(section, {})[name] = value
    sources.append(("", by_flags))
    given: Values = {}
    for label, source in sources:
        for section, values in source.items():
            if section not in sections:
                problems.append(f"{label}unknown section [{section}]{nearest(section, sections)}")
                continue
            converted = _converted(values, sections[section])
            problems += [f"{label}[{section}] {text}" for text in _problems(converted, sections[section])]
            if isinstance(converted, Mapping):
                given.setdefault(section, {}).update(converted)
    if problems:
        raise ConfigError("; ".join(problems))
    return Given(given)


def read_recipe(path: Path) -> Values:
    """Section -> name -> value of a recipe file, unchecked; of a manifest, the settings that it records.

    Raises:
        ConfigError: the file cannot be read, or is neither.
    """
    if path.suffix != ".json":
        return read_toml(path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; give a TOML file or a manifest.json"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is no manifest of a stage; give a TOML file or a manifest.json") from None
    # A manifest says None where a recipe file would leave the line out.
    return {
        section: {name: value for name, value in values.items() if value is not None}
        for section, values in settings.items()
    }


def _assignment(text: str, sections: Sections) -> tuple[Values, str]:
    """The setting of a `--set`, and what is wrong with it."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    key = key.replace("-", "_")
    if not (equals and dot and section and key):
        return {}, f"--set {text!r}: write it as SECTION.NAME=VALUE, for example train.lr=0.001"
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # text needs no quotes here
    kind = typing.get_type_hints(sections[section]).get(key) if section in sections else None
    if _takes_only_text(kind) and not isinstance(parsed, str):
        parsed = value.strip()  # a class called 7 is no number
    if typing.get_origin(kind) is tuple and isinstance(parsed, str):
        parsed = [parsed]
    return {section: {key: parsed}}, ""


def _takes_only_text(kind: Any) -> bool:
    members = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is typing.Literal:
        return all(isinstance(one, str) for one in members)
    return str in members and not {int, float} & set(members) and typing.get_origin(kind) is not tuple


def as_recipe(sections: Sections) -> str:
    """Every setting of some sections as a recipe file, with meaning, range and default in comments.

    A setting whose default is chosen by the program stands as a comment: to have no line means just that.
    """
    return "\n".join(line for name, kind in sections.items() for line in _section_lines(name, kind))


def _section_lines(name: str, kind: type) -> Iterator[str]:
    yield f"# {(kind.__doc__ or '').strip().splitlines()[0]}"
    yield f"[{name}]"
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        text, _, chosen = field.metadata["help"].partition("; chosen: ")
        allowed = _allowed(types[field.name], field.metadata["minimum"])
        yield f"# {text}" + (f" ({allowed})" if allowed else "")
        if field.default is None:
            example = _example(types[field.name], field.metadata["minimum"])
            yield f"# {field.name} = {example}  # default: {chosen or 'none'}"
        else:
            yield f"{field.name} = {_toml(field.default)}"
    yield ""


def _allowed(kind: Any, minimum: float | None) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return "" if minimum is None else f"at least {minimum}"


def _example(kind: Any, minimum: float | None) -> str:
    members = [one for one in typing.get_args(kind) if one is not type(None)]
    return str(minimum or 0.5) if {int, float} & set(members) else '"..."'


def _toml(value: Any) -> str:
    # JSON's texts, numbers, truth values and lists are TOML's as well.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def override(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Copy of the settings with the given values; None means "not given".

    Raises:
        ConfigError: a value lies outside its range.
    """
    given = _converted({name: one for name, one in values.items() if one is not None}, type(settings))
    problems = _problems(given, type(settings))
    if problems:
        raise ConfigError("; ".join(problems))
    return typing.cast(Settings, dataclasses.replace(typing.cast(Any, settings), **given))


def _problems(values: Any, kind: type) -> list[str]:
    if not isinstance(values, Mapping):
        return [f"= {values!r}: must be a table of settings"]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    problems = []
    for name, value in values.items():
        if name not in fields:
            problems.append(f"unknown key {name!r}{nearest(name, fields)}")
            continue
        problem = _problem(value, types[name], fields[name].metadata.get("minimum"))
        if problem:
            problems.append(f"{name} = {value!r}: {problem}")
    return problems


def _problem(value: Any, kind: Any, minimum: float | None) -> str:
    allowed = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        names = [str(one) for one in allowed]
        return "" if value in allowed else f"must be one of {', '.join(names)}{nearest(str(value), names)}"
    accepted = tuple(allowed) if allowed and typing.get_origin(kind) is not tuple else (kind,)
    if not any(_is_a(value, one) for one in accepted):
        names = [getattr(one, "__name__", str(one)) for one in accepted if one is not type(None)]
        return f"must be {' or '.join(names)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if minimum is not None and isinstance(value, (int, float)) and value < minimum:
        return f"must be at least {minimum}"
    return ""


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _converted(values: Any, kind: type) -> Any:
    if not isinstance(values, Mapping):
        return values
    types = typing.get_type_hints(kind)
    return {name: _as_kind(value, types.get(name)) for name, value in values.items()}


def _as_kind(value: Any, kind: Any) -> Any:
    """A value in the form that counts for a stage's key: 15 and "15" are the same number of steps."""
    if typing.get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, (list, tuple)) else value
    members = (kind, *typing.get_args(kind))
    numbers = [one for one in members if one in (int, float)]
    if isinstance(value, str) and numbers and str in members:
        try:
            return numbers[0](value)
        except ValueError:
            return value
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_number and float in numbers and int not in numbers else value
