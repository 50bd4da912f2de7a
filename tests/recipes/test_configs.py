"""Every recipe file loads, by the very reader that the commands use."""

from synthkit.config import gather
from synthkit.recipes.settings import SECTIONS
from tests.project_files import ROOT


def test_every_recipe_file_loads() -> None:
    files = sorted((ROOT / "recipes" / "configs").rglob("*.toml"))
    assert files
    for path in files:
        given = gather(SECTIONS, path)
        assert any(
            given.over(section, SECTIONS[section]()) != SECTIONS[section]() for section in given.values
        ), f"{path.name} changes nothing"
        assert f"--config recipes/configs/{path.name}" in path.read_text("utf-8")
