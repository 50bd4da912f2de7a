"""Students: timm classifiers with their classes, preprocessing and layer groups (stem, blocks, head).

A student's folder is timm's own (`config.json`, `model.safetensors`), so `timm.create_model("local-dir:DIR")`
loads it without synthkit.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models import group_parameters

from synthkit.artifacts import read_manifest, write_bytes, write_json
from synthkit.data.images import ImageSet, Preprocessing
from synthkit.errors import ConfigError, ModelError, nearest

log = logging.getLogger(__name__)

#: Subfolder of what `train` writes: the student before it saw a real photo.
SYNTHETIC = "synthetic"
CONFIG, WEIGHTS = "config.json", "model.safetensors"

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


@dataclass(frozen=True)
class Student:
    """A classifier and what is needed to use it.

    Attributes:
        model: normalised pixels float32 [N, 3, H, W] -> logits [N, classes].
        architecture: timm's name.
        model_args: what the architecture was created with beyond timm's defaults.
        classes: names in the order of the logits.
        preprocessing: image -> uint8 [H, W, 3], with the mean and std that normalise it.
    """

    model: torch.nn.Module
    architecture: str
    model_args: Mapping[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def clone(self) -> Student:
        """A copy whose weights are its own."""
        return replace(self, model=copy.deepcopy(self.model))

    @property
    def head(self) -> torch.nn.Module:
        """The last layer.

        Raises:
            ModelError: the architecture has several heads, as distilled ones have.
        """
        head = self.model.get_classifier()
        if not isinstance(head, torch.nn.Module):
            raise ModelError(f"the student {self.architecture!r} has more than one head; use another student")
        return head

    def reset_head(self, seed: int) -> None:
        """Throw the trained head away for a freshly initialised one (bridged transfer++, "FC reinit")."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model.reset_classifier(len(self.classes))

    @torch.no_grad()
    def zero_head(self) -> None:
        """Let every logit start at zero.

        How large timm makes a fresh head differs by family: a MobileNet's gives logits in the tens, which a
        few steps do not unlearn.
        """
        for parameter in self.head.parameters():
            parameter.zero_()

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels in 0..1 [N, 3, H, W] -> the model's input."""
        mean = torch.tensor(self.preprocessing.mean).view(3, 1, 1)
        std = torch.tensor(self.preprocessing.std).view(3, 1, 1)
        return (images - mean) / std

    @torch.no_grad()
    def logits(self, images: Any, batch_size: int = 128) -> torch.Tensor:
        """Logits [N, classes] of uint8 images [N, H, W, 3], in eval mode."""
        self.model.eval()
        device = next(self.model.parameters()).device
        found = [
            self.model(self.normalise(to_unit_range(images[start : start + batch_size])).to(device))
            for start in range(0, len(images), batch_size)
        ]
        return torch.cat(found).cpu()

    @torch.no_grad()
    def features(self, images: Any, batch_size: int = 128) -> np.ndarray:
        """Pooled features before the head, float32 [N, D], of uint8 images [N, H, W, 3], in eval mode."""
        self.model.eval()
        network: Any = self.model
        found = []
        for start in range(0, len(images), batch_size):
            pixels = self.normalise(to_unit_range(images[start : start + batch_size]))
            found.append(network.forward_head(network.forward_features(pixels), pre_logits=True))
        return np.asarray(torch.cat(found).flatten(1).float().numpy())

    def layer_groups(self) -> list[list[str]]:
        """Names of the parameters of each of timm's layer groups, from the stem to the head.

        The classifier is a group of its own, also where timm counts a layer before it to the same group.
        """
        grouped = group_parameters(self.model, self.model.group_matcher(coarse=False))
        groups = [grouped[index] for index in sorted(grouped)]
        own = {id(parameter) for parameter in self.head.parameters()}
        names = [name for name, parameter in self.model.named_parameters() if id(parameter) in own]
        body = [[name for name in group if name not in names] for group in groups]
        return [group for group in body if group] + [names]

    def train_only_last(self, count: int) -> None:
        """Freeze all but the parameters of the last layer groups; 0 freezes all."""
        groups = self.layer_groups()
        last = {name for group in groups[len(groups) - min(count, len(groups)) :] for name in group}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in last)

    def save(self, folder: Path) -> None:
        """Write timm's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        write_bytes(folder / WEIGHTS, save(state))
        data_config = self.preprocessing.to_json()
        write_json(
            folder / CONFIG,
            {
                "architecture": self.architecture,
                "num_classes": len(self.classes),
                "num_features": self.model.num_features,
                "model_args": dict(self.model_args),
                "label_names": list(self.classes),
                "pretrained_cfg": {
                    **data_config,
                    "num_classes": len(self.classes),
                    "label_names": list(self.classes),
                },
            },
        )


def to_unit_range(images: Any) -> torch.Tensor:
    """uint8 images [N, H, W, 3] -> float32 [N, 3, H, W] in 0..1."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255


