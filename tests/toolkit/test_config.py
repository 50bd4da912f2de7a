"""Settings from TOML and from options: round trip, and every mistake told at once."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthkit.config import Given, as_recipe, gather, keyed, override, read_toml, setting
from synthkit.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Cook:
    """`cook`: a meal."""

    minutes: int = setting(10, "how long", minimum=1)
    heat: float = setting(0.5, "share of full power", minimum=0)
    stir: bool = setting(False, "whether to stir")
    pot: Literal["small", "large"] = setting("small", "which pot")
    salt: str | None = setting(None, "which salt")
    spices: tuple[str, ...] = setting((), "which spices")
    turns: int | str = setting(15, "turns, or LOW:HIGH", minimum=1)
    helpers: int | None = setting(None, "who helps; chosen: all there are", minimum=1, in_key=False)


SECTIONS = {"cook": Cook}


def read_recipe(path: Path, sections: dict[str, type]) -> dict[str, Any]:
    given = gather(sections, path)
    return {name: given.over(name, kind()) for name, kind in sections.items()}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def toml_of(values: dict[str, Any]) -> str:
    return "[cook]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def test_left_out_sections_and_keys_get_their_defaults(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, ""), SECTIONS) == {"cook": Cook()}
    assert read_recipe(written(tmp_path, "[cook]\nminutes = 3"), SECTIONS)["cook"] == Cook(minutes=3)


text = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12)


@given(
    minutes=st.integers(1, 2**40),
    heat=st.floats(0, 1e6, allow_subnormal=False),
    stir=st.booleans(),
    pot=st.sampled_from(["small", "large"]),
    salt=text,
    spices=st.lists(text, max_size=4),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    path = written(tmp_path_factory.getbasetemp(), toml_of(values))
    expected = Cook(**{**values, "spices": tuple(values["spices"])})
    assert read_recipe(path, SECTIONS)["cook"] == expected


def test_an_integer_is_a_fine_number_and_a_boolean_is_not(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, "[cook]\nheat = 1"), SECTIONS)["cook"].heat == 1
    with pytest.raises(ConfigError, match="minutes = True: must be int"):
        read_recipe(written(tmp_path, "[cook]\nminutes = true"), SECTIONS)


def test_every_problem_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[kook]\n[cook]\nminuts = 3\nheat = "hot"\nminutes = 0\npot = "huge"\nsalt = 7\nstir = 1',
    )
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, SECTIONS)
    for part in (
        str(path),
        "unknown section [kook]; did you mean cook?",
        "unknown key 'minuts'; did you mean minutes?",
        "heat = 'hot': must be float",
        "minutes = 0: must be at least 1",
        "pot = 'huge': must be one of small, large",
        "salt = 7: must be str",
        "stir = 1: must be bool",
    ):
        assert part in str(caught.value)
    assert "NoneType" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cook = 3", r"\[cook\] = 3: must be a table"),
        ("[[cook]]\nminutes = 1", "must be a table"),
        ("[cook]\nheat = nan", "must be a finite number"),
        ("[cook]\nheat = inf", "must be a finite number"),
        ("[cook\n", "is not valid TOML"),
    ],
)
def test_unusable_content(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(written(tmp_path, content), SECTIONS)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        read_toml(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_toml(tmp_path / "latin.toml")


def test_override_takes_what_is_given() -> None:
    assert override(Cook(minutes=3), {"minutes": None, "heat": 0.9}) == Cook(minutes=3, heat=0.9)
    with pytest.raises(ConfigError, match="minutes = 0: must be at least 1"):
        override(Cook(), {"minutes": 0})


def test_a_later_source_overrules_an_earlier_one_also_with_the_default(tmp_path: Path) -> None:
    path = written(tmp_path, "[cook]\nminutes = 3\nheat = 0.9\nstir = true")
    given = gather(SECTIONS, path, ["cook.minutes=10", "cook.stir=false"], {("cook", "heat"): 0.0})
    assert given.over("cook", Cook(minutes=7, heat=0.7, stir=True)) == Cook(minutes=10, heat=0.0, stir=False)
    assert given.has("cook", "heat") and not given.has("cook", "pot")
    assert Given().over("cook", Cook(minutes=7)) == Cook(minutes=7)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("cook.minutes=3", "minutes", 3),
        ("cook.heat=1", "heat", 1.0),
        ("cook.turns=15", "turns", 15),
        ('cook.turns="15"', "turns", 15),
        ("cook.turns=10:14", "turns", "10:14"),
        ("cook.salt=7", "salt", "7"),
        ('cook.salt="sea salt"', "salt", "sea salt"),
        ("cook.salt=sea salt", "salt", "sea salt"),
        ("cook.pot=large", "pot", "large"),
        ("cook.spices=mint", "spices", ("mint",)),
        ('cook.spices=["mint", "sage"]', "spices", ("mint", "sage")),
        ("cook.helpers=2", "helpers", 2),
        ("cook.salt=", "salt", ""),
    ],
)
def test_set_takes_toml_and_plain_text(text: str, name: str, value: object) -> None:
    result = getattr(gather(SECTIONS, assignments=[text]).over("cook", Cook()), name)
    assert (result, type(result)) == (value, type(value))


def test_every_problem_of_recipe_set_and_flags_is_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "[cook]\nminuts = 3")
    wrong = ["cook.turns=0", "bake.x=1", "minutes=3", "cook.turns=-2"]
    with pytest.raises(ConfigError) as caught:
        gather(SECTIONS, path, wrong, {("cook", "minutes"): 0})
    for part in (
        "unknown key 'minuts'",
        "--set [cook] turns = 0: must be at least 1",
        "--set unknown section [bake]",
        "--set 'minutes=3': write it as SECTION.NAME=VALUE",
        "--set [cook] turns = -2: must be at least 1",
        "[cook] minutes = 0: must be at least 1",
    ):
        assert part in str(caught.value)


def test_the_printed_settings_are_a_recipe_of_the_defaults(tmp_path: Path) -> None:
    text = as_recipe(SECTIONS)
    assert read_recipe(written(tmp_path, text), SECTIONS) == {"cook": Cook()}
    assert "# which pot (small | large)" in text
    assert "# helpers = 1  # default: all there are" in text
    uncommented = text.replace("# helpers", "helpers")
    assert read_recipe(written(tmp_path, uncommented), SECTIONS) == {"cook": Cook(helpers=1)}


def test_a_manifest_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    cook = Cook(minutes=3, spices=("mint",))
    path.write_text(json.dumps({"stage": "cook", "settings": {"cook": dataclasses.asdict(cook)}}))
    assert read_recipe(path, SECTIONS) == {"cook": cook}
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no manifest of a stage"):
        read_recipe(path, SECTIONS)


def test_what_changes_no_result_is_no_part_of_a_key() -> None:
    assert "helpers" not in keyed(Cook())
    assert keyed(Cook()) == keyed(Cook(helpers=3)) != keyed(Cook(minutes=3))
