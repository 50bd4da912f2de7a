"""What tests of recipes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_students import tiny_bundle


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle in fp32 alone; tests that change files copy the folder first."""
    return tiny_bundle(tmp_path_factory.mktemp("good") / "bundle")
