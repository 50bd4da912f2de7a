"""A program that runs a command line and verifies that no heavy package was imported on the way."""

from __future__ import annotations


def program(*packages: str) -> str:
    """Source of a script whose arguments are synthkit's; it fails where one of the packages was imported."""
    return f"""
import sys
from synthkit.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {set(packages)!r} & set(sys.modules)
    assert not heavy, heavy
"""


WITHOUT_TORCH = program("torch", "timm", "sklearn", "onnx", "torchvision", "transformers")
