"""The refitted head: what it learns, what it keeps, and that it solves the problem that it states."""

import numpy as np
import pytest

from synthkit.calibration import head as head_module
from synthkit.calibration.head import (
    DEFAULT_PRIOR_WEIGHT,
    PRIOR_WEIGHTS,
    Examples,
    LinearHead,
    choose_prior_weight,
    fit_head,
)
from synthkit.standalone import softmax

WIDTH = 40


def draw(centres: np.ndarray, labels: np.ndarray, seed: int, spread: float = 1.0) -> Examples:
    noise = np.random.default_rng(seed).normal(0, spread, (len(labels), WIDTH))
    return Examples((centres[labels] + noise).astype(np.float32), labels)


def centres(classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (classes, WIDTH)) + 1


def nothing() -> Examples:
    return Examples(np.empty((0, WIDTH), np.float32), np.empty(0, np.int64))


def zeros(classes: int) -> LinearHead:
    return LinearHead(np.zeros((classes, WIDTH), np.float32), np.zeros(classes, np.float32))


def share(head: LinearHead, examples: Examples) -> float:
    return float(np.mean(head.logits(examples.features).argmax(axis=1) == examples.labels))


def evenly(classes: int, each: int) -> np.ndarray:
    return np.repeat(np.arange(classes), each)


def test_it_is_the_minimum_of_the_stated_loss() -> None:
    from sklearn.linear_model import LogisticRegression

    photos = draw(centres(4), evenly(4, 12), 1)
    scale = np.sqrt((photos.features.astype(float) ** 2).sum(axis=1).mean())
    with_bias = np.hstack([photos.features / scale, np.ones((len(photos), 1))])
    other = LogisticRegression(C=1 / 0.1, fit_intercept=False, max_iter=5000, tol=1e-9)
    other.fit(with_bias, photos.labels)
    ours = fit_head(zeros(4), photos, nothing(), 4, 0.1)
    expected = other.decision_function(with_bias)
    found = ours.logits(photos.features)
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_the_prior_is_kept_where_it_is_held_firmly_and_left_where_it_is_not() -> None:
    head = LinearHead(np.random.default_rng(3).normal(0, 1, (3, WIDTH)), np.array([0.1, 0.2, 0.3]))
    photos = draw(centres(3), evenly(3, 10), 1)
    firm, loose = (fit_head(head, photos, nothing(), 3, prior_weight) for prior_weight in (1e6, 1e-2))
    assert np.abs(firm.weight - head.weight).max() < 1e-3 and np.abs(firm.bias - head.bias).max() < 1e-3
    assert share(loose, photos) == 1.0 > share(head, photos)


def test_held_out_photos_choose_a_firm_prior_that_is_right_and_a_loose_one_that_is_wrong() -> None:
    where = centres(3)
    right = fit_head(zeros(3), draw(where, evenly(3, 60), 5), nothing(), 3, 0.1)
    wrong = LinearHead(np.roll(right.weight, 1, axis=0), np.roll(right.bias, 1))
    photos = draw(where, evenly(3, 6), 6, spread=2.5)
    assert choose_prior_weight(right, photos, nothing(), 3).prior_weight == PRIOR_WEIGHTS[0]
    assert choose_prior_weight(wrong, photos, nothing(), 3).prior_weight < PRIOR_WEIGHTS[0]


def test_held_out_logits_come_from_heads_that_have_not_seen_the_photo() -> None:
    """Labels that say nothing cannot be guessed: only a leak would make most of them right."""
    random = np.random.default_rng(0)
    photos = Examples(random.normal(0, 1, (60, WIDTH)).astype(np.float32), random.permutation(evenly(3, 20)))
    choice = choose_prior_weight(zeros(3), photos, nothing(), 3)
    assert sorted(choice.rows) == list(range(60)) and choice.folds == 5
    assert np.mean(choice.logits.argmax(axis=1) == photos.labels[choice.rows]) < 0.6
    photos = Examples(photos.features, np.where(photos.labels == 2, 2, 0))
    added = choose_prior_weight(zeros(2), photos, nothing(), 3)  # the row of a new class must not leak either
    assert np.mean(added.logits[photos.labels == 2].argmax(axis=1) == 2) < 0.6


