"""The ways to train a student on real photos and synthetic images, as stages of the one loop `fit`.

    vanilla          photos
    vanilla-matched  photos, for as many gradient steps as the bridge
    vanilla-mixup    the same, with Mixup
    synthetic        synthetic images (Mixup)
    mixed            both in one set
    joint            both, half a batch each; loss 0.8 photos + 0.2 synthetic
    mixed-auxbn      both, half a batch each; synthetic images have BatchNorms of their own
    bridged          synthetic images ──head kept──► photos
    bridged++        synthetic images (Mixup) ──new head──► photos

Vanilla, mixed and bridged transfer as Li et al. 2024 compare them (arXiv 2403.19866); the joint loss with its
weights is that of DISEF (arXiv 2312.03046) and DataDream (arXiv 2407.10910), the auxiliary BatchNorm that of
AdvProp (arXiv 1911.09665), used for synthetic images by Yu et al. (arXiv 2312.02253). In all of them every
layer learns. A stage of the last units follows with `synthkit adapt --layers N --student DIR`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

BRIDGED: Final = "bridged++"


class Images(Enum):
    """What a stage learns from; the value is what its steps are called among the metrics."""

    SYNTHETIC = "synthetic_steps"
    REAL = "real_steps"
    BOTH = "mixed_steps"


@dataclass(frozen=True)
class Stage:
    """One run of `fit` over all layers.

    Attributes:
        images: what it learns from.
        whole: takes the gradient steps of both stages of the bridge instead of its own kind's.
        mixup: with Mixup.
        new_head: begins with a freshly initialised head.
        share: of photos in a batch of both kinds, where the settings name none; None: that of all images.
        weighted: the loss is a weighted sum of the photos' and the synthetic images' mean losses.
        auxiliary_norm: synthetic images pass BatchNorms of their own.
    """

    images: Images
    whole: bool = False
    mixup: bool = False
    new_head: bool = False
    share: float | None = None
    weighted: bool = False
    auxiliary_norm: bool = False


@dataclass(frozen=True)
class Procedure:
    """A way to train.

    Attributes:
        title: what it is, for tables.
        stages: in order; of two, the one whose images are absent is left out.
    """

    title: str
    stages: tuple[Stage, ...]


#: Name -> procedure, as `--procedure` takes it.
PROCEDURES = {
    "vanilla": Procedure("photos alone", (Stage(Images.REAL, new_head=True),)),
    "vanilla-matched": Procedure(
        "photos alone, same number of steps", (Stage(Images.REAL, whole=True, new_head=True),)
    ),
    "vanilla-mixup": Procedure(
        "photos alone with Mixup", (Stage(Images.REAL, whole=True, mixup=True, new_head=True),)
    ),
    "synthetic": Procedure("synthetic only", (Stage(Images.SYNTHETIC, mixup=True),)),
    "mixed": Procedure("both in one set", (Stage(Images.BOTH, whole=True),)),
    "joint": Procedure("joint loss", (Stage(Images.BOTH, whole=True, share=0.5, weighted=True),)),
    "mixed-auxbn": Procedure(
        "both, auxiliary BatchNorm", (Stage(Images.BOTH, whole=True, share=0.5, auxiliary_norm=True),)
    ),
    "bridged": Procedure("bridged", (Stage(Images.SYNTHETIC), Stage(Images.REAL))),
    BRIDGED: Procedure("bridged++", (Stage(Images.SYNTHETIC, mixup=True), Stage(Images.REAL, new_head=True))),
}
