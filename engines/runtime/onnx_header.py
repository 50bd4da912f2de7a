"""What an ONNX file says of itself, read without the onnx package, which a device need not have.

A file is one Protocol Buffers message (onnx.proto, ModelProto); this module reads the top of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_OPSET_IMPORT = 8  # field of ModelProto: messages of a domain (1) and a version (2)
_DOMAIN, _VERSION = 1, 2
_METADATA = 14  # field of ModelProto: messages of a key (1) and a value (2)
_KEY, _VALUE = 1, 2
_VARINT, _LENGTH_DELIMITED = 0, 2  # wire types; no other occurs at the top of a model


def read_metadata(path: Path) -> dict[str, str]:
    """Key -> text of an ONNX file's metadata; empty where it has none or is no ONNX file."""
    try:
        pairs = [
            dict(_fields(value))
            for number, value in _fields(path.read_bytes())
            if number == _METADATA and isinstance(value, bytes)
        ]
        texts = [(pair[_KEY], pair.get(_VALUE, b"")) for pair in pairs]
        return {str(key, "utf-8"): str(text, "utf-8") for key, text in texts}  # type: ignore[arg-type]
    except (IndexError, KeyError, TypeError, ValueError):
        return {}


def read_opset(path: Path) -> int | None:
    """Opset of an ONNX file's standard operators; None where it states none or is no ONNX file."""
    try:
        for number, value in _fields(path.read_bytes()):
            if number == _OPSET_IMPORT and isinstance(value, bytes):
                entry = dict(_fields(value))
                if not entry.get(_DOMAIN) and isinstance(version := entry.get(_VERSION), int):
                    return version
    except (IndexError, ValueError):
        return None
    return None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        value, position = _varint(message, position)
        if tag & 7 == _LENGTH_DELIMITED:
            yield tag >> 3, message[position : position + value]
            position += value
        elif tag & 7 == _VARINT:
            yield tag >> 3, value
        else:
            raise ValueError(f"wire type {tag & 7}")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits per byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