def test_a_new_class_is_learnt_beside_remembered_old_ones() -> None:
    where = centres(4)
    old = fit_head(zeros(3), draw(where, evenly(3, 20), 1), nothing(), 3, 0.1)
    memory, fresh = draw(where, evenly(3, 4), 2), draw(where, np.full(8, 3), 3)
    grown = fit_head(old, fresh, memory, 4, 0.1)
    assert grown.weight.shape == (4, WIDTH) and grown.bias.shape == (4,)
    assert share(grown, draw(where, np.full(50, 3), 4)) > 0.9
    test = draw(where, evenly(3, 50), 5)
    assert share(grown, test) > share(old, test) - 0.05


def test_a_new_class_with_many_photos_leaves_the_old_ones_their_own() -> None:
    """The head has learnt all that is remembered, four photos of each old class, and is too sure of them."""
    where = 0.45 * centres(9, seed=4)
    memory, fresh, test = (
        draw(where, evenly(8, 4), 2),
        draw(where, np.full(24, 8), 3),
        draw(where, evenly(9, 60), 5),
    )
    old = fit_head(zeros(8), memory, nothing(), 8, 0.01)
    choice = choose_prior_weight(old, fresh, memory, 9)
    grown = fit_head(old, fresh, memory, 9, choice.prior_weight).with_logit_offset(choice.logit_offset)
    known = test.labels < 8
    kept, before = share(grown, test.select(known)), share(old, test.select(known))
    assert kept > before - 0.06
    assert share(grown, test.select(~known)) > 0.5 * before
    assert (
        choice.prior_weight == DEFAULT_PRIOR_WEIGHT
    )  # the memory would vote for the firmest: the head has learnt it
    assert choice.logit_offset[8] > 0 and not choice.logit_offset[:8].any()
    held_out = choice.logits[choice.rows < 24]
    assert np.mean(held_out.argmax(axis=1) == 8) < 0.9  # these logits are restrained as well


def test_photos_of_every_old_class_leave_a_new_one_without_restraint() -> None:
    where = centres(4)
    old = fit_head(zeros(3), draw(where, evenly(3, 20), 1), nothing(), 3, 0.1)
    choice = choose_prior_weight(old, draw(where, evenly(4, 8), 3), draw(where, evenly(3, 4), 2), 4)
    assert not choice.logit_offset.any() and len(choice.rows) == 32


def test_every_class_counts_as_much_as_another() -> None:
    """A photo shown five times among photos shown once has the weight of one."""
    photos = draw(0.3 * centres(3), evenly(3, 6), 1)
    often = np.concatenate(
        [np.flatnonzero(photos.labels < 2), np.repeat(np.flatnonzero(photos.labels == 2), 5)]
    )
    once, repeated = (fit_head(zeros(3), one, nothing(), 3, 0.1) for one in (photos, photos.select(often)))
    probed = draw(0.3 * centres(3), evenly(3, 20), 2).features
    answers = [one.logits(probed).argmax(axis=1) for one in (once, repeated)]
    assert np.mean(answers[0] == answers[1]) > 0.93
    answered = softmax(repeated.logits(photos.features)).sum(axis=0)
    assert np.ptp(answered) < 0.2  # a class that counted five times would draw the others' probability


@pytest.mark.parametrize("prior_weight", [0.01, 1.0])
def test_one_photo_makes_a_new_class(prior_weight: float) -> None:
    where = centres(4)
    old = fit_head(zeros(3), draw(where, evenly(3, 20), 1), nothing(), 3, 0.1)
    grown = fit_head(old, draw(where, np.array([3]), 3), draw(where, evenly(3, 4), 2), 4, prior_weight)
    assert share(grown, draw(where, np.full(50, 3), 4, spread=0.3)) > 0.9
    choice = choose_prior_weight(old, draw(where, np.array([3]), 3), draw(where, evenly(3, 4), 2), 4)
    assert choice.folds == 12 and list(choice.rows) == list(range(1, 13))  # the memory alone can be held out
    choice = choose_prior_weight(old, draw(where, np.array([3]), 3), nothing(), 4)
    assert (choice.prior_weight, choice.folds, len(choice.rows)) == (DEFAULT_PRIOR_WEIGHT, 0, 0)


