"""The mapping from folders to import names; everything else is in pyproject.toml."""

from setuptools import setup

PACKAGES = {
    "synthkit": "toolkit",
    "synthkit.cli": "toolkit/cli",
    "synthkit.models": "toolkit/models",
    "synthkit.engines": "engines",
    "synthkit.engines.tensorrt": "engines/tensorrt",
    "synthkit.calibration": "calibration",
    "synthkit.recipes": "recipes",
    "synthkit.recipes.glyphs32": "recipes/glyphs32",
}

setup(packages=list(PACKAGES), package_dir=PACKAGES)
