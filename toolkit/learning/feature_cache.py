"""Cached features: the frozen layers process each augmented view of a photo only once.

    photos ──augment, a few views each──► frozen layers ──► features, cached ──► trained layers, every step

A gradient step then costs only the trained layers. On the same views it is the very computation of the plain
loop, since frozen layers with frozen statistics answer alike every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timm.models._features_fx import get_notrace_modules
from torch.fx import Graph, GraphModule, Node, Tracer

from synthkit.errors import ModelError
from synthkit.learning.augmentation import augment, smooth_targets
from synthkit.learning.checkpoints import step_generator
from synthkit.learning.fit import Examples, FitSettings, LabelledData
from synthkit.learning.students import Student, to_unit_range

_CHUNK = 64  # images that pass the frozen layers at once
_PROTOTYPE_MARGIN = 3.0  # right with a probability near 1 at the class means, less between them
_VIEW_STREAM = 1 << 20  # keeps the views' random numbers apart from those of the gradient steps

Layers = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class CachedFeatures:
    """Photos as the trained layers of a student see them.

    Attributes:
        augmented: what crosses from the frozen to the trained layers, each float32 [photos, views, ...].
        clean: the same of the photos as they are, each float32 [photos, ...].
        labels: class indices, int64 [photos].
    """

    augmented: tuple[torch.Tensor, ...]
    clean: tuple[torch.Tensor, ...]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, which: slice) -> CachedFeatures:
        """The same photos with only some of what crosses."""
        return CachedFeatures(self.augmented[which], self.clean[which], self.labels)

    def subset(self, indices: np.ndarray) -> CachedFeatures:
        """The photos at the given positions."""
        augmented = tuple(one[indices] for one in self.augmented)
        return CachedFeatures(augmented, tuple(one[indices] for one in self.clean), self.labels[indices])

    def batch(
        self, student: Student, picked: np.ndarray, step: int, settings: FitSettings
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """One view of each picked photo, and soft targets [B, classes]."""
        views = self.augmented[0].shape[1]
        which = torch.randint(views, (len(picked),), generator=step_generator(settings.seed, step))
        rows = torch.from_numpy(picked)
        targets = smooth_targets(self.labels[rows], len(student.classes), settings.smoothing)
        return tuple(one[rows, which] for one in self.augmented), targets

    @torch.no_grad()
    def logits(self, student: Student, indices: np.ndarray) -> np.ndarray:
        """Logits [N, classes] of the photos at the given positions, as they are."""
        student.model.eval()
        return np.asarray(student.model(*(one[indices] for one in self.clean)).numpy())


@dataclass(frozen=True)
class Split:
    """A student cut between the layers that stay as they are and those that are trained.

    Attributes:
        frozen: images [N, 3, H, W] -> what the trained layers need of the frozen ones.
        trained: a student whose model takes that; its parameters are the whole student's own.
    """

    frozen: Layers
    trained: Student


def split(student: Student) -> Split:
    """Cut a student before the first layer that has a parameter to train.

    Args:
        student: as `Student.train_only_last` left it, with at least one layer group to train.

    Raises:
        NotImplementedError: torch.fx cannot follow the model's code, or the parts do not compute the same.
    """
    traced = _trace(student)
    late = _following(traced, {name for name, one in traced.named_parameters() if one.requires_grad})
    crossing = [node for node in traced.graph.nodes if _crosses(node, late)]
    frozen = _part(traced, [node for node in traced.graph.nodes if node not in late], [], crossing)
    trained = _part(traced, [node for node in traced.graph.nodes if node in late], crossing, None)
    _check_parity(student, frozen, trained)
    return Split(frozen, replace(student, model=trained))


def before_last(student: Student, counts: Sequence[int]) -> tuple[Layers, dict[int, slice]]:
    """The frozen part of `split`, for several numbers of last layer groups in one pass.

    Args:
        student: any.
        counts: number of layer groups that are trained, counted from the head, each at least 1.

    Returns:
        Images [N, 3, H, W] -> what crosses into the last groups of every count, one after the other; and the
        place of each count's in it.

    Raises:
        NotImplementedError: torch.fx cannot follow the model's code.
    """
    traced, groups = _trace(student), student.layer_groups()
    crossing: list[Node] = []
    places, latest = {}, set(traced.graph.nodes)
    for count in counts:
        late = _following(traced, {name for group in groups[-count:] for name in group})
        begin = len(crossing)
        crossing += [node for node in traced.graph.nodes if _crosses(node, late)]
        places[count] = slice(begin, len(crossing))
        latest &= late
    early = [node for node in traced.graph.nodes if node not in latest]
    return _part(traced, early, [], crossing), places


def _trace(student: Student) -> GraphModule:
    student.model.eval()
    try:
        return GraphModule(student.model, _Tracer().trace(student.model))
    except Exception as error:  # whatever a model's own code raises on symbolic values
        raise NotImplementedError(f"{student.architecture}: {error}") from None


@torch.no_grad()
def _check_parity(student: Student, frozen: Layers, trained: torch.nn.Module) -> None:
    """Refuse a cut that does not compute the same, or through which other things than activations go."""
    images = torch.linspace(-1, 1, 2 * math.prod(student.preprocessing.input_size))
    images = images.view(2, *student.preprocessing.input_size)
    crossing = frozen(images)
    activations = all(isinstance(one, torch.Tensor) and len(one) == len(images) for one in crossing)
    if not crossing or not activations or not torch.equal(trained(*crossing), student.model(images)):
        raise NotImplementedError(f"{student.architecture}: its layers cannot be cut apart")


def _crosses(node: Node, late: set[Node]) -> bool:
    """True if a node's value, other than a constant, goes from the frozen to the trained layers."""
    return (
        node.op not in ("get_attr", "placeholder") and node not in late and any(n in late for n in node.users)
    )