def new_student(
    name: str,
    classes: Sequence[str],
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Student:
    """A student with a fresh head for the given classes.

    Args:
        name: timm's model name.
        classes: class names.
        pretrained: fetch timm's weights from the hub.
        weights: local timm folder, or safetensors file of the architecture; excludes `pretrained`.
        image_size: input side in pixels; None: the one the weights were trained at.
        seed: of the initial weights.

    Raises:
        ModelError: the architecture is unknown, or its weights are absent or do not fit.
        ConfigError: both kinds of weights were asked for.
    """
    check_architecture(name)
    if weights and pretrained:
        raise ConfigError("--weights and --pretrained exclude each other; give one of them")
    config = _local_config(weights) if weights else {}
    model_args = dict(config.get("model_args") or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _create(name, len(classes), pretrained, _sized(name, model_args, image_size))
    data_config = timm.data.resolve_model_data_config(model)
    if weights:
        _load_body(model, weights, name)
        data_config |= {key: value for key, value in _pretrained_config(config).items() if key in data_config}
    preprocessing = Preprocessing.from_timm(data_config)
    if image_size:
        preprocessing = replace(preprocessing, input_size=(3, image_size, image_size), crop_pct=1.0)
    if not weights and not pretrained:  # nothing was learned from crops: keep all of a picture in view
        preprocessing = replace(preprocessing, crop_pct=1.0, crop_mode="squash")
    student = Student(model, name, _sized(name, model_args, image_size), tuple(classes), preprocessing)
    _ = student.head  # refuses what has several heads before anything is trained
    if weights or pretrained:
        student.zero_head()
    return student


def check_architecture(name: str) -> None:
    """Refuse a student that timm does not know.

    Raises:
        ModelError: offers the nearest names.
    """
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        if Path(name).is_dir():
            hint = "; to start from the student in this folder give it with --weights"
        raise ModelError(f"timm knows no student {name!r}{hint}")


def _sized(name: str, model_args: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    """Arguments of an architecture whose weights depend on the input size, such as a ViT."""
    fixed = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if image_size and getattr(fixed, "fixed_input_size", False):
        return {**model_args, "img_size": image_size}
    return dict(model_args)


def _create(name: str, classes: int, pretrained: bool, model_args: Mapping[str, Any]) -> torch.nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **model_args)
    except Exception as error:  # hub clients raise many kinds; what a user can do is the same for all
        if not pretrained:
            raise
        raise ModelError(
            f"timm's weights of {name} cannot be fetched ({type(error).__name__}); go online once, or give a "
            "local file with --weights, or start from random weights with --no-pretrained"
        ) from None


def _local_config(weights: Path) -> dict[str, Any]:
    folder = weights if weights.is_dir() else weights.parent
    try:
        content = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _pretrained_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.get("pretrained_cfg", {}).items() if value is not None}


def _load_body(model: torch.nn.Module, weights: Path, name: str) -> None:
    """Load all weights but those of the head, whose classes are other ones."""
    path = weights / WEIGHTS if weights.is_dir() else weights
    state = read_weights(path)
    own = model.state_dict()
    head = {f"{key}." for key, module in model.named_modules() if module is model.get_classifier()}
    body = {key: value for key, value in state.items() if not key.startswith(tuple(head))}
    missing = [key for key in own if key not in body and not key.startswith(tuple(head)) and not _counts(key)]
    wrong = [key for key, value in body.items() if key not in own or own[key].shape != value.shape]
    if missing or wrong:
        raise ModelError(
            f"{path} holds no weights of {name}: {len(missing)} tensors are missing and {len(wrong)} do not "
            f"fit (for example {(missing + wrong)[0]}){_nearest_architecture(state, path)}; name the "
            "architecture that they belong to with --student"
        )
    model.load_state_dict(body, strict=False)


def _nearest_architecture(state: Mapping[str, torch.Tensor], path: Path) -> str:
    """Phrase that says which architecture's weights these look like; empty where they look like none.

    Args:
        state: tensors of the file.
        path: of the file; architectures that its name or its folder's mentions are tried too.
    """
    shares: dict[str, float] = {}
    for name in _candidates(state, path):
        shares[name] = _share_that_fits(state, name)
        if shares[name] == 1:
            return f"; they are weights of {name}"
    best = max(shares, key=lambda name: shares[name], default="")
    if not best or shares[best] < 0.5:
        return ""
    return f"; the nearest match is {best}, {shares[best]:.0%} of whose tensors fit"


def _candidates(state: Mapping[str, torch.Tensor], path: Path) -> list[str]:
    """Names that the file or its folder mentions, then the members of the family."""
    words = [part.split(".")[0] for part in (path.stem, path.parent.name)]
    families = [names.split() for key, names in _FAMILIES.items() if key in state]
    return [word for word in words if timm.is_model(word)] + [name for names in families for name in names]


def _share_that_fits(state: Mapping[str, torch.Tensor], name: str) -> float:
    """Share of an architecture's tensors, but for the head's, that the file has with the same shape."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    own = {key: value.shape for key, value in model.state_dict().items() if value.dim()}
    fitting = sum(1 for key, shape in own.items() if key in state and state[key].shape == shape)
    given = sum(1 for value in state.values() if value.dim())
    return fitting / max(len(own), given - 2)  # the file's head has a weight and a bias


def _counts(key: str) -> bool:
    """True if a tensor only counts BatchNorm's batches, which many published weights leave out."""
    return key.endswith(".num_batches_tracked")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ModelError: the file is missing or of another format.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read weights from {path}: {error}; give a .safetensors file") from None


def _load_whole(model: torch.nn.Module, path: Path, name: str) -> None:
    try:
        found = model.load_state_dict(read_weights(path), strict=False)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit {name}: {' '.join(str(error).split())[:200]}") from None
    wrong = [key for key in (*found.missing_keys, *found.unexpected_keys) if not _counts(key)]
    if wrong:
        raise ModelError(f"{path} does not fit {name}: {len(wrong)} tensors differ, for example {wrong[0]}")


def was_trained_on(folder: Path, photos: ImageSet) -> bool:
    """True if the manifest of a student's folder says that it was trained on these very photos."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.inputs.get("photos") == photos.digest


def untrained_on(folder: Path, photos: ImageSet) -> Path:
    """The folder of a student as it was before it learned these photos, for measuring with them.

    Args:
        folder: a student's, or of another kind of model.
        photos: that the student is to classify.
    """
    if not was_trained_on(folder, photos):
        return folder
    if (folder / SYNTHETIC / CONFIG).is_file():
        log.info("%s has learned these photos; %s in it has not, and is taken", folder, SYNTHETIC)
        return folder / SYNTHETIC
    log.warning(
        "%s has learned these very photos and judges them too well; a student that `synthkit train "
        "--synth-dir` wrote, or foreign weights, would do better",
        folder,
    )
    return folder


def load_student(folder: Path) -> Student:
    """Load what `Student.save` wrote, or any timm folder that names its labels.

    Raises:
        ModelError: the folder is no timm folder.
    """
    config = _local_config(folder)
    classes = config.get("label_names") or _pretrained_config(config).get("label_names")
    if not classes or "architecture" not in config:
        raise ModelError(f"{folder} is no student: it needs {CONFIG} with architecture and label_names")
    name, model_args = str(config["architecture"]), dict(config.get("model_args") or {})
    if not timm.is_model(name):
        raise ModelError(f"{folder} asks for a student {name!r} that timm does not know")
    model = timm.create_model(name, num_classes=len(classes), **model_args)
    _load_whole(model, folder / WEIGHTS, name)
    data_config = timm.data.resolve_model_data_config(model)
    data_config |= {key: value for key, value in _pretrained_config(config).items() if key in data_config}
    return Student(model, name, model_args, tuple(classes), Preprocessing.from_timm(data_config))
