"""Training state that survives a kill: weights and optimiser moments in one safetensors file, no pickles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from synthkit.artifacts import write_bytes

_OPTIMIZER = "optimizer/"


def save_checkpoint(
    path: Path, step: int, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Write the state after a step, atomically.

    Args:
        path: the file; an older checkpoint under that name is replaced.
        step: gradient steps done.
        modules: name -> module whose parameters and buffers are kept.
        optimizer: its moments are kept, its settings are not.
    """
    tensors = {
        f"{name}/{key}": value.detach().contiguous().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}/{key}": value.contiguous() for key, value in state.items()}
    write_bytes(path, save(tensors, metadata={"step": str(step)}))


def load_checkpoint(
    path: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> int:
    """Restore what `save_checkpoint` wrote.

    Returns:
        Gradient steps done; 0 when there is no readable checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            step = int(file.metadata()["step"])
    except (FileNotFoundError, SafetensorError):
        return 0
    for name, module in modules.items():
        module.load_state_dict(_below(tensors, f"{name}/"))
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _below(tensors, _OPTIMIZER).items():
        index, _, field = key.partition("/")
        states.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step, the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
