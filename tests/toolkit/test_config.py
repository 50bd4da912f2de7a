"""Settings from TOML and from options: round trip, and every mistake told at once."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthkit.config import override, read_recipe, read_toml, setting
from synthkit.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Cook:
    minutes: int = setting(10, "how long", minimum=1)
    heat: float = setting(0.5, "share of full power", minimum=0)
    stir: bool = setting(False, "whether to stir")
    pot: Literal["small", "large"] = setting("small", "which pot")
    salt: str | None = setting(None, "which salt")
    spices: tuple[str, ...] = setting((), "which spices")


SECTIONS = {"cook": Cook}


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
