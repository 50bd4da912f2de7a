from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthkit.data.images import ImageSet
from synthkit.errors import WorkspaceError
from synthkit.recipes.generation.plan import Planned, SetPlan, make_plan
from synthkit.recipes.generation.rejections import REJECTED, Rounds
from synthkit.recipes.settings import GenerateSettings


@pytest.fixture
def plan() -> SetPlan:
    return make_plan(GenerateSettings(per_class=3), {"a": "letter a", "b": "letter b"}, (), None)


def draw(folder: Path, images: list[Planned]) -> None:
    for image in images:
        path = folder / image.file_name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(str(image.seed))


def named(rounds: Rounds, *names: str) -> list[Planned]:
    return [image for image in rounds.images if f"{image.name}{image.index}" in names]


def test_rejected_images_make_room_for_their_next_attempt(plan: SetPlan, tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, plan, retries=1)
    first = rounds.images
    draw(tmp_path, first)
    rounds.reject(named(rounds, "a1", "b0"), ["blank", "class"])
    assert (tmp_path / REJECTED / "blank" / "a-00001-0.png").read_text() == str(first[1].seed)
    assert (tmp_path / REJECTED / "class" / "b-00000-0.png").exists()
    assert not (tmp_path / "a" / "00001.png").exists()
    assert [image.attempt for image in rounds.images] == [0, 1, 0, 1, 0, 0]
    draw(tmp_path, rounds.images)
    rounds.reject(named(rounds, "b0", "b2"), ["duplicate", "duplicate"])
    draw(tmp_path, rounds.images)
    assert [(image.name, image.index, image.attempt) for image in rounds.images] == [
        ("a", 0, 0),
        ("a", 1, 1),
        ("a", 2, 0),
        ("b", 1, 0),
        ("b", 2, 1),
    ]
    assert rounds.totals() == {
        "a": {"kept": 3, "redrawn": 1, "given_up": {}},
        "b": {"kept": 2, "redrawn": 1, "given_up": {"duplicate": 1}},
    }


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_run_killed_between_verdict_and_move_goes_on(plan: SetPlan, tmp_path: Path, moved: int) -> None:
    rounds = Rounds(tmp_path, plan, retries=2)
    draw(tmp_path, rounds.images)
    rounds.reject(named(rounds, "a0", "a1"), ["blank", "blank"])
    for one in ("a-00000-0", "a-00001-0")[moved:]:  # as if these had not been moved any more
        number = one.split("-")[1]
        (tmp_path / REJECTED / "blank" / f"{one}.png").rename(tmp_path / "a" / f"{number}.png")
    again = Rounds(tmp_path, plan, retries=2)
    assert again.images == rounds.images
    assert not (tmp_path / "a" / "00000.png").exists() and not (tmp_path / "a" / "00001.png").exists()
    draw(tmp_path, again.images)
    assert Rounds(tmp_path, plan, retries=2).images == again.images
    assert (tmp_path / "a" / "00000.png").read_text() == str(again.images[0].seed), "the new attempt stays"


def test_rejected_images_are_no_class(plan: SetPlan, tmp_path: Path) -> None:
    from PIL import Image

    rounds = Rounds(tmp_path, plan, retries=1)
    for number, image in enumerate(rounds.images):
        (tmp_path / image.name).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / image.file_name)
    rounds.reject(named(rounds, "a1"), ["class"])
    assert ImageSet.scan(tmp_path).counts() == {"a": 2, "b": 3}


def test_a_broken_journal_is_named(plan: SetPlan, tmp_path: Path) -> None:
    (tmp_path / REJECTED).mkdir()
    for text in ("{", json.dumps([{"name": "a"}]), "3"):
        (tmp_path / REJECTED / "journal.json").write_text(text)
        with pytest.raises(
            WorkspaceError, match=r"cannot read .*journal\.json; draw the set anew with --force"
        ):
            Rounds(tmp_path, plan, retries=1)
