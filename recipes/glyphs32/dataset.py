"""The training images: rendered once, in shards, by all processors; a killed run goes on with the next."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from synthkit.recipes.glyphs32.captions import SYMBOLS
from synthkit.recipes.glyphs32.render import render

SHARD = 5000  # images

# Meters, dials and displays show digits: each is drawn this many times as often as a letter.
_DIGIT_WEIGHT = 4


@dataclass(frozen=True)
class Renderings:
    """Rendered images.

    Attributes:
        images: uint8 [N, 32, 32, 3].
        captions: one sentence per image.
        symbols: the class of each image.
    """

    images: np.ndarray
    captions: list[str]
    symbols: list[str]


def render_dataset(folder: Path, count: int, processes: int) -> Renderings:
    """Render the images that are not yet in the folder, and load all.

    Args:
        folder: one `.npz` file per shard.
        count: images, a multiple of the shard size.
        processes: rendering processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"{index:04d}.npz" for index in range(count // SHARD)]
    missing = [path for path in shards if not path.exists()]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in tqdm(pool.imap_unordered(_render_shard, missing), "render", len(missing), unit="shard"):
            pass
    return _concatenate([_load(path) for path in shards])


def _render_shard(path: Path) -> None:
    first = int(path.stem) * SHARD
    weights = np.array([_DIGIT_WEIGHT if symbol.isdigit() else 1 for symbol in SYMBOLS], float)
    symbols = np.random.default_rng(first).choice(SYMBOLS, SHARD, p=weights / weights.sum())
    drawn = [render(str(symbol), first + offset) for offset, symbol in enumerate(symbols)]
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        images=np.stack([one.image for one in drawn]),
        texts=json.dumps([[one.symbol, one.caption] for one in drawn]),
    )
    temporary.replace(path)


def _load(path: Path) -> Renderings:
    with np.load(path) as shard:
        texts = json.loads(str(shard["texts"]))
        return Renderings(shard["images"], [text for _, text in texts], [symbol for symbol, _ in texts])


def _concatenate(shards: list[Renderings]) -> Renderings:
    return Renderings(
        np.concatenate([shard.images for shard in shards]),
        [text for shard in shards for text in shard.captions],
        [symbol for shard in shards for symbol in shard.symbols],
    )
