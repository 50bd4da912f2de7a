"""The mapping from folders to import names; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {
    "synthkit": "toolkit",
    "synthkit.engines": "engines",
    "synthkit.calibration": "calibration",
    "synthkit.recipes": "recipes",
}

# The packages below a folder are found, so that a new one needs no line here.
packages = [
    name
    for top, folder in FOLDERS.items()
    for name in (top, *(f"{top}.{below}" for below in find_packages(folder)))
]

setup(packages=packages, package_dir=FOLDERS)
