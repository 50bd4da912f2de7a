"""A stand-in for TensorRT that is as strict as the bindings: classes made from the API table in tests/data.

An unknown attribute is an AttributeError, a wrong keyword, number or type of arguments a TypeError, a member
that a version lacks is absent. What the calls do stands in tests/tensorrt_behaviour.py; every behaviour must
have its method in the table. A call can be made to fail as TensorRT's do: by None, by False, or by -1.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

API = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text(encoding="utf-8"))
FLAVOURS = {"10": "10.3.0", "11": "11.4.0.106"}
EACH_FLAVOUR = [pytest.param("10", marks=pytest.mark.slow), "11"]
NULLPTR = "pybind11::init(): factory function returned nullptr"


class Signature:
    """One line of a docstring: `name(self: trt.X, a: str, b: int = 0) -> bool`."""

    def __init__(self, line: str) -> None:
        inside, self.returns = re.fullmatch(r"\w+\((.*)\) -> (.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
        parts = [part for part in re.split(r", (?=\w+: )", inside) if part][1:]
        self.names = [part.partition(":")[0] for part in parts]
        self.kinds = [part.partition(": ")[2].partition(" = ")[0] for part in parts]
        self.required = sum(" = " not in part for part in parts)

    def bind(self, fakes: Fakes, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments by name, or None where the call does not fit."""
        if len(args) > len(self.names) or set(kwargs) - set(self.names[len(args) :]):
            return None
        given = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        if any(name not in given for name in self.names[: self.required]):
            return None
        kinds = dict(zip(self.names, self.kinds, strict=True))
        return given if all(fakes.accepts(kinds[name], value) for name, value in given.items()) else None


class Fakes:
    """One flavour of the stand-in.

    Args:
        flavour: a key of `FLAVOURS`.
        behaviours: "Class.method" -> function(self, **arguments).
        inject: "Class.method" -> what the call returns instead of doing anything.

    Attributes:
        calls: "Class.method" of every call, in order.
        returns: "Class.method" -> annotated type of its result.
        module: what stands for the package.
    """

    def __init__(
        self,
        flavour: str,
        behaviours: Mapping[str, Callable[..., Any]],
        inject: Mapping[str, Any] | None = None,
    ) -> None:
        self.calls: list[str] = []
        self.returns: dict[str, str] = {}
        self.inject = dict(inject or {})
        self._table = API[flavour]["classes"]
        self._behaviours = behaviours
        unknown = [name for name in behaviours if not self._is_known(name)]
        assert not unknown, f"TensorRT {flavour} has no {unknown}"
        self.classes: dict[str, Any] = {}
        for name in sorted(self._table, key=lambda one: len(self._table[one].get("bases", []))):
            self.classes[name] = self._make(name, self._table[name])
        self.module = types.ModuleType("tensorrt")
        self.module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        vars(self.module).update(self.classes, __version__=FLAVOURS[flavour])

    def _is_known(self, name: str) -> bool:
        owner, method = name.split(".")
        entry = self._table.get(owner, {})
        known = {**entry.get("methods", {}), **entry.get("properties", {})}
        return method in known or method in ("__bytes__", "new")

    def _make(self, name: str, entry: Mapping[str, Any]) -> Any:
        if "members" in entry:
            kind = enum.Enum(name, entry["members"])  # type: ignore[misc]
            kind.__int__ = lambda self: self.value  # type: ignore[attr-defined]
            return kind
        body: dict[str, Any] = {"__slots__": ("_state", "__weakref__"), "__module__": "tensorrt"}
        for method, lines in entry["methods"].items():
            body[method] = self._method(name, method, [Signature(line) for line in lines])
        for attribute, writable in entry["properties"].items():
            body[attribute] = self._property(name, attribute, writable)
        if "__init__" not in entry["methods"] and not name.startswith("I" + "Logger"):
            body["__init__"] = self._no_constructor(name)
        if f"{name}.__bytes__" in self._behaviours:
            body["__bytes__"] = self._behaviours[f"{name}.__bytes__"]
        for attribute, value in entry.get("attrs", {}).items():
            body[attribute] = value
        bases = tuple(self.classes[base] for base in entry.get("bases", []))
        if bases:
            body["__slots__"] = ()
        return type(name, bases, body)

    @staticmethod
    def _no_constructor(name: str) -> Callable[..., None]:
        def __init__(self: Any) -> None:
            raise TypeError(f"tensorrt.{name}: No constructor defined!")

        return __init__

    def _method(self, owner: str, method: str, signatures: list[Signature]) -> Callable[..., Any]:
        full = f"{owner}.{method}"

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            bound = next((one for s in signatures if (one := s.bind(self, args, kwargs)) is not None), None)
            if bound is None:
                raise TypeError(f"{method}(): incompatible function arguments: {args} {kwargs}")
            self.calls.append(full)
            self.returns[full] = signatures[0].returns
            if full in self.inject:
                return self._injected(self.inject[full])
            if method == "__init__":
                this._state = {}
            behaviour = self._behaviours.get(full)
            if behaviour is None and method != "__init__":
                raise AssertionError(f"the code calls {full}, which the stand-in does not do")
            return behaviour(this, **bound) if behaviour else None

        return call

    @staticmethod
    def _injected(value: Any) -> Any:
        if isinstance(value, BaseException):
            raise value
        return value

    def _property(self, owner: str, name: str, writable: bool) -> property:
        behaviour = self._behaviours.get(f"{owner}.{name}")

        def get(this: Any) -> Any:
            return behaviour(this) if behaviour else this._state[name]

        def put(this: Any, value: Any) -> None:
            this._state[name] = value

        return property(get, put if writable else None)

    def new(self, name: str, **state: Any) -> Any:
        """An object that TensorRT itself makes."""
        made = self.classes[name].__new__(self.classes[name])
        made._state = dict(state)
        return made

    def accepts(self, kind: str, value: Any) -> bool:
        """Whether pybind11 takes a value for an annotated type."""
        kind = kind.strip()
        if kind in ("int", "typing.SupportsInt"):
            return isinstance(value, int)  # no float, no enum member
        if kind in ("buffer", "typing_extensions.Buffer"):
            return isinstance(value, (bytes, bytearray, memoryview))
        if kind == "trt.Dims":
            return isinstance(value, (tuple, list)) and all(isinstance(side, int) for side in value)
        if kind.startswith("trt.ILogger.Severity"):
            return isinstance(value, int)
        if kind.startswith(("trt.", "nvonnxparser::")):
            wanted = self.classes.get(re.split(r"\.|::", kind)[-1])
            own = isinstance(value, wanted) if wanted else False
            return own and (isinstance(value, enum.Enum) or hasattr(value, "_state"))
        builtin = {"str": str, "bool": bool, "tuple": tuple, "list": list, "object": object}[kind]
        return isinstance(value, builtin)


def failing(returns: str) -> Any:
    """What a call of the annotated result answers when it fails."""
    return {"bool": False, "int": -1}.get(returns.strip())
