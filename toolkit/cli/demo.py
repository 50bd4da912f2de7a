"""`synthkit demo`: the whole chain on embedded real data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synthkit.cli import options

if TYPE_CHECKING:
    from synthkit.recipes.studies.demo import DemoResult


@options.command("demo")
@click.option("--shots", type=click.IntRange(1, 100), default=2, show_default=True, help="Photos per class.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which photos, and the chain's seed.")
@click.option("--force", is_flag=True, help="Adapt and export again even when nothing changed.")
def command(workspace: Path, shots: int, seed: int, force: bool) -> options.Output:
    """Run the whole chain on scikit-learn's handwritten digits: real images, no download.

    \b
    Example: synthkit --workspace ./demo demo --shots 4
    """
    from synthkit.artifacts import workspace_lock
    from synthkit.recipes.chain import ChainSettings, Workspace
    from synthkit.recipes.studies.compare import with_seed
    from synthkit.recipes.studies.demo import run_demo
    from synthkit.recipes.studies.digits import write_digits

    started = time.perf_counter()
    place = Workspace(workspace / f"demo-{shots}-shot-{seed}")
    with workspace_lock(place.root):
        photos, test = write_digits(place.root / "digits", shots, seed)
        result = run_demo(with_seed(ChainSettings(), seed), place, photos, test, force)
    return _answer(result, place.root, time.perf_counter() - started)


def _answer(result: DemoResult, folder: Path, seconds: float) -> options.Output:
    rows = {row.method: row.top1 for row in result.rows}
    stages = {one.manifest.stage: "skipped" if one.skipped else "done" for one in result.stages}
    width = max(len(method) for method in rows)
    lines = [
        f"{one.manifest.stage:<14} {one.manifest.seconds:6.1f} s" for one in result.stages if not one.skipped
    ]
    lines += [f"{name:<14} skipped, unchanged" for name, state in stages.items() if state == "skipped"]
    lines += ["", f"{'top-1 on ' + str(result.n_test) + ' real test images':<{width}}"]
    lines += [f"  {method:<{width}}  {share:.3f}" for method, share in rows.items()]
    lines += [
        "",
        f"strategy of the adapted bundle: {result.strategy}",
        f"contact sheet: {result.sheet}",
        f"bundle:        {folder / 'bundle'}",
        f"{seconds:.0f} s in all",
    ]
    data: dict[str, Any] = {
        "rows": [{"method": method, "top1": share} for method, share in rows.items()],
        "strategy": result.strategy,
        "n_test": result.n_test,
        "stages": stages,
        "seconds": round(seconds, 1),
        "contact_sheet": result.sheet,
        "bundle": folder / "bundle",
    }
    return options.Output(data, "\n".join(lines))
