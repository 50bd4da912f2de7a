"""Every recipe file loads, by the very reader that the commands use."""

from synthkit.config import gather, read_toml
from synthkit.recipes.procedures import BRIDGED, PROCEDURES
from synthkit.recipes.settings import SECTIONS
from tests.project_files import ROOT


def test_every_recipe_file_loads() -> None:
    files = sorted((ROOT / "recipes" / "configs").rglob("*.toml"))
    assert files
    for path in files:
        given = gather(SECTIONS, path)
        changed = any(given.over(name, kind()) != kind() for name, kind in SECTIONS.items())
        assert changed or path.stem == BRIDGED, f"{path.name} changes nothing"


def test_every_procedure_has_a_recipe_of_its_name() -> None:
    for name in PROCEDURES:
        path = ROOT / "recipes" / "configs" / f"{name}.toml"
        assert read_toml(path)["train"]["procedure"] == name
        assert f"--config recipes/configs/{name}.toml" in path.read_text("utf-8")
