"""Training curves: what a run of `fit` looked like from inside, kept beside the student as curves.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from synthkit.artifacts import write_json

CURVES = "curves.json"
_DIGITS = 6  # of what is kept; more would be noise


@dataclass
class Curves:
    """The course of one run.

    Attributes:
        loss: training loss of every gradient step.
        lr: learning rate of every gradient step, the highest of a layer.
        validation: (gradient steps done, top-1 on the held-out photos) of every evaluation on them.
    """

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def resume(cls, path: Path | None, steps: int) -> Curves:
        """The first steps of what an interrupted run had written; empty where there is nothing."""
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path else {}
        except (OSError, ValueError):
            found = {}
        evaluations = [
            (int(step), float(top1)) for step, top1 in found.get("validation", []) if step <= steps
        ]
        return cls(found.get("loss", [])[:steps], found.get("lr", [])[:steps], evaluations)

    def add_step(self, loss: float, lr: float) -> None:
        """One more gradient step."""
        self.loss.append(float(f"{loss:.{_DIGITS}g}"))
        self.lr.append(float(f"{lr:.{_DIGITS}g}"))

    def add_evaluation(self, steps: int, top1: float) -> bool:
        """Add an evaluation on the held-out photos; True if it is the best so far, as the last of equals."""
        best = all(top1 >= before for _, before in self.validation)
        self.validation.append((steps, top1))
        return best

    def save(self, path: Path) -> None:
        """Write the JSON file, and its folder where there is none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))
