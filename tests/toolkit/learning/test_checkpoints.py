"""Checkpoints: what is saved comes back bit for bit, and a broken file counts as none."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

pytest.importorskip("safetensors.torch")

import torch

from synthkit.learning.checkpoints import load_checkpoint, save_checkpoint, step_generator


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.arange(12.0).view(4, 3)).square().mean().backward()
        optimizer.step()


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path, first = tmp_path / "c.safetensors", network(0)
    optimizer = adam(first)
    steps(first, optimizer, 3)
    save_checkpoint(path, 3, {"net": first}, optimizer)
    steps(first, optimizer, 2)

    second = network(1)
    restored = adam(second)
    assert load_checkpoint(path, {"net": second}, restored) == 3
    steps(second, restored, 2)
    own, other = first.state_dict(), second.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_settings_of_the_optimizer_are_the_callers(tmp_path: Path) -> None:
    path, model = tmp_path / "c.safetensors", network(0)
    optimizer = adam(model)
    steps(model, optimizer, 1)
    save_checkpoint(path, 1, {"net": model}, optimizer)
    slower = torch.optim.AdamW(model.parameters(), lr=0.001)
    load_checkpoint(path, {"net": model}, slower)
    assert slower.param_groups[0]["lr"] == 0.001


@pytest.mark.parametrize("content", [None, b"", b"no tensors"])
def test_a_missing_or_broken_checkpoint_is_none(tmp_path: Path, content: bytes | None) -> None:
    path, model = tmp_path / "c.safetensors", network(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if content is not None:
        path.write_bytes(content)
    assert load_checkpoint(path, {"net": model}, adam(model)) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "c.safetensors", network(0)
    save_checkpoint(path, 1, {"net": model}, adam(model))
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, 2, {"net": model}, adam(model))
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["c.safetensors"]


def test_each_step_has_random_numbers_of_its_own() -> None:
    draws = {
        (seed, step): float(torch.rand((), generator=step_generator(seed, step)))
        for seed in range(3)
        for step in range(20)
    }
    assert len(set(draws.values())) == len(draws)
    assert draws[2, 7] == float(torch.rand((), generator=step_generator(2, 7)))