def _part(
    traced: GraphModule, nodes: Sequence[Node], taken: Sequence[Node], given: Sequence[Node] | None
) -> GraphModule:
    """Some nodes of a graph as a module of its own, whose layers are the whole's own.

    Args:
        traced: the whole.
        nodes: in the order of the whole.
        taken: nodes of the other part whose values become the module's inputs.
        given: nodes whose values become its outputs; None: the whole's output.
    """
    graph = Graph()
    made: dict[Node, Any] = {node: graph.placeholder(node.name) for node in taken}

    def value(node: Node) -> Any:
        if node not in made:  # a constant of the other part
            made[node] = graph.node_copy(node, value) if node.op == "get_attr" else node.args[0]
        return made[node]

    for node in nodes:
        if node.op != "placeholder" or not node.args:  # arguments of `forward` that have defaults keep them
            made[node] = graph.node_copy(node, value)
    if given is not None:
        graph.output(tuple(made[node] for node in given))
    part = GraphModule(traced, graph)
    part.graph.eliminate_dead_code()
    part.recompile()
    part.delete_all_unused_submodules()
    return part


class _Tracer(Tracer):
    """Takes modules whole that own parameters, as timm's fused norm layers do, or that timm cannot trace."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        """True if a module becomes one node of the graph."""
        owns = next(m.parameters(recurse=False), None) is not None
        return owns or type(m) in get_notrace_modules() or super().is_leaf_module(m, module_qualified_name)


def _following(traced: GraphModule, trainable: set[str]) -> set[Node]:
    """Nodes that own one of these parameters, and all that follow from them."""
    late: set[Node] = set()
    for node in traced.graph.nodes:
        owns = node.op in ("call_module", "get_attr") and any(
            name == node.target or name.startswith(f"{node.target}.") for name in trainable
        )
        if owns or any(source in late for source in node.all_input_nodes):
            late.add(node)
    return late


@torch.no_grad()
def extract_features(
    student: Student, examples: Examples, frozen: Layers, views: int, seed: int
) -> CachedFeatures:
    """Pass every photo and its augmented views through the frozen layers once.

    Args:
        student: gives the normalisation.
        examples: the photos.
        frozen: of `split`.
        views: augmented views of each photo.
        seed: of the augmentation.
    """
    clean, augmented = [], []
    for start in range(0, len(examples), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(examples)))
        images = to_unit_range(examples.pixels(rows))
        clean.append(frozen(student.normalise(images)))
        generator = step_generator(seed, _VIEW_STREAM + start)
        seen = [frozen(student.normalise(augment(images, generator))) for _ in range(views)]
        augmented.append(tuple(torch.stack(one, 1) for one in zip(*seen, strict=True)))
    return CachedFeatures(_joined(augmented), _joined(clean), examples.labels)


def _joined(chunks: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(one) for one in zip(*chunks, strict=True))


def takes_means(head: torch.nn.Module) -> bool:
    """True if `head_from_means` can set this head."""
    return isinstance(head, torch.nn.Linear) and head.bias is not None


@torch.no_grad()
def head_from_means(student: Student, head: str, data: LabelledData, labels: np.ndarray) -> None:
    """Let the head answer with the class whose mean feature is nearest (prototypes, Snell et al. 2017).

    The squared distances are scaled so that the logit of a class is `_PROTOTYPE_MARGIN` at its own mean and
    minus that in the middle of all classes; how large features are differs by family.

    Args:
        student: whole, or its last layers; its head is changed in place.
        head: the name of its head among the model's modules.
        data: photos of every class.
        labels: their class indices, int64 [N].

    Raises:
        ModelError: the head is no linear layer.
    """
    layer = student.model.get_submodule(head)
    if not takes_means(layer):
        raise ModelError(
            f"the head of {student.architecture!r} is not linear with a bias; use --set adapt.head=new"
        )
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    data.logits(student, np.arange(len(data)))
    hook.remove()
    features, of_class = torch.cat(seen), torch.from_numpy(labels)
    means = torch.stack([features[of_class == label].mean(0) for label in range(len(student.classes))])
    middle = means.mean(0)
    away = means - middle
    scale = 2 * _PROTOTYPE_MARGIN / away.square().sum(1).mean().clamp(min=1e-12)
    layer.weight.copy_(scale * away)
    layer.bias.copy_(-scale * (away @ middle + away.square().sum(1) / 2))
