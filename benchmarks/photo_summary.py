"""What the cells of the photo table say together: means, intervals, who wins where, how `adapt` does."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.artifacts import versions
from synthkit.metrics.classification import ahead_on_draws, mean_interval, over_draws
from synthkit.recipes.studies.compare import ahead_line, lines_over_shots, shots_table

ADAPT = "adapt"
#: The ways that a user could fix beforehand, and `adapt` chooses from or stands beside.
FIXED = ("full", "last-1", "last-2", "last-4", "logistic")

Cells = Sequence[Mapping[str, Any]]


def summary(cells: Cells, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the table says.

    Args:
        cells: with `set`, `student`, `shots`, `seed` and `top1` of every method.
        asked: the settings.

    Returns:
        `rows` per set, student, shots and method; `overall` per student, shots and method; `paired`, each
        method against full fine-tuning on the same draws; `adapt` (see `standing`); `cells`, `settings`
        and `versions`.
    """
    rows = [row for group in _groups(cells, "set", "student", "shots") for row in _rows(group)]
    return {
        "rows": rows,
        "overall": [
            row
            for of_student in _groups(cells, "student")
            for group in _groups(of_student, "shots")
            for row in _overall(group, len(_groups(of_student, "set")))
        ],
        "paired": [row for group in _groups(cells, "shots") for row in _paired(group)],
        "adapt": standing(rows),
        "cells": list(cells),
        "settings": dict(asked),
        "versions": versions(),
    }


def _groups(cells: Cells, *keys: str) -> list[Cells]:
    """The cells that agree in these fields, in the order of the fields."""
    names = sorted({tuple(cell[key] for key in keys) for cell in cells})
    return [[cell for cell in cells if tuple(cell[key] for key in keys) == name] for name in names]


def _draws(cells: Cells, method: str) -> np.ndarray:
    return np.array([cell["top1"][method] for cell in cells])


def _rows(cells: Cells) -> list[dict[str, Any]]:
    """Mean, sample deviation and Student's interval over the seeds of a set, a student, a number of shots."""
    about = {key: cells[0][key] for key in ("set", "student", "shots")}
    return [
        {
            **about,
            "method": method,
            **over_draws("top1", values),
            "top1_interval": mean_interval(values),
            "seeds": len(values),
        }
        for method in cells[0]["top1"]
        for values in [_draws(cells, method)]
    ]


def _overall(cells: Cells, sets: int) -> list[dict[str, Any]]:
    """Mean over so many sets of one student and number of shots, with the deviation of a seed's mean."""
    seeds = [seed for seed in _groups(cells, "seed") if len(seed) == sets]
    return [
        {
            "student": cells[0]["student"],
            "shots": cells[0]["shots"],
            "method": method,
            **over_draws("top1", means),
            "top1_interval": mean_interval(means),
            "seeds": len(means),
            "sets": sets,
        }
        for method in cells[0]["top1"]
        for means in [np.array([_draws(seed, method).mean() for seed in seeds])]
        if seeds
    ]


def _paired(cells: Cells) -> list[dict[str, Any]]:
    """How far each method is ahead of full fine-tuning on the same draws of all sets and students."""
    first = FIXED[0]
    return [
        {
            "method": method,
            "shots": cells[0]["shots"],
            "against": first,
            **ahead_on_draws(_draws(cells, method), _draws(cells, first)),
        }
        for method in cells[0]["top1"]
        if method != first
    ]


def standing(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`adapt` beside the best and the worst fixed way, where several seeds tell a deviation.

    Returns:
        `cells` (set, student, shots) that were compared; `within`: in how many `adapt` is within one standard
        deviation of the best fixed way, which is that way's own deviation over the seeds; `to_best` and
        `to_worst`: mean differences; `best`: how often each fixed way is the best one; `best_fixed`: the
        same share for every fixed way, had it been the default.
    """
    tables = [group for group in _groups(rows, "set", "student", "shots") if group[0]["seeds"] > 1]
    if not tables:
        return {"cells": 0}
    scores = [{row["method"]: row for row in group} for group in tables]
    best = [max((table[name] for name in FIXED), key=_mean) for table in scores]
    worst = [min((table[name] for name in FIXED), key=_mean) for table in scores]
    close = {
        name: sum(
            _mean(table[name]) >= _mean(top) - top["top1_std"]
            for table, top in zip(scores, best, strict=True)
        )
        for name in (ADAPT, *FIXED)
    }
    return {
        "cells": len(tables),
        "within": close[ADAPT],
        "to_best": _mean_difference(scores, best),
        "to_worst": _mean_difference(scores, worst),
        "best": dict(Counter(str(row["method"]) for row in best)),
        "best_fixed": {name: close[name] for name in FIXED},
    }


def _mean(row: Mapping[str, Any]) -> float:
    return float(row["top1_mean"])


def _mean_difference(
    scores: Sequence[Mapping[str, Mapping[str, Any]]], others: Sequence[Mapping[str, Any]]
) -> float:
    found = (_mean(table[ADAPT]) - _mean(row) for table, row in zip(scores, others, strict=True))
    return round(statistics.fmean(found), 4)


def markdown(result: Mapping[str, Any]) -> str:
    """The means over the sets as Markdown, a table per student, and what they say of `adapt`."""
    lines: list[str] = []
    for student in dict.fromkeys(row["student"] for row in result["overall"]):
        of_student = [row for row in result["overall"] if row["student"] == student]
        lines += ["", f"{student}, mean over {of_student[0]['sets']} sets ± deviation over the seeds", ""]
        lines += shots_table(of_student)
    lines += ["", "Ahead of full fine-tuning on the same draws, in points (p of a paired t-test):", ""]
    lines += [ahead_line(row) for row in result["paired"]]
    if result["adapt"]["cells"]:
        lines += ["", _sentence(result["adapt"])]
    return "\n".join(lines).strip()


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Top-1 over shots, a panel per student; nothing where no number of shots is measured on every set."""
    from matplotlib.figure import Figure

    students = list(dict.fromkeys(row["student"] for row in result["overall"]))
    if not students:
        return
    figure = Figure(figsize=(2 + 4.5 * len(students), 4), layout="constrained")
    panels = figure.subplots(1, len(students), sharey=True, squeeze=False)[0]
    for axes, student in zip(panels, students, strict=True):
        lines_over_shots(axes, [row for row in result["overall"] if row["student"] == student])
        axes.set_title(student)
    panels[0].set_ylabel("top-1, mean over the sets")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=100)


def _sentence(found: Mapping[str, Any]) -> str:
    best = ", ".join(f"{name} {count}" for name, count in found["best"].items())
    return (
        f"`adapt` is within one standard deviation of the best fixed way in {found['within']} of "
        f"{found['cells']} cells, {100 * found['to_best']:+.1f} points from it on average and "
        f"{100 * found['to_worst']:+.1f} from the worst. Best were: {best}."
    )
