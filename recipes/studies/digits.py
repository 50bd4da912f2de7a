"""scikit-learn's handwritten digits as class folders: real images that need no download.

python -m synthkit.recipes.studies.digits ./digits --shots 16
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from synthkit.artifacts import write_bytes
from synthkit.data.images import ImageSet, png
from synthkit.data.splits import check_disjoint
from synthkit.one_line import OneLineErrors


def write_digits(folder: Path, shots: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Write the digits (8x8 pixels, 17 greys) as class folders of PNG files.

    Args:
        folder: gets `few_shots/` and `test/`.
        shots: photos per class in `few_shots/`; all others go to `test/`.
        seed: which photos these are.

    Returns:
        The few shots and the test set, which share no image.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(pixels))
    for label in range(10):
        members = [index for index in order if digits.target[index] == label]
        for position, index in enumerate(members):
            part = "few_shots" if position < shots else "test"
            _write_png(folder / part / str(label) / f"{index:04d}.png", pixels[index])
    photos, test = ImageSet.scan(folder / "few_shots"), ImageSet.scan(folder / "test")
    check_disjoint(photos, test, ("few_shots", "test"))
    return photos, test


def _write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, png(pixels))


@click.command(cls=OneLineErrors, help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shots", type=click.IntRange(1, 100), default=16, show_default=True, help="Photos per class.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which photos these are.")
def main(folder: Path, shots: int, seed: int) -> None:
    """Write the folders and say where they are."""
    photos, test = write_digits(folder, shots, seed)
    click.echo(f"{photos.root}: {len(photos)} images; {test.root}: {len(test)} images")


if __name__ == "__main__":
    main()
