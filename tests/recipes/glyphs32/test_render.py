"""The renderer behind glyphs-32: repeatable, legible, and captioned from a closed vocabulary."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from synthkit.recipes.glyphs32 import captions, scene
from synthkit.recipes.glyphs32.legibility import measure
from synthkit.recipes.glyphs32.placement import draw_placement, place
from synthkit.recipes.glyphs32.render import LEAST, render
from synthkit.recipes.glyphs32.segments import DOTS, DOTS_OTHER, FOURTEEN, SEVEN
from synthkit.recipes.glyphs32.shapes import BASE, DRAW, FONTS, font_glyph, handwritten
from synthkit.recipes.glyphs32.strokes import HANDWRITTEN, STENCILLED, parse_strokes, smooth

LETTERS = [symbol for symbol in captions.SYMBOLS if not symbol.isdigit()]


def test_a_symbol_and_a_seed_give_the_same_picture_every_time() -> None:
    first, again = render("7", 41), render("7", 41)
    assert np.array_equal(first.image, again.image)
    assert (first.caption, first.family) == (again.caption, again.family)


def test_seeds_and_symbols_change_the_picture() -> None:
    pictures = [render(symbol, seed).image for symbol in "17" for seed in range(4)]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(pictures, 2))


@pytest.mark.parametrize("size", [32, 48])
def test_pictures_are_bytes_of_the_asked_size(size: int) -> None:
    for symbol in captions.SYMBOLS:
        image = render(symbol, 3, size).image
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8


def test_an_unknown_symbol_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'a'"):
        render("a", 0)


@pytest.mark.slow
def test_families_come_in_their_shares_and_none_of_their_pictures_is_flat() -> None:
    pictures = [render(symbol, seed) for symbol in "0123456789" for seed in range(20)]
    families = [picture.family for picture in pictures]
    assert set(families) == set(captions.FAMILIES)
    assert families.count("handwritten") > families.count("stamped")
    assert min(picture.image.std() for picture in pictures) > 4


@pytest.mark.parametrize("family", captions.FAMILIES)
@pytest.mark.parametrize("symbol", captions.SYMBOLS)
def test_every_family_draws_every_symbol_inside_its_canvas(family: str, symbol: str) -> None:
    mask = DRAW[family](symbol, np.random.default_rng(5)).mask
    assert mask.shape == (BASE, BASE)
    assert mask.max() > 0.8
    assert 0.01 < mask.mean() < 0.6
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert rim.max() < 0.5


@pytest.mark.parametrize("family", captions.FAMILIES)
def test_placed_symbols_stay_almost_whole(family: str) -> None:
    rng = np.random.default_rng(0)
    for symbol in captions.SYMBOLS:
        shape = DRAW[family](symbol, rng)
        mask, placement = shape.mask, draw_placement(shape, rng, loose=family == "handwritten", upright=False)
        area = mask.sum() * placement.scale_x * placement.scale_y
        assert place(mask, placement).sum() > 0.8 * area


def test_pictures_keep_the_least_contrast() -> None:
    rng = np.random.default_rng(2)
    drawn = handwritten("3", rng, thick=True)
    mask = place(drawn.mask, draw_placement(drawn, rng, loose=False, upright=True))
    white = np.full((32, 32, 3), 255, dtype=np.uint8)
    assert measure(white, mask).contrast == 0
    picture = scene.paint(mask, scene.Colours(np.zeros(3), np.ones(3), "black on white"), 1.0)
    seen = measure((picture[::2, ::2] * 255).astype(np.uint8), mask)
    assert seen.contrast > 4 * LEAST.contrast
    assert seen.likeness > 0.85


def test_every_symbol_is_rendered_with_ink_that_stands_out() -> None:
    spreads = [float(render(symbol, 7).image.std()) for symbol in captions.SYMBOLS]
    assert min(spreads) > 4
    assert np.median(spreads) > 25


def test_each_font_has_a_glyph_of_its_own_for_each_symbol() -> None:
    for font in FONTS:
        glyphs = {font_glyph(font, symbol).tobytes() for symbol in captions.SYMBOLS}
        assert len(glyphs) == len(captions.SYMBOLS), font


def test_the_tables_cover_the_symbols() -> None:
    assert set(HANDWRITTEN) == set(DOTS) == set(captions.SYMBOLS)
    assert set(STENCILLED) == set(DOTS_OTHER) == set("0123456789")
    assert set("0123456789") <= set(SEVEN)
    assert set(FOURTEEN) == set(LETTERS)


def test_dot_forms_are_seven_rows_of_five_and_all_different() -> None:
    forms = [*DOTS.items(), *((symbol, rows) for symbol, many in DOTS_OTHER.items() for rows in many)]
    for symbol, rows in forms:
        assert len(rows) == 14, symbol
        assert all(int(rows[i : i + 2], 16) < 32 for i in range(0, 14, 2)), symbol
    assert len(set(DOTS.values())) == len(DOTS)


def test_strokes_pass_through_their_points_and_keep_corners() -> None:
    ((points, corners),) = parse_strokes("0,0 100,0! 100,100")
    line = smooth(points, corners)
    assert np.array_equal(line, [[0, 0], [1, 0], [1, 0], [1, 1]])
    ((points, corners),) = parse_strokes("0,0 50,80 100,0")
    assert min(np.abs(smooth(points, corners) - [0.5, 0.8]).sum(axis=1)) < 1e-9


def test_every_class_has_words_and_captions_say_them() -> None:
    assert captions.CLASS_WORDS["0"] == "digit zero"
    assert captions.CLASS_WORDS["Z"] == "capital letter z"
    assert len(set(captions.CLASS_WORDS.values())) == 36
    for symbol in captions.SYMBOLS:
        assert captions.CLASS_WORDS[symbol] in render(symbol, 11).caption


def test_captions_use_a_small_closed_vocabulary() -> None:
    rng = np.random.default_rng(0)
    every = [*captions.FAMILIES, *captions.QUALITIES, "white on black", "cyan on purple"]
    known = set(" ".join([*captions.CLASS_WORDS.values(), *captions.COLOUR_WORDS, *every]).split())
    known |= {"a", "photo", "of", "the", "good", "in", "style"}
    assert len(known) < 120
    texts = [captions.caption("digit four", every, rng) for _ in range(500)]
    texts += [render(symbol, seed).caption for symbol in captions.SYMBOLS for seed in (1, 2)]
    assert {word for text in texts for word in text.replace(",", "").split()} <= known
    assert max(len(text.split()) for text in texts) < 24


def test_about_half_of_the_captions_name_a_style() -> None:
    rng = np.random.default_rng(0)
    texts = [captions.caption("digit four", ["printed", "white on black"], rng) for _ in range(1000)]
    assert 0.4 < np.mean(["in the style of" in text for text in texts]) < 0.6
