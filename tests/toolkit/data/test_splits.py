"""Splits: no shared content, nested draws, stratified folds."""

from pathlib import Path

import numpy as np
import pytest

from synthkit.data.images import ImageSet
from synthkit.data.splits import check_disjoint, k_shot, stratified_folds
from synthkit.errors import DataError
from tests.tiny_students import class_folders


def test_shared_content_is_refused_whatever_its_name(tmp_path: Path) -> None:
    first = ImageSet.scan(class_folders(tmp_path / "first", seed=1))
    folder = class_folders(tmp_path / "second", seed=2)
    check_disjoint(first, ImageSet.scan(folder), ("the few shots", "the test set"))
    (folder / "Ω" / "copy.png").write_bytes(first.items[0].path.read_bytes())
    with pytest.raises(DataError, match=r"the test set shares 1 image.*with the few shots.*copy.png"):
        check_disjoint(first, ImageSet.scan(folder), ("the few shots", "the test set"))


def test_folds_are_stratified_and_cover_every_image_once() -> None:
    labels = np.array([0] * 7 + [1] * 5 + [2] * 1)
    folds = stratified_folds(labels, 3, seed=4)
    assert len(folds) == 3
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(12))
    for training, held in folds:
        assert 12 in training and not set(training) & set(held) and len(training) + len(held) == 13
        assert 2 <= np.sum(labels[held] == 0) <= 3 and 1 <= np.sum(labels[held] == 1) <= 2
    again = stratified_folds(labels, 3, seed=4)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(folds, again, strict=True))
    assert stratified_folds(np.array([0, 1, 2]), 5, seed=0) == []
    assert len(stratified_folds(np.array([0, 0, 1, 1]), 5, seed=0)) == 2


def test_k_shot_draws_are_nested_and_follow_the_content(tmp_path: Path) -> None:
    images = ImageSet.scan(class_folders(tmp_path / "a", each=6))
    draws = [k_shot(images, shots, seed=3) for shots in (1, 2, 4)]
    assert set(draws[0]) < set(draws[1]) < set(draws[2])
    assert images.subset(draws[1]).counts() == dict.fromkeys(images.classes, 2)
    assert {tuple(k_shot(images, 2, seed).tolist()) for seed in range(5)} != {tuple(draws[1].tolist())}
    for path in [item.path for item in images.items]:
        path.rename(path.with_name(f"x{9 - int(path.stem)}.png"))
    renamed = ImageSet.scan(tmp_path / "a")
    found = {renamed.items[i].sha256 for i in k_shot(renamed, 2, 3)}
    assert found == {images.items[i].sha256 for i in draws[1]}
    with pytest.raises(DataError, match=r"7 images per class .*a dog has 6"):
        k_shot(images, 7, seed=0)


def test_copies_are_drawn_once(tmp_path: Path) -> None:
    images = ImageSet.scan(class_folders(tmp_path / "a", each=3))
    for item in images.items:
        item.path.with_name(f"copy of {item.path.name}").write_bytes(item.path.read_bytes())
    copied = ImageSet.scan(tmp_path / "a")
    assert len(copied) == 2 * len(images) and copied.distinct().digest == images.digest
    drawn = copied.subset(k_shot(copied, 2, seed=3))
    assert drawn.digest == images.subset(k_shot(images, 2, seed=3)).digest
    with pytest.raises(DataError, match=r"4 images per class .*a dog has 3"):
        k_shot(copied, 4, seed=0)


def test_folds_of_small_classes_are_of_one_size() -> None:
    """Each class continues with the fold after the one where the class before ended."""
    folds = stratified_folds(np.repeat(np.arange(4), 3), 2, seed=0)
    assert [len(validation) for _, validation in folds] == [6, 6]
