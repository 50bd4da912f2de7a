"""Groups of one look: planted looks are found again, whatever the classes add."""

from __future__ import annotations

import numpy as np
import pytest

from synthkit.calibration.style_clusters import class_effects, cluster_by_style, style_features
from synthkit.errors import ConfigError

pytest.importorskip("sklearn")


def planted(per_class: int, class_shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Latents, labels and true looks (4 : 2 : 1) of 80 photos; a class shifts its latents too."""
    random = np.random.default_rng(seed)
    classes = 80 // per_class
    labels = np.repeat(np.arange(classes), per_class)
    looks = random.choice([0, 0, 0, 0, 1, 1, 2], len(labels))
    latents = random.normal(0, 1, (len(labels), 3, 8, 8))
    latents[looks == 1, 0] += 3
    latents[looks == 2, 1] = 0.25 * latents[looks == 2, 1] - 3
    latents += class_shift * random.normal(0, 1, (classes, 3))[labels][:, :, None, None]
    return latents, labels, looks


def pairs(groups: np.ndarray) -> np.ndarray:
    """Whether two photos are of one group [N, N]."""
    return groups[:, None] == groups[None]


@pytest.mark.parametrize(("per_class", "class_shift"), [(1, 0.0), (4, 0.0), (8, 2.0)])
def test_planted_looks_are_found_whatever_the_classes_add(per_class: int, class_shift: float) -> None:
    latents, labels, looks = planted(per_class, class_shift)
    groups = cluster_by_style(latents, labels, 3, 0)
    assert (pairs(groups) == pairs(looks)).mean() > 0.97
    sizes = np.bincount(groups)
    assert len(sizes) == 3 and (np.diff(sizes) <= 0).all(), "the largest comes first"


def test_without_taking_the_class_off_a_class_would_be_a_look() -> None:
    """The planted shift is large enough to matter: the raw features group by class."""
    from sklearn.cluster import KMeans

    latents, _, looks = planted(8, 2.0)
    raw = np.concatenate([latents.mean((2, 3)), latents.std((2, 3))], 1)
    groups = KMeans(3, n_init=10, random_state=0).fit(raw).labels_
    assert (pairs(groups) == pairs(looks)).mean() < 0.8


def test_class_effects_are_shrunk_by_what_chance_explains() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 5)
    noise = random.normal(0, 1, (200, 2))
    effects = random.normal(0, 1, 40)[labels]
    found = class_effects(noise + np.stack([effects, np.zeros(200)], 1), labels)
    assert np.corrcoef(found[:, 0], effects)[0, 1] > 0.85
    assert found[:, 0].std() == pytest.approx(effects.std(), rel=0.2)
    assert found[:, 1].std() < 0.15, "of 0.45 that the class means vary by chance"


def test_where_every_class_has_one_photo_nothing_is_taken_off() -> None:
    features = np.random.default_rng(0).normal(size=(6, 3))
    assert not class_effects(features, np.arange(6)).any()
    assert not class_effects(features, np.zeros(6, int)).any()


def test_one_class_far_off_keeps_its_own_shift_out() -> None:
    features = np.array([[0.0], [0.1], [9.0], [9.1]])
    rest = features - class_effects(features, np.array([3, 3, 7, 7]))
    assert np.abs(rest - rest.mean()).max() < 0.1


def test_features_are_means_and_deviations_of_the_channels() -> None:
    latents, labels, _ = planted(1)
    features = style_features(latents, labels)
    assert np.allclose(features[:, 1], latents[:, 1].mean((1, 2)))
    assert np.allclose(features[:, 5], latents[:, 2].std((1, 2)))


def test_groups_are_the_same_every_time_and_one_group_is_all() -> None:
    latents, labels, _ = planted(4)
    assert np.array_equal(cluster_by_style(latents, labels, 4, 7), cluster_by_style(latents, labels, 4, 7))
    assert not cluster_by_style(latents, labels, 1, 0).any()


def test_more_clusters_than_photos_that_differ_are_refused() -> None:
    latents, labels, _ = planted(1)
    latents[3:] = latents[3]
    with pytest.raises(ConfigError, match="5 clusters were asked for, but there are 4 photos that differ"):
        cluster_by_style(latents, labels, 5, 0)
    assert len(np.unique(cluster_by_style(latents, labels, 4, 0))) == 4
