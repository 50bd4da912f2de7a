"""Which timm architecture a file of weights belongs to, found by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch

# A tensor that tells a family, and its members that people take to devices or most often have weights of.
# Each one tried costs about half a second, and only where weights were refused.
_FAMILIES = {
    "layer1.0.conv1.weight": "resnet10t resnet14t resnet18 resnet26 resnet34 resnet50 resnet101",
    "conv_stem.weight": (
        "mobilenetv1_100 mobilenetv2_100 mobilenetv2_140 mobilenetv3_small_100 mobilenetv3_large_100 "
        "mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0 mnasnet_100 ghostnet_100"
    ),
    "stem.conv.weight": "regnetx_002 regnety_002 mobilevit_xxs mobilevit_s",
    "stem.0.weight": "convnext_atto convnext_tiny edgenext_xx_small",
    "patch_embed.proj.weight": "vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224",
}


def nearest_architecture(state: Mapping[str, torch.Tensor], path: Path) -> str:
    """Phrase that says which architecture's weights these look like; empty where they look like none.

    Args:
        state: tensors of the file.
        path: of the file; architectures that its name or its folder's mentions are tried too.
    """
    shares: dict[str, float] = {}
    for name in _candidates(state, path):
        shares[name] = _share(state, name)
        if shares[name] == 1:
            return f"; they are weights of {name}"
    best = max(shares, key=lambda name: shares[name], default="")
    if not best or shares[best] < 0.5:
        return ""
    return f"; the nearest match is {best}, {shares[best]:.0%} of whose tensors fit"


def _candidates(state: Mapping[str, torch.Tensor], path: Path) -> list[str]:
    """What the file's or its folder's name mentions, then the members of the family."""
    words = [part.split(".")[0] for part in (path.stem, path.parent.name)]
    families = [names.split() for key, names in _FAMILIES.items() if key in state]
    return [word for word in words if timm.is_model(word)] + [name for names in families for name in names]


def _share(state: Mapping[str, torch.Tensor], name: str) -> float:
    """Share of an architecture's tensors, but for the head's, that the file has with the same shape."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    own = {key: value.shape for key, value in model.state_dict().items() if value.dim()}
    fitting = sum(1 for key, shape in own.items() if key in state and state[key].shape == shape)
    given = sum(1 for value in state.values() if value.dim())
    return fitting / max(len(own), given - 2)  # the file's head has a weight and a bias