def test_one_photo_of_each_known_class_is_left_out_in_turn() -> None:
    where = centres(3)
    head = fit_head(zeros(3), draw(where, evenly(3, 20), 1), nothing(), 3, 0.1)
    choice = choose_prior_weight(head, draw(where, np.arange(3), 2), nothing(), 3)
    assert choice.folds == 3 and list(choice.rows) == [0, 1, 2]


def test_a_class_without_photos_is_kept() -> None:
    where = centres(3)
    head = fit_head(zeros(3), draw(where, evenly(3, 40), 1), nothing(), 3, 0.1)
    fitted = fit_head(head, draw(where, evenly(2, 10), 2), nothing(), 3, 1.0)
    missing = draw(where, np.full(100, 2), 3)
    assert share(fitted, missing) > share(head, missing) - 0.1


def test_the_same_photos_give_the_same_head_and_dead_features_do_no_harm() -> None:
    photos = draw(centres(3), evenly(3, 5), 1)
    photos.features[:, :10] = 0
    first, second = (fit_head(zeros(3), photos, nothing(), 3, 0.1) for _ in range(2))
    assert np.array_equal(first.weight, second.weight) and np.isfinite(first.weight).all()
    turned = Examples(photos.features[::-1].copy(), photos.labels[::-1].copy())
    other = fit_head(zeros(3), turned, nothing(), 3, 0.1)
    assert np.abs(other.weight - first.weight).max() < 1e-3 * np.abs(first.weight).max()


def test_a_temperature_changes_no_answer() -> None:
    head = LinearHead(np.random.default_rng(3).normal(0, 1, (3, WIDTH)), np.array([0.1, 0.2, 0.3]))
    features = np.random.default_rng(4).normal(0, 1, (20, WIDTH))
    assert np.allclose(head.with_temperature(2.0).logits(features) * 2, head.logits(features))


@pytest.mark.parametrize("seed", range(3))
def test_restarts_of_the_momentum_keep_the_search_short(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """83 to 131 steps with restarts, 307 to 350 without."""
    photos = draw(centres(4), evenly(4, 12), seed)
    ended = fit_head(zeros(4), photos, nothing(), 4, 0.01)
    monkeypatch.setattr(head_module, "_MOST_STEPS", 200)
    limited = fit_head(zeros(4), photos, nothing(), 4, 0.01)
    assert np.array_equal(limited.weight, ended.weight) and np.array_equal(limited.bias, ended.bias)


def test_a_new_class_starts_between_its_own_examples_and_all_others() -> None:
    where = centres(4)
    old = fit_head(zeros(3), draw(where, evenly(3, 20), 1), nothing(), 3, 0.1)
    examples = draw(where, np.full(4, 3), 3).concat(draw(where, evenly(3, 4), 2))
    grown = fit_head(old, examples, nothing(), 4, 1e9)  # so firmly held that the start is the result
    logits = grown.logits(examples.features)
    lead, own = logits[:, 3] - logits[:, :3].max(axis=1), examples.labels == 3
    assert lead[own].mean() > 1 and lead[own].mean() == pytest.approx(-lead[~own].mean(), rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_a_right_head_is_held_firmly_however_unsure_it_is(seed: int) -> None:
    """Logits of a twentieth tell the classes apart as well; only a plain loss would leave such a head."""
    where = centres(3, seed)
    right = fit_head(zeros(3), draw(where, evenly(3, 60), 5), nothing(), 3, 0.1)
    photos = draw(where, evenly(3, 6), 6 + seed, spread=2.5)
    choice = choose_prior_weight(right.with_temperature(20.0), photos, nothing(), 3)
    assert choice.prior_weight == PRIOR_WEIGHTS[0]
