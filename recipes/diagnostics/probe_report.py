"""What `probe` measured, as shares of the gap, a sentence of advice, tables and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthkit.metrics.classification import wilson_interval

_MOST_OF_IT = 0.5  # share of the gap from which the last units are called the place to adapt


def recovered(on_curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The gap, and the share of it that real photos for the last 1, 2, 4 units recover.

    Args:
        on_curve: rows with `first`, `k` and `top1`, k from 0 to all units.

    Returns:
        `gap` (top-1 of `synthetic` and `real` alone, and the difference in `points`) and `recovered` (number
        of last units -> share; None where synthetic images do not fall behind).
    """
    top = {row["k"]: row["top1"] for row in on_curve if row["first"] == "synthetic"}
    units = max(top)
    synthetic, real = top[units], top[0]
    shares = {
        str(count): round((top[units - count] - synthetic) / (real - synthetic), 4)
        if real > synthetic
        else None
        for count in (1, 2, 4)
        if units - count in top
    }
    gap = {"synthetic": synthetic, "real": real, "points": round(100 * (real - synthetic), 2)}
    return {"gap": gap, "recovered": shares}


def _synthetic_interval(found: Mapping[str, Any]) -> tuple[float, float]:
    total = found["n_test"]
    return wilson_interval(round(found["gap"]["synthetic"] * total), total)


def _tells_a_gap(found: Mapping[str, Any]) -> bool:
    return bool(found["gap"]["real"] > _synthetic_interval(found)[1])


def advice(found: Mapping[str, Any]) -> str:
    """One sentence: what to do about the gap that was found.

    Args:
        found: `gap`, `recovered`, `n_test` and `classes`, their number.
    """
    if not _tells_a_gap(found):
        return _no_gap(found)
    gap = found["gap"]
    shares = found["recovered"]
    enough = [count for count, share in shares.items() if share >= _MOST_OF_IT]
    if enough:
        return (
            f"Real photos for the last {enough[0]} unit(s) recover {shares[enough[0]]:.0%} of the gap of "
            f"{gap['points']:.1f} points: adapt with --layers {enough[0]}."
        )
    best = max(shares, key=lambda count: shares[count])
    return (
        f"Even the last {best} units recover only {shares[best]:.0%} of the gap of {gap['points']:.1f} "
        "points, so it begins before them: train all layers on the photos (--path full), or draw better "
        "images."
    )


def _no_gap(found: Mapping[str, Any]) -> str:
    synthetic, real = (found["gap"][side] for side in ("synthetic", "real"))
    about = f"{synthetic:.1%} with synthetic images, {real:.1%} with real photos"
    if max(synthetic, real) < (1 + 1 / found["classes"]) / 2:  # halfway from chance to no error
        return f"No gap to see yet: {about}, so neither student has learned much; give more --epochs."
    low, high = _synthetic_interval(found)
    return (
        f"No gap to close: {about}, and {found['n_test']} photos tell no difference below "
        f"{100 * (high - low) / 2:.1f} points."
    )


def markdown(found: Mapping[str, Any]) -> str:
    """All tables, and the advice."""
    lines = [f"Top-1 on {found['n_test']} real photos", "", *_curve_table(found)]
    if _tells_a_gap(found):
        lines += ["", *(f"- last {n} unit(s): {s:.0%} of the gap" for n, s in found["recovered"].items())]
    if found["efficiency"]:
        lines += ["", *_efficiency_table(found["efficiency"])]
    if found["switches"]:
        lines += ["", "| switch | synthetic | real |", "|---|---:|---:|"]
        lines += [
            f"| {row['switch']} | {_cell(row.get('synthetic'))} | {_cell(row.get('real'))} |"
            for row in found["switches"]
        ]
    return "\n".join([*lines, "", found["advice"]])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _curve_table(found: Mapping[str, Any]) -> Iterator[str]:
    top = {(row["first"], row["k"]): row["top1"] for row in found["curve"]}
    yield "| units 1..k | up to | first synthetic, then real | first real, then synthetic |"
    yield "|---:|---|---:|---:|"
    for k in sorted({k for _, k in top}):
        last = found["units"][k - 1] if k else ""
        yield f"| {k} | {last} | {_cell(top['synthetic', k])} | {_cell(top['real', k])} |"


def _efficiency_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    top = {(row["photos"], row["way"]): row["top1"] for row in rows}
    yield f"| real photos | {' | '.join(ways)} |"
    yield "|---:" * (1 + len(ways)) + "|"
    for photos in sorted({photos for photos, _ in top}):
        yield f"| {photos} | {' | '.join(_cell(top[photos, way]) for way in ways)} |"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """The curve over k, and beside it the one over the number of real photos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    over_units, over_photos = figure.subplots(1, 2, sharey=True)
    for first, second in (("synthetic", "real"), ("real", "synthetic")):
        rows = [row for row in found["curve"] if row["first"] == first]
        label = f"1..k {first}, rest {second}"
        over_units.plot([row["k"] for row in rows], [row["top1"] for row in rows], marker="o", label=label)
    over_units.set(xlabel="k, units that learned the first domain", ylabel="top-1 on real photos")
    for way in dict.fromkeys(one["way"] for one in found["efficiency"]):
        rows = [row for row in found["efficiency"] if row["way"] == way]
        over_photos.plot(
            [row["photos"] for row in rows], [row["top1"] for row in rows], marker="o", label=way
        )
    over_photos.set_xscale("log", base=2)
    over_photos.set_xticks(sorted({row["photos"] for row in found["efficiency"]}))
    over_photos.xaxis.set_major_formatter("{x:g}")
    over_photos.set(xlabel="real photos")
    for axes in (over_units, over_photos):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)
