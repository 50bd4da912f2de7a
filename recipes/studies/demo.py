"""`demo`: the whole chain on real images that need no download, scikit-learn's handwritten digits.

    digits ──2 per class──► few_shots/ ──chain──► bundle/ ──evaluate──┐
       └────the rest──────► test/ ────────────────────────────────────┴─► table, contact sheet

The table's other rows are trained for as many gradient steps in all as the bridged student was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from synthkit.artifacts import StageResult, run_stage
from synthkit.data.contact_sheet import contact_sheet
from synthkit.data.images import ImageSet
from synthkit.metrics.classification import top1
from synthkit.recipes.chain import ChainSettings, Workspace
from synthkit.recipes.studies.compare import predict_with_methods
from synthkit.recipes.studies.methods import ADAPTED, BRIDGED, FEW_SHOT, METHODS, SYNTHETIC_ONLY, Run

SHEET = "contact_sheet.png"
_PER_ROW = 16
_COMPARED = (FEW_SHOT, SYNTHETIC_ONLY, BRIDGED, ADAPTED)


@dataclass(frozen=True)
class DemoRow:
    """One method of the table and its top-1 on the real test images."""

    method: str
    top1: float


@dataclass(frozen=True)
class DemoResult:
    """The demo's results.

    Attributes:
        stages: of the chain, in order.
        rows: the table.
        strategy: the fine-tuning strategy that `adapt` chose.
        n_test: real test images.
        sheet: the contact sheet's file.
    """

    stages: list[StageResult]
    rows: list[DemoRow]
    strategy: str
    n_test: int
    sheet: Path


def run_demo(
    settings: ChainSettings, workspace: Workspace, photos: ImageSet, test: ImageSet, force: bool
) -> DemoResult:
    """Run the chain, the compared methods and the contact sheet.

    Args:
        settings: of the chain.
        workspace: where the chain writes.
        photos: real few shots.
        test: real test images, used here only, and only to measure.
        force: adapt and export again even when nothing changed.
    """
    run = Run(settings, workspace, photos, force)
    predicted = predict_with_methods(run, test, _COMPARED)
    rows = [
        DemoRow(METHODS[method].title, top1(classes, test.labels)) for method, classes in predicted.items()
    ]
    return DemoResult(run.run_all(), rows, run.strategy(), len(test), write_contact_sheet(run))


def write_contact_sheet(run: Run) -> Path:
    """Real few shots beside synthetic images in the learned style and without it."""
    workspace, photos, usual = run.workspace, run.photos, run.chain.generate
    few = replace(usual.settings, per_class=max(1, _PER_ROW // len(photos.classes) + 1))
    plain = run_stage(replace(usual, settings=few, style=None, out=workspace.root / "plain"))
    rows = [
        ("real few shots", _pictures(photos)),
        ("synthetic, learned style", _pictures(ImageSet.scan(workspace.synthetic))),
        ("synthetic, plain prompt", _pictures(ImageSet.scan(plain.out))),
    ]
    contact_sheet(rows, workspace.root / SHEET)
    return workspace.root / SHEET


def _pictures(images: ImageSet) -> Sequence[Image.Image]:
    """As many images as fit a row, from all classes in turn."""
    rank = np.concatenate([np.arange(count) for count in np.bincount(images.labels)])
    order = np.lexsort((images.labels, rank))[:_PER_ROW]
    return [Image.open(images.items[index].path).convert("RGB") for index in order]
