"""Last-layer adaptation that is fast: the frozen layers see each augmented view of a photo once.

    photos ──augment, a few views each──► frozen layers ──► activations, kept ──► trained layers, every step

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

from synthkit.checkpoints import step_generator
from synthkit.students import Student, to_unit_range
from synthkit.training import Examples, FitSettings, augment, smooth_targets

_CHUNK = 64  # images that pass the frozen layers at once
_VIEW_STREAM = 1 << 20  # keeps the views' random numbers apart from those of the gradient steps

Layers = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Views:
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

    def subset(self, indices: np.ndarray) -> Views:
        """The photos at the given positions."""
        augmented = tuple(one[indices] for one in self.augmented)
        return Views(augmented, tuple(one[indices] for one in self.clean), self.labels[indices])

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
        student: as `Student.train_only_last` left it, with at least one unit to train.

    Raises:
        NotImplementedError: torch.fx cannot follow the model's code, or the parts do not compute the same.
    """
    student.model.eval()
    try:
        traced = GraphModule(student.model, _Tracer().trace(student.model))
    except Exception as error:  # whatever a model's own code raises on symbolic values
        raise NotImplementedError(f"{student.architecture}: {error}") from None
    late = _trained_nodes(traced)
    crossing = [node for node in traced.graph.nodes if _crosses(node, late)]
    frozen = _part(traced, [node for node in traced.graph.nodes if node not in late], [], crossing)
    trained = _part(traced, [node for node in traced.graph.nodes if node in late], crossing, None)
    _prove(student, frozen, trained)
    return Split(frozen, replace(student, model=trained))


@torch.no_grad()
def _prove(student: Student, frozen: Layers, trained: torch.nn.Module) -> None:
    """Refuse a cut that does not compute the same, or through which other things than activations go."""
    images = torch.linspace(-1, 1, 2 * math.prod(student.preprocessing.input_size))
    images = images.view(2, *student.preprocessing.input_size)
    crossing = frozen(images)
    activations = all(isinstance(one, torch.Tensor) and len(one) == len(images) for one in crossing)
    if not activations or not torch.equal(trained(*crossing), student.model(images)):
        raise NotImplementedError(f"{student.architecture}: its layers cannot be cut apart")


def _crosses(node: Node, late: set[Node]) -> bool:
    """Whether a node's value, other than a constant, goes from the frozen to the trained layers."""
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
        """Whether a module becomes one node of the graph."""
        owns = next(m.parameters(recurse=False), None) is not None
        return owns or type(m) in get_notrace_modules() or super().is_leaf_module(m, module_qualified_name)


def _trained_nodes(traced: GraphModule) -> set[Node]:
    """Nodes with a parameter to train, and all that follow from them."""
    trainable = {name for name, one in traced.named_parameters() if one.requires_grad}
    late: set[Node] = set()
    for node in traced.graph.nodes:
        owns = node.op in ("call_module", "get_attr") and any(
            name == node.target or name.startswith(f"{node.target}.") for name in trainable
        )
        if owns or any(source in late for source in node.all_input_nodes):
            late.add(node)
    return late


@torch.no_grad()
def see(student: Student, examples: Examples, frozen: Layers, views: int, seed: int) -> Views:
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
    return Views(_joined(augmented), _joined(clean), examples.labels)


def _joined(chunks: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(one) for one in zip(*chunks, strict=True))
