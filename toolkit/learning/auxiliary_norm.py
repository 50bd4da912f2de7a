"""A second BatchNorm for synthetic images while a student learns from both kinds (AdvProp, arXiv 1911.09665).

    real half of a batch ──► BatchNorm ──────────┐
                                                 ├──► all other layers are shared
    synthetic half ──► auxiliary BatchNorm ──────┘

Real photos meet the first one alone, so that neither their statistics nor their scales are bent by the look
of synthetic images; Yu et al. (arXiv 2312.02253) use it for these. The auxiliary ones are dropped at the end,
and the student is the plain architecture again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import convert_splitbn_model
from timm.layers.split_batchnorm import SplitBatchNorm2d

from synthkit.errors import ConfigError

Norms = dict[tuple[torch.nn.Module, str], torch.nn.Module]


@contextmanager
def auxiliary_norms(model: torch.nn.Module, architecture: str) -> Iterator[None]:
    """Give each BatchNorm of a model a second one for the time of the context, in place.

    In training mode the model then takes batches whose second half is synthetic; in eval mode it computes
    what it does without the auxiliary ones.

    Args:
        model: a student's network.
        architecture: what to call it in the message.

    Raises:
        ConfigError: the model has no BatchNorm.
    """
    own = _norms(model)
    if not own:
        raise ConfigError(
            f"the student {architecture!r} has no BatchNorm, so it cannot have an auxiliary one; take "
            "another student or --method mixed"
        )
    for (parent, name), norm in own.items():
        setattr(parent, name, convert_splitbn_model(norm))
    try:
        yield
    finally:
        for (parent, name), norm in own.items():
            _take_back(norm, getattr(parent, name))
            setattr(parent, name, norm)


def _norms(model: torch.nn.Module) -> Norms:
    """(parent, attribute) -> BatchNorm of a model."""
    return {
        (parent, name): child
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.BatchNorm2d)
    }


@torch.no_grad()
def _take_back(norm: torch.nn.Module, trained: Any) -> None:
    """Copy what the first of the two has learned into the plain BatchNorm."""
    assert isinstance(trained, SplitBatchNorm2d)
    state = {key: value for key, value in trained.state_dict().items() if not key.startswith("aux_bn.")}
    norm.load_state_dict(state)
    norm.train(trained.training)
