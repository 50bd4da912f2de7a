"""Every recipe file loads, by the very reader that the commands use."""

from synthkit.config import read_recipe
from synthkit.recipes.settings import SECTIONS
from tests.house import ROOT


def test_every_recipe_file_loads() -> None:
    files = sorted((ROOT / "recipes" / "configs").rglob("*.toml"))
    assert files
    for path in files:
        settings = read_recipe(path, SECTIONS)
        assert settings != {name: kind() for name, kind in SECTIONS.items()}, f"{path.name} changes nothing"
