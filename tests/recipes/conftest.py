"""What tests of recipes share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiny_students import tiny_bundle

if TYPE_CHECKING:
    from synthkit.recipes.train import TrainingData


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle in fp32 alone; tests that change files copy the folder first."""
    return tiny_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Synthetic images and photos of three classes; tests do not change them."""
    from synthkit.data.images import ImageSet
    from synthkit.recipes.train import TrainingData
    from tests.tiny_students import CLASSES, colour_folders

    home = tmp_path_factory.mktemp("data")
    return TrainingData(
        ImageSet.scan(colour_folders(home / "synthetic", CLASSES, each=4)),
        ImageSet.scan(colour_folders(home / "few_shots", CLASSES, each=2, seed=1, side=40)),
    )
